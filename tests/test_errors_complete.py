"""The cases of the other files on errors reach every message that the package has."""

import ast
import inspect
import traceback
from types import ModuleType

import pytest
import test_errors
import test_errors_backward
import test_errors_kvcache
import test_errors_memory
import test_errors_varlen
import test_errors_words

from flash_attn import _check_contents, _check_memory, _check_rules, _check_scalars

FILES = (
    test_errors,
    test_errors_varlen,
    test_errors_kvcache,
    test_errors_backward,
    test_errors_words,
    test_errors_memory,
)
RULES = (_check_scalars, _check_rules, _check_contents, _check_memory)


def refusals(rules: ModuleType) -> list[ast.Call]:
    """Where the rules call ``refuse``."""
    nodes = ast.walk(ast.parse(inspect.getsource(rules)))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    return [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "refuse"]


def line_that_refuses(case: test_errors.Case) -> tuple[str, int | None]:
    try:
        case.function.call(**case.arguments())
    except RuntimeError as error:
        frame = traceback.extract_tb(error.__traceback__)[-2]  # the last one is in refuse() itself
        return frame.filename, frame.lineno
    raise AssertionError(f"{case.id} was accepted")


@pytest.mark.cpu_only
@pytest.mark.usefixtures("contents_are_checked")
def test_every_message_has_a_case():
    """A rule added without a case of its own fails here, with its line."""
    reached = {line_that_refuses(case) for file in FILES for case in file.CASES}
    calls = [(rules, call) for rules in RULES for call in refusals(rules)]
    assert len(calls) > 60
    missing = [
        f"{rules.__name__}:{call.lineno}: {ast.unparse(call)}"
        for rules, call in calls
        if not any(
            (rules.__file__, line) in reached
            for line in range(call.lineno, (call.end_lineno or call.lineno) + 1)
        )
    ]
    assert not missing, "\n".join(missing)
