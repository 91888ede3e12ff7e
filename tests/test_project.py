"""The rules of the tree: the documents' commands exist, the sources keep out what they must."""

import ast
import graphlib
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import flash_attn
from benchmarks import documents, picture

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = documents.documents()
CODE_FOLDERS = ["flash_attn", "csrc", "tests", "benchmarks", "patches"]
CODE_SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh"}

MAX_LINES, HARD_MAX_LINES = 500, 700
MAX_FUNCTION_LINES = 80
# A file between the two limits that was looked at and left whole, with the reason.
LONG_FILES: dict[str, str] = {}

IN_TURNS = "csrc/gpu/turns.cuh"
FLOAT_ATOMICS = re.compile(
    r"\batomicAdd\b(?!.*//.*\binteger\b)"  # an integer counter says so at the end of its line
    r"|std::atomic(_ref)?<\s*(float|double)"
    r"|\b(red|atom)\.[\w.:]*\.(f16|bf16|f32|f64)"
    r"|#pragma\s+omp\b.*\breduction\b|std::execution|std::reduce\b"
)
# What contract.h must not be able to see: the launch, its neighbours, its hardware.
LAUNCH_NAMES = re.compile(
    r"\b\w*(batch|max_seqlen|max_s_|num_?sm|sm_?count|multiprocessor|occupancy|thread|worker|grid"
    r"|num_splits|num_heads)\w*",
    re.IGNORECASE,
)


def code_files():
    """Every source of the project, as written by people."""
    found = [path for folder in CODE_FOLDERS for path in (ROOT / folder).rglob("*")]
    found = [path for path in found if path.suffix in CODE_SUFFIXES]
    return [*ROOT.glob("*.py"), *sorted(found)]


def without_comments(cpp):
    return re.sub(r"//[^\n]*|/\*.*?\*/", "", cpp, flags=re.DOTALL)


def shell_commands(markdown):
    """The command lines of a document's sh, bash and console blocks, continuations joined."""
    for block in re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", markdown, re.M | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ").split("#")[0]
            yield from (part.strip() for part in line.split("&&") if part.strip())


def problem_with(command):
    """Why a command of a document cannot work here; None when it can.

    Covered: make targets, scripts and modules of this project with their options, pytest paths.
    """
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word)]
    program = Path(words[0]).name if words else ""
    if program.startswith("python") and words[1:3] == ["-m", "pytest"]:
        words, program = words[2:], "pytest"
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        unknown = [word for word in words[1:] if word not in targets and word[0] != "-"]
        return f"make has no target {unknown[0]}" if unknown else None
    if program.startswith("python") and len(words) > 1 and words[1] != "-c":
        if words[1] == "-m":
            script = ROOT / (words[2].replace(".", "/") + ".py")
            if words[2].split(".")[0] not in {"benchmarks", "flash_attn"}:
                return None  # pip, venv and the like
        else:
            script = ROOT / words[1]
        if not script.exists():
            return f"{script.relative_to(ROOT)} does not exist"
        code = script.read_text()
        unknown = [word for word in words if word.startswith("--") and f'"{word}"' not in code]
        return f"{script.name} has no option {unknown[0]}" if unknown else None
    if program == "pytest":
        missing = [w for w in words[1:] if "/" in w and not (ROOT / w.split("::")[0]).exists()]
        return f"{missing[0]} does not exist" if missing else None
    return None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands_in_documents_exist(document):
    """Every make target, script, module, option and test path in a shell block is there."""
    problems = {line: problem_with(line) for line in shell_commands(document.read_text())}
    assert {line: problem for line, problem in problems.items() if problem} == {}


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "python no_such_script.py",
        "python -m benchmarks.bench_attention --no-such-option",
        "python -m pytest tests/no_such_test.py",
    ],
)
def test_control_wrong_commands_are_found(command):
    """The check above catches these, and accepts what exists."""
    assert problem_with(command)
    assert problem_with('PYTHON=python3.12 make test ARGS="-k wheel"') is None
    assert problem_with(".venv/bin/python -m benchmarks.bench_attention --quick") is None


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_in_documents_exist(document):
    """Every relative link leads to a file, and its anchor to a heading."""
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text()):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{document.name} links to {target}"
        if anchor and path.suffix == ".md":
            headings = re.findall(r"^#+ +(.*)$", path.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings]
            assert anchor in slugs, f"{document.name} links to {target}"


RECORDED = [
    pytest.param(command, text, id=document.relative_to(ROOT).as_posix())
    for document in DOCUMENTS
    for command, text in documents.blocks(document)
]


@pytest.mark.parametrize(("command", "text"), RECORDED)
def test_recorded_outputs_agree_with_results(command, text):
    """What a document shows as a result is what its command prints from the committed files."""
    rule = "python -m benchmarks.documents puts it in anew"
    assert text.strip() == documents.printed(command).strip(), rule


def test_documents_are_refreshed():
    """A block gets what its command prints, and keeps its fence; the text around it stays."""
    licence = (ROOT / "LICENSE").read_text().strip()
    block = "<!-- output of: cat LICENSE -->\n{}\n<!-- end -->"
    fence = "```text\n{}\n```"
    text = "before\n{}\nbetween\n{}\nafter\n"
    old = text.format(block.format("old"), block.format(fence.format("old")))
    new = text.format(block.format(licence), block.format(fence.format(licence)))
    assert documents.refreshed(old) == new == documents.refreshed(new)
    with pytest.raises(ValueError, match="only python and cat"):
        documents.printed("rm -r results")


def test_the_picture_shows_the_results(tmp_path):
    """Drawn again from results/: the counts and names that the committed picture shows."""
    pytest.importorskip("matplotlib")
    folder, again = ROOT / "results/nvidia-h200", tmp_path / "picture.svg"
    assert picture.main([str(folder), str(again)]) == 0
    counts = picture.bytes_that_differ(json.loads((folder / "patched_upstream.json").read_text()))
    for drawn in (again.read_text(), (ROOT / "docs/picture.svg").read_text()):
        for call, by_side in counts.items():
            assert f">{call}<" in drawn
            assert all(f"{count:,}<" in drawn for count in by_side.values())
    assert all(by_side["this package, deterministic"] == 0 for by_side in counts.values())


def test_benchmark_runs_and_renders_its_record(tmp_path):
    """`--quick` checks and times a case of each kind; the record gives the printed table again."""
    record = tmp_path / "bench.json"

    def table(*options):
        command = [sys.executable, "-m", "benchmarks.bench_attention", *options]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return done.stdout.split("\nrecorded in")[0].strip()

    printed = table("--quick", "--json", str(record))
    assert "prefill" in printed and "decode" in printed
    assert table("--render", str(record)) == printed


def test_files_are_short():
    """At most 500 lines, or a recorded reason; never more than 700."""
    lengths = {
        path.relative_to(ROOT).as_posix(): len(path.read_text().splitlines())
        for path in code_files()
    }
    too_long = {name: n for name, n in lengths.items() if n > MAX_LINES and name not in LONG_FILES}
    assert too_long == {}
    assert [name for name, n in lengths.items() if n > HARD_MAX_LINES] == []
    assert [name for name in LONG_FILES if lengths.get(name, 0) <= MAX_LINES] == []


def test_functions_are_short():
    """At most 80 lines each, docstring and signature included."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    too_long = [
        f"{path.relative_to(ROOT).as_posix()}: {node.name}"
        for path in code_files()
        if path.suffix == ".py"
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds) and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    ]
    assert too_long == []


def imported_modules(path):
    """What a module of this package imports when it is imported itself, by full names."""
    package = path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").split(".")[:-1]
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*above, *([node.module] if node.module else [])])
            yield origin
            yield from (f"{origin}.{alias.name}" for alias in node.names)


def test_no_import_goes_in_a_circle():
    """Between modules; a package's __init__.py, which gathers names, is left out."""
    paths = [*(ROOT / "flash_attn").rglob("*.py"), ROOT / "flash_attn_2_cuda.py"]
    modules = {
        path.relative_to(ROOT).with_suffix("").as_posix().replace("/", "."): path
        for path in paths
        if path.name != "__init__.py"
    }
    imports = {
        name: {other for other in imported_modules(path) if other in modules}
        for name, path in modules.items()
    }
    assert "flash_attn_2_cuda" in imports["flash_attn.flash_attn_interface"]
    assert list(graphlib.TopologicalSorter(imports).static_order())  # raises on a circle


def lines_of_csrc(pattern):
    """["file: line"] of what matches in the native sources."""
    sources = [path for path in code_files() if path.is_relative_to(ROOT / "csrc")]
    assert sources
    return [
        f"{path.relative_to(ROOT).as_posix()}: {line.strip()}"
        for path in sources
        for line in path.read_text().splitlines()
        if pattern.search(line)
    ]


def test_no_float_atomics():
    """No sum whose order the scheduler chooses.

    In IN_TURNS alone, where each adder waits for the one before, and from its one caller.
    """
    found = lines_of_csrc(FLOAT_ATOMICS)
    assert [line for line in found if not line.startswith(f"{IN_TURNS}: ")] == []
    callers = lines_of_csrc(re.compile(r"\b(?<!void )add_to_memory\("))
    assert [line.split(": ")[0] for line in callers] == ["csrc/sm80/backward_key_walk.cuh"]


@pytest.mark.parametrize(
    "line",
    [
        "atomicAdd(&dq[i], value);",
        "std::atomic<float> sum;",
        'asm("red.global.add.f32 [%0], %1;");',
        "#pragma omp parallel for reduction(+ : sum)",
    ],
)
def test_control_float_atomics_are_found(line):
    """The search above catches these, and lets a declared integer counter pass."""
    assert FLOAT_ATOMICS.search(line)
    assert not FLOAT_ATOMICS.search("int ticket = atomicAdd(counter, 1);  // integer: any order")


def test_contract_cannot_see_the_launch():
    """No function of contract.h takes, and no line of it names, what must not reach a bit."""
    code = without_comments((ROOT / "csrc/core/contract.h").read_text())
    assert [match.group() for match in LAUNCH_NAMES.finditer(code)] == []


@pytest.mark.parametrize(
    "name", ["batch_size", "b_batch", "max_seqlen_k", "kNumSms", "num_threads"]
)
def test_control_launch_names_are_found(name):
    """The search above catches these, and not the words of a row or a sequence."""
    assert LAUNCH_NAMES.search(f"static inline int64_t segment_of(int64_t key, int {name});")
    assert not LAUNCH_NAMES.search("visible_keys(int64_t query, int64_t s_q, int64_t s_k);")


def test_notebooks_carry_no_outputs():
    """A committed output is a result that no command made."""
    for notebook in ROOT.glob("*.ipynb"):
        cells = json.loads(notebook.read_text())["cells"]
        assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")]


def test_formatters_have_one_version():
    """pre-commit formats as `make lint` checks."""
    pinned = set((ROOT / "requirements-dev.txt").read_text().splitlines())
    hooks = (ROOT / ".pre-commit-config.yaml").read_text()
    used = re.findall(r"additional_dependencies: \[(.*?)\]", hooks)
    assert used and set(used) <= pinned


def test_versions_agree():
    """The distribution and the module carry one version, below the next upstream one."""
    declared = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert declared and declared[1].split("+")[0] == flash_attn.__version__.split("+")[0] == "2.8.3"
