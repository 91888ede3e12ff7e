"""The CPU kernels of different instruction sets share no code.

isa_*.cpp compile the same headers under other flags. The linker makes one of equal names: a shared
function of which the AVX-512 object keeps a copy would be run by machines without AVX-512, or give
one set's rounding to another. So what an object defines bears its set's name, or is local.
"""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

import setup

ROOT = Path(__file__).resolve().parent.parent
OBJECTS = ROOT / setup.OBJECTS / "csrc/cpu"
ISAS = list(setup.ISA_FLAGS) if setup.IS_X86 else ["generic"]
COMPILER = os.environ.get("CXX") or "c++"
needs_compiler = pytest.mark.skipif(shutil.which(COMPILER) is None, reason="no C++ compiler")

# Of the compiler and its library, where nothing is inlined: a constant, and placement new, which
# returns its argument.
EMPTY = {"DW.ref.__gxx_personality_v0", "_ZnwmPv"}

CONTROL = """
#include <algorithm>
inline int mergeable(int x) { return x + 1; }
inline int variable = 2;
static inline int local(int x) { return x + 3; }
namespace fa::cpu::ISA {
inline int own(int x) { return x + 4; }
int use(int x) { return std::max(mergeable(x), variable) + local(x) + own(x); }
}
"""


def shared_names(path, isa):
    """What an object offers to the linker under names that other objects may have too."""
    with open(path, "rb") as stream:
        names = {
            symbol.name
            for symbol in ELFFile(stream).get_section_by_name(".symtab").iter_symbols()
            if symbol["st_shndx"] != "SHN_UNDEF" and symbol["st_info"]["bind"] != "STB_LOCAL"
        }
    own = {name for name in names if f"3cpu{len(isa)}{isa}" in name}
    assert own, f"{path} holds no kernels"
    return names - own


def compiled(source, isa, to):
    """As setup.py compiles it, but no call is inlined unless a function insists on it."""
    command = [COMPILER, *setup.CXX_FLAGS, *setup.ISA_FLAGS[isa], "-O0", "-w", "-I."]
    subprocess.run([*command, "-c", source, "-o", to], cwd=ROOT, check=True)
    return to


@pytest.mark.parametrize("isa", ISAS)
def test_objects_share_no_code(isa):
    """The objects that the library here was linked from."""
    path = OBJECTS / f"isa_{isa}.o"
    if not path.exists():
        pytest.skip("the library was not built in this tree")
    assert shared_names(path, isa) == set()


@needs_compiler
@pytest.mark.parametrize("isa", ISAS)
def test_sources_share_no_code(isa, tmp_path):
    """Not even where the optimizer keeps a copy of every function: no inlining hides one."""
    path = compiled(f"csrc/cpu/isa_{isa}.cpp", isa, tmp_path / "isa.o")
    assert shared_names(path, isa) - EMPTY == set()


@needs_compiler
@pytest.mark.parametrize("isa", ISAS)
def test_control_what_the_linker_merges_is_found(isa, tmp_path):
    """A function, a variable and one of the C++ library; not what is local, or the set's own."""
    source = tmp_path / "control.cpp"
    source.write_text(CONTROL.replace("ISA", isa))
    path = compiled(source, isa, tmp_path / "control.o")
    assert shared_names(path, isa) == {"_Z9mergeablei", "variable", "_ZSt3maxIiERKT_S2_S2_"}
