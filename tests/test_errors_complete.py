"""The cases of the other files on errors reach every message that the package has."""

import ast
import inspect
import traceback

import pytest
import test_errors
import test_errors_backward
import test_errors_kvcache
import test_errors_varlen

from flash_attn import _check_rules

FILES = (test_errors, test_errors_varlen, test_errors_kvcache, test_errors_backward)


def refusals() -> list[ast.Call]:
    """Where the rules call ``refuse``."""
    nodes = ast.walk(ast.parse(inspect.getsource(_check_rules)))
    calls = [node for node in nodes if isinstance(node, ast.Call)]
    return [node for node in calls if isinstance(node.func, ast.Name) and node.func.id == "refuse"]


def line_that_refuses(case: test_errors.Case) -> int:
    try:
        case.function.call(**case.arguments())
    except RuntimeError as error:
        frames = traceback.extract_tb(error.__traceback__)
        lines = [f.lineno for f in frames if f.filename == _check_rules.__file__]
        return lines[-2]  # the last one is in refuse() itself
    raise AssertionError(f"{case.id} was accepted")


@pytest.mark.cpu_only
@pytest.mark.usefixtures("contents_are_checked")
def test_every_message_has_a_case():
    """A rule added without a case of its own fails here, with its line."""
    reached = {line_that_refuses(case) for file in FILES for case in file.CASES}
    calls = refusals()
    assert len(calls) > 50
    missing = [
        f"_check_rules.py:{call.lineno}: {ast.unparse(call)}"
        for call in calls
        if not reached.intersection(range(call.lineno, (call.end_lineno or call.lineno) + 1))
    ]
    assert not missing, "\n".join(missing)
