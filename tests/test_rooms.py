"""The rooms of csrc/: who includes whom, who knows a kernel set, how long a function is."""

import re

import pytest
from test_project import MAX_FUNCTION_LINES, ROOT

CSRC = ROOT / "csrc"

# The rooms that the files of a room may include. "" is csrc/ itself: PyTorch's side.
BELOW = {
    "core": {"core"},
    "cpu": {"core", "cpu"},
    "gpu": {"core", "gpu"},
    "sm80": {"core", "gpu", "sm80"},
    "instantiations": {"sm80"},
    "": {"", "core", "cpu", "gpu"},
}
# The one file that knows all kernel sets.
DISPATCH = "dispatch.cpp"
KERNEL_SETS = [room for room in BELOW if room.startswith("sm")]


def sources():
    found = [path for path in CSRC.rglob("*") if path.suffix in (".h", ".cuh", ".cu", ".cpp")]
    assert len(found) > 100
    return sorted(found)


def room_of(name):
    """The room of a file, by its path from csrc/ on."""
    return name.split("/")[0] if "/" in name else ""


def name_of(path):
    return path.relative_to(CSRC).as_posix()


def forbidden_includes(name, text):
    included = re.findall(r'#include "csrc/([^"]+)"', text)
    allowed = BELOW[room_of(name)] | (set(KERNEL_SETS) if name == DISPATCH else set())
    return [f"{name}: {x}" for x in included if room_of(x) not in allowed]


def without_comments_and_strings(cpp):
    return re.sub(r'//[^\n]*|"(?:[^"\\\n]|\\.)*"', "", cpp)


def long_functions(name, text):
    """Bodies that open behind a parenthesis, and close more than MAX_FUNCTION_LINES later."""
    opened, found = [], []
    for number, line in enumerate(without_comments_and_strings(text).splitlines(), 1):
        for match in re.finditer(r"[{}]", line):
            if match.group() == "{":
                before = line[: match.start()].rstrip()
                opened.append((number, before.endswith((")", "const", "noexcept"))))
            elif opened:
                begin, is_function = opened.pop()
                if is_function and number - begin + 1 > MAX_FUNCTION_LINES:
                    found.append(f"{name}:{begin}: {number - begin + 1} lines")
    return found


def undescribed_kernels(name, text):
    """Kernels that the comment above does not describe: grid, order."""
    found = []
    for match in re.finditer(r"__global__[^;{]*?\b(\w+_kernel)\(", text):
        above = re.sub(r"template <[^>]*>$", "", text[: match.start()].rstrip()).rstrip()
        comment = re.search(r"((?://[^\n]*\n)*//[^\n]*)$", above)
        said = comment[1] if comment else ""
        if not ("//   Grid " in said and "//   Order " in said):
            found.append(f"{name}: {match[1]}")
    return found


@pytest.mark.parametrize("path", sources(), ids=name_of)
def test_a_room_includes_what_lies_below(path):
    assert forbidden_includes(name_of(path), path.read_text()) == []


@pytest.mark.parametrize(
    "name, included",
    [
        ("core/mask.h", "gpu/warp.cuh"),
        ("gpu/fold.cu", "sm80/mma.cuh"),
        ("devices.h", "sm80/kernels.h"),
        ("cpu/forward.h", "gpu/warp.cuh"),
    ],
)
def test_control_a_look_upstairs_is_found(name, included):
    assert forbidden_includes(name, f'#include "csrc/{included}"\n') == [f"{name}: {included}"]
    assert forbidden_includes(DISPATCH, '#include "csrc/sm80/kernels.h"\n') == []


def test_one_file_knows_the_kernel_sets():
    """Beside the sets themselves and what is generated for them."""
    elsewhere = [
        p for p in sources() if room_of(name_of(p)) not in (*KERNEL_SETS, "instantiations")
    ]
    knows = re.compile(r"\b(" + "|".join(KERNEL_SETS) + r")\b")
    found = [name_of(p) for p in elsewhere if knows.search(p.read_text())]
    assert found == [DISPATCH]


def test_functions_are_short():
    assert [line for p in sources() for line in long_functions(name_of(p), p.read_text())] == []


def test_control_a_long_function_is_found():
    body = "  x += 1;\n" * MAX_FUNCTION_LINES
    assert long_functions("a.h", f"void f(int x) {{\n{body}}}\n") == ["a.h:1: 82 lines"]
    assert long_functions("a.h", f"struct S {{\n{body}}};\n") == []


def test_no_header_opens_a_namespace_for_its_readers():
    headers = [p for p in sources() if p.suffix in (".h", ".cuh")]
    assert [name_of(p) for p in headers if "using namespace" in p.read_text()] == []


def test_every_kernel_says_what_it_is():
    kernels = [p for p in sources() if "__global__" in p.read_text()]
    assert len(kernels) >= 8
    assert [line for p in kernels for line in undescribed_kernels(name_of(p), p.read_text())] == []


def test_control_a_kernel_without_a_word_is_found():
    silent = "// Adds.\ntemplate <class T>\n__global__ void add_kernel(T* x) {}\n"
    assert undescribed_kernels("a.cu", silent) == ["a.cu: add_kernel"]
    said = silent.replace("Adds.", "Adds.\n//   Grid    a block a row.\n//   Order   none.")
    assert undescribed_kernels("a.cu", said) == []


def test_the_readme_lists_every_file():
    """With a link, or as one of the files that are compiled for one instruction set each."""
    readme = (CSRC / "README.md").read_text()
    linked = set(re.findall(r"\]\(([\w/.]+)\)", readme))
    missing = [
        name_of(path)
        for path in sources()
        if room_of(name_of(path)) != "instantiations"
        and name_of(path) not in linked
        and not path.name.startswith("isa_")
    ]
    assert missing == []
