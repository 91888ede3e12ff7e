"""One wheel for every Python >= 3.10 and every torch >= 2.10: what the library asks of its host.

Its undefined dynamic symbols may come from three places only: the C and C++ runtimes (they carry
those libraries' symbol versions), the limited Python API, and PyTorch's stable C shims.
"""

import fcntl
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import abi3info
import pytest
from abi3info.models import PyVersion, Symbol
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection, GNUVerSymSection

ROOT = Path(__file__).resolve().parent.parent
PLATFORM = re.sub(r"[-.]", "_", sysconfig.get_platform())
WHEEL = ROOT / f"dist/flash_attn-2.8.3+deterministic-cp310-abi3-{PLATFORM}.whl"

MIN_PYTHON = PyVersion(3, 10)
RUNTIMES = re.compile(r"(libc|libm|libdl|libpthread|libstdc\+\+|libgcc_s|ld-linux[\w-]*)\.so\.\d+")
TORCH_LIBRARIES = {"libtorch.so", "libtorch_cpu.so", "libc10.so"}
STABLE_SHIM = re.compile(r"(aoti_torch|torch)_[a-z0-9_]+")
# Weak hooks that compilers add to every shared library; absent ones are never called.
COMPILER_HOOKS = {"__gmon_start__", "_ITM_deregisterTMCloneTable", "_ITM_registerTMCloneTable"}


def in_limited_api(name):
    """Whether Python symbol `name` was in the limited API of MIN_PYTHON already."""
    entry = abi3info.FUNCTIONS.get(Symbol(name)) or abi3info.DATAS.get(Symbol(name))
    return entry is not None and entry.added <= MIN_PYTHON


def unstable_symbols(symbols):
    """The names in [(name, library that versions it or None)] that no stable ABI covers."""
    return [
        name
        for name, library in symbols
        if not (
            (library is not None and RUNTIMES.fullmatch(library))
            or name in COMPILER_HOOKS
            or in_limited_api(name)
            or STABLE_SHIM.fullmatch(name)
        )
    ]


def undefined_symbols(elf):
    """[(name, library that versions it or None)] of the undefined dynamic symbols."""
    libraries, indices = {}, None
    for section in elf.iter_sections():
        if isinstance(section, GNUVerNeedSection):
            for needed, versions in section.iter_versions():
                libraries.update({version["vna_other"]: needed.name for version in versions})
        elif isinstance(section, GNUVerSymSection):
            indices = section
    symbols = []
    for index, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
        if symbol["st_shndx"] == "SHN_UNDEF" and symbol.name:
            version = indices.get_symbol(index)["ndx"] if indices else None
            symbols.append((symbol.name, libraries.get(version)))
    return symbols


def is_up_to_date(wheel):
    sources = [ROOT / "setup.py", ROOT / "pyproject.toml", ROOT / "flash_attn_2_cuda.py"]
    sources += [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    sources += (ROOT / "flash_attn").rglob("*.py")
    return wheel.exists() and wheel.stat().st_mtime >= max(p.stat().st_mtime for p in sources)


@pytest.fixture(scope="module")
def wheel():
    """The wheel of the sources as they are; `make test` has built it already."""
    (ROOT / "build").mkdir(exist_ok=True)
    with open(ROOT / "build/wheel.lock", "w") as lock:  # two test processes, one build folder
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not is_up_to_date(WHEEL):
            command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-build-isolation"]
            command += ["--no-deps", "--wheel-dir", str(WHEEL.parent), str(ROOT)]
            subprocess.run(command, check=True)
    return WHEEL


@pytest.fixture(scope="module")
def unpacked(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


@pytest.fixture(scope="module")
def library(unpacked):
    with open(unpacked / "flash_attn/_C.abi3.so", "rb") as stream:
        yield ELFFile(stream)


def test_contents(unpacked):
    """The two import names, one library, the licence; nothing else at the top level."""
    names = {path.name for path in unpacked.iterdir()}
    info = "flash_attn-2.8.3+deterministic.dist-info"
    assert names == {"flash_attn", "flash_attn_2_cuda.py", info}
    assert [p.name for p in (unpacked / "flash_attn").rglob("*.so")] == ["_C.abi3.so"]
    packed = {p.relative_to(unpacked) for p in (unpacked / "flash_attn").rglob("*.py")}
    assert packed == {p.relative_to(ROOT) for p in (ROOT / "flash_attn").rglob("*.py")}
    metadata = (unpacked / info / "METADATA").read_text()
    assert "Name: flash-attn\nVersion: 2.8.3+deterministic\n" in metadata
    required = re.findall(r"^Requires-Dist: (?!.*extra ==)(\S+)", metadata, re.MULTILINE)
    assert required == ["torch>=2.10", "einops"]
    assert (unpacked / info / "licenses/LICENSE").exists()


def test_runs_without_the_source_tree(unpacked):
    """The unpacked wheel computes, and it is the wheel that computes."""
    script = (
        "import torch, flash_attn, flash_attn_2_cuda\n"
        "q = torch.randn(1, 5, 2, 16)\n"
        "assert flash_attn.flash_attn_func(q, q, q).shape == q.shape\n"
        "print(flash_attn.__file__, flash_attn_2_cuda.__file__, sep='\\n')"
    )
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=unpacked,
        env={**os.environ, "PYTHONPATH": str(unpacked)},
        check=True,
        capture_output=True,
        text=True,
    )
    folders = [Path(line).is_relative_to(unpacked) for line in done.stdout.split()]
    assert folders == [True, True], done.stdout


def test_abi3audit(wheel):
    """The limited Python API, at the version in the wheel's name, as abi3audit sees it."""
    command = [sys.executable, "-m", "abi3audit", "--strict", "--summary", str(wheel)]
    audit = subprocess.run(command, capture_output=True, text=True)
    assert audit.returncode == 0, audit.stdout + audit.stderr


def test_only_stable_symbols(library):
    """Limited Python API, stable shims and C/C++ runtimes: nothing of c10, at or torch."""
    symbols = undefined_symbols(library)
    assert any(STABLE_SHIM.fullmatch(name) for name, _ in symbols), "the shims were not seen"
    assert any(owner == "libc.so.6" for _, owner in symbols), "symbol versions were not seen"
    assert unstable_symbols(symbols) == []


def test_needs_only_torch_and_the_runtimes(library):
    """No libtorch_python, no libpython, and no path of the build machine."""
    tags = list(library.get_section_by_name(".dynamic").iter_tags())
    needed = {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
    assert {name for name in needed if not RUNTIMES.fullmatch(name)} <= TORCH_LIBRARIES
    assert not [tag for tag in tags if tag.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]


@pytest.mark.parametrize(
    "name",
    [
        "_ZN3c105ErrorC1ENS_14SourceLocationENSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEE",
        "_ZNK2at10TensorBase8data_ptrIfEEPT_v",
        "_ZN5torch8autograd9GradMode10is_enabledEv",
        "_Z16THPVariable_WrapRKN2at10TensorBaseE",
        "THPVariableClass",
        "PyUnicode_AsUTF8",  # joined the limited API in 3.13
        "_PyDict_NewPresized",
        "cudaLaunchKernel",
    ],
)
def test_control_unstable_symbols_are_found(name):
    """The check above must catch each of these, or it proves nothing."""
    covered = [
        ("PyModule_Create2", None),
        ("_Py_NoneStruct", None),
        ("aoti_torch_get_data_ptr", None),
        ("torch_parallel_for", None),
        ("memcpy", "libc.so.6"),
        ("_ZSt17__throw_bad_allocv", "libstdc++.so.6"),
        ("__gmon_start__", None),
    ]
    assert unstable_symbols(covered) == []
    assert unstable_symbols([*covered, (name, None), (name, "libtorch_cpu.so")]) == [name, name]
