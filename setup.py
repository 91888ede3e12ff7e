"""Builds flash_attn/_C.abi3.so, the one native library. Metadata and tool settings: pyproject.toml.

One ninja file compiles every source in parallel and remembers what is up to date; an editable
install, a wheel and `build_ext --inplace` share its objects. setuptools cannot give two sources
different flags. Here the CPU kernels are compiled once per instruction set, and each set of NVIDIA
kernels for its own architectures; hence the subclass.

Only PyTorch's stable ABI is used, and no Python API at all, so one library serves every Python from
MIN_PYTHON and every torch from TORCH_TARGET on, and building it needs no Python headers.

Environment: CXX (compiler), MAX_JOBS (parallel compilations). Neither CXXFLAGS nor what nvcc reads
by itself, NVCC_APPEND_FLAGS and the like, has a say: a -ffast-math or -march=native from outside
would change the bits that this package promises.

The NVIDIA kernels are built when PyTorch is a CUDA build and nvcc is found, or when asked for. A
build says first, on stderr, what it builds, what not, and why; pip shows that with -v.
    FLASH_ATTN_FORCE_CUDA=1          build them whatever PyTorch is; 0: leave them out
    FLASH_ATTN_CUDA_ARCHS="80;90"    for these architectures, "90a" among them; default: those of
                                     the GPUs that are visible, or all of CUDA_ARCHS
    FLASH_ATTN_LINEINFO=1            with the source lines that a profiler shows; no instruction
                                     changes, but the library takes three times the room
    CUDA_HOME                        where nvcc is, when it is not on PATH
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
OBJECTS = Path("build/objects")

MIN_PYTHON = (3, 10)
TORCH_TARGET = "0x020a000000000000"  # 2.10: newer shims are not declared, so they cannot be used

# -ffp-contract=off: a*b+c is fused where the source says fma and nowhere else, on any machine.
# -fno-math-errno, -fno-trapping-math: let loops vectorise; neither changes a value.
CXX_FLAGS = [
    *("-std=c++20", "-O3", "-fPIC", "-Wall", "-Wextra"),
    *("-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"),
    *("-fvisibility=hidden", "-fvisibility-inlines-hidden"),
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET}",
]
# libstdc++ first: libtorch exports copies of some of its functions, which no stable ABI covers.
LIBRARIES = ["stdc++", "torch", "torch_cpu", "c10"]

# What csrc/cpu/isa_<name>.cpp is compiled with besides CXX_FLAGS; every other source has no more.
ISA_FLAGS = {
    "generic": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [
        *("-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq"),
        *("-mavx2", "-mfma", "-mf16c", "-Wno-maybe-uninitialized"),
    ],
}
# SASS for each, and PTX for what comes later. 8.6 and 8.9 run the code of 8.0.
CUDA_ARCHS = ("80", "90", "100", "120")
OLDEST_ARCH = 80  # cp.async and the matrix products of bf16 begin here


class KernelSet(NamedTuple):
    """What the CUDA sources of one folder are compiled for, and with, besides NVCC_FLAGS."""

    archs: tuple[str, ...] = ()  # each when its number is asked for; none: whatever is asked for
    flags: tuple[str, ...] = ()


# By folder of csrc/; csrc/instantiations/<folder>_*.cu go with it. FLASH_ATTN_WITH_<FOLDER> tells
# the sources that a set is in the library: one whose architectures are not asked for is left out.
KERNEL_SETS = {
    "gpu": KernelSet(),
    "sm80": KernelSet(),
}
# -fmad=false: as -ffp-contract=off above.
NVCC_FLAGS = [
    *("-std=c++20", "-O3", "--expt-relaxed-constexpr", "-fmad=false", "-cudart=static"),
    *("-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra"),
    *("-Xptxas", "-v"),  # read by spilled_bytes()
]
GIB_PER_NVCC = 2  # of memory, at most, for one compilation

# Bytes of registers that a kernel keeps in memory ("spills"), by architecture and file name; none
# where nothing is listed. More is a kernel that has outgrown its registers. The numbers hold for
# the release of nvcc that they were read from: another one allocates differently.
SPILLS = Path("csrc/instantiations/spills.json")

IS_X86 = platform.machine().lower() in ("x86_64", "amd64")


def isa_of(source: str) -> str | None:
    """The instruction set that a source is written for; None for one that runs on every machine."""
    stem = Path(source).stem
    return stem.removeprefix("isa_") if stem.startswith("isa_") else None


def cuda_home() -> Path | None:
    """Where bin/nvcc and the runtime's headers lie together, if anywhere."""
    on_path = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        Path(on_path).resolve().parent.parent if on_path else None,
        "/usr/local/cuda",
    ]
    for home in (Path(candidate) for candidate in candidates if candidate):
        if (home / "bin/nvcc").exists() and (home / "include/cuda_runtime.h").exists():
            return home
    return None


def has_nvidia_gpu() -> bool:
    """Whether its driver is here. PyTorch cannot tell where it is a CPU build."""
    traces = ("/proc/driver/nvidia/version", "/dev/nvidiactl", shutil.which("nvidia-smi"))
    return any(trace and Path(trace).exists() for trace in traces)


GET_NVCC = "Install the CUDA toolkit, and put nvcc on PATH or set CUDA_HOME."
GET_TORCH = (
    "Install a CUDA build of PyTorch, and build with `pip install --no-build-isolation`, because "
    "pip builds beside a PyTorch of its own otherwise; or set FLASH_ATTN_FORCE_CUDA=1."
)


def decide_cuda(
    asked: str, torch_version: str, torch_has_cuda: bool, nvcc: bool, gpu: bool
) -> tuple[bool, str, str]:
    """Whether to build the NVIDIA kernels, why, and a cure where few would leave them out."""
    if asked not in ("", "0", "1"):
        raise CompileError(f"FLASH_ATTN_FORCE_CUDA is {asked!r}; it can be 0, 1 or unset")
    if asked == "1" and not nvcc:
        raise CompileError(f"FLASH_ATTN_FORCE_CUDA=1 needs nvcc. {GET_NVCC}")
    if asked:
        return asked == "1", f"FLASH_ATTN_FORCE_CUDA={asked}", ""
    why = (
        f"the PyTorch of this build, {torch_version}, is {'a' if torch_has_cuda else 'not a'} CUDA "
        f"build; nvcc with cuda_runtime.h was {'' if nvcc else 'not '}found; an NVIDIA driver was "
        f"{'' if gpu else 'not '}found"
    )
    cures = [*([] if nvcc else [GET_NVCC]), *([] if torch_has_cuda else [GET_TORCH])]
    return not cures, why, " ".join(cures) if torch_has_cuda or gpu else ""


def plan(sources: list[str], archs: list[str], why: str, cure: str) -> str:
    """What is built and what not, as people read it; framed where a GPU would stay idle."""
    isas = ", ".join(filter(None, map(isa_of, sources)))
    cpu = f"flash_attn: CPU kernels for {platform.machine()}: {isas}"
    if not cure:
        targets = ", ".join(f"sm_{arch}" for arch in archs) or "left out"
        return f"{cpu}\nflash_attn: NVIDIA kernels: {targets} ({why})"
    said = (
        "flash_attn is built WITHOUT its NVIDIA kernels: it refuses CUDA tensors.",
        f"Why: {why}.",
        f"Cure: {cure} If it is meant so: FLASH_ATTN_FORCE_CUDA=0.",
    )
    rows = [f"  {row}" for text in said for row in textwrap.wrap(text, 76, break_on_hyphens=False)]
    return "\n".join([cpu, "*" * 80, *rows, "*" * 80])


def cuda_archs() -> list[str]:
    """Architectures to build for, as "80"."""
    asked = os.environ.get("FLASH_ATTN_CUDA_ARCHS", "")
    named = [arch.strip() for arch in asked.replace(",", ";").split(";") if arch.strip()]
    if named:
        return list(dict.fromkeys(named))
    import torch

    visible = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    found = {torch.cuda.get_device_capability(i) for i in visible}
    numbers = sorted(10 * major + minor for major, minor in found)
    return [str(number) for number in numbers if number >= OLDEST_ARCH] or list(CUDA_ARCHS)


def number_of(arch: str) -> str:
    """Without the letter of a target for one GPU (90a) or one family (100f) alone."""
    return arch.rstrip("af")


def check_archs(archs: list[str]) -> None:
    """Refuses what is no target of these kernels or of this nvcc."""
    for arch in archs:
        fits = re.fullmatch(r"\d+[af]?", arch) and int(number_of(arch)) >= OLDEST_ARCH
        command = [f"{cuda_home()}/bin/nvcc", "--dryrun", *gencode([arch])]
        command += ["-c", "-x", "cu", os.devnull]
        if not fits or subprocess.run(command, capture_output=True).returncode != 0:
            raise CompileError(
                f"FLASH_ATTN_CUDA_ARCHS: received {arch!r}; rule: targets of nvcc "
                f"{nvcc_release()} from {OLDEST_ARCH} on, such as 80;90a"
            )


def gencode(targets: list[str]) -> list[str]:
    """SASS of each, and PTX of the last that others can run: that of 90a runs on 9.0 alone."""
    codes = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    plain = [target for target in targets if target.isdigit()]
    return codes + [f"-gencode=arch=compute_{last},code=compute_{last}" for last in plain[-1:]]


def targets_of(kernels: KernelSet, archs: list[str]) -> list[str]:
    """What a set is compiled for when `archs` are asked for."""
    numbers = set(map(number_of, archs))
    return [target for target in kernels.archs or archs if number_of(target) in numbers]


def sources_of(folder: str) -> list[Path]:
    """What belongs to a set of kernels."""
    instantiations = (ROOT / "csrc/instantiations").glob(f"{folder}_*.cu")
    return [*(ROOT / "csrc" / folder).glob("*.cu"), *instantiations]


def cuda_sources(archs: list[str]) -> dict[str, list[str]]:
    """By source, the flags of its set; sets without a target are left out."""
    found: dict[str, list[str]] = {}
    for folder, kernels in KERNEL_SETS.items():
        if targets := targets_of(kernels, archs):
            flags = [*kernels.flags, *gencode(targets)]
            found |= {path.relative_to(ROOT).as_posix(): flags for path in sources_of(folder)}
    return dict(sorted(found.items()))


def nvcc_release() -> str:
    command = [f"{cuda_home()}/bin/nvcc", "--version"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.findall(r"release ([\d.]+)", printed)[-1]


def spilled_bytes(reports: dict[str, str]) -> dict[str, dict[str, int]]:
    """As SPILLS has it, from what ptxas -v printed of each source; its worst kernel counts."""
    found: dict[str, dict[str, int]] = {}
    for source, report in reports.items():
        arch, stem = "", Path(source).stem
        for name, stored in re.findall(r"for 'sm_(\w+)'|(\d+) bytes spill stores", report):
            arch = name or arch
            spilled = found.setdefault(arch, {})
            if int(stored or 0) > spilled.get(stem, 0):
                spilled[stem] = int(stored)
    return found


def excess_spills(
    found: dict[str, dict[str, int]], allowed: dict[str, dict[str, int]]
) -> dict[str, list[str]]:
    """By architecture, a line for each file that spills more than it may."""
    return {
        arch: [
            f"{stem}.cu, sm_{arch}: {spilled} bytes spilled, {limit} allowed"
            for stem, spilled in stems.items()
            if spilled > (limit := allowed.get(arch, {}).get(stem, 0))
        ]
        for arch, stems in found.items()
    }


def parallel_jobs(cuda: bool) -> str:
    """Compilations at a time: as many as there are cores, fewer where memory is short."""
    asked = os.environ.get("MAX_JOBS")
    if asked:
        return asked
    jobs = os.cpu_count() or 1
    if cuda:
        gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
        jobs = max(1, min(jobs, int(gib / GIB_PER_NVCC)))
    return str(jobs)


def cpu_sources() -> list[str]:
    """Sources relative to the project, sorted; off x86 only the generic kernels."""
    found = [*(ROOT / "csrc").glob("*.cpp"), *(ROOT / "csrc/cpu").glob("*.cpp")]
    relative = sorted(path.relative_to(ROOT).as_posix() for path in found)
    return [source for source in relative if IS_X86 or isa_of(source) in (None, "generic")]


class NinjaBuild(build_ext):
    """Compiles and links through one ninja file, with flags that depend on the source."""

    def build_extension(self, ext: Extension) -> None:
        # Imported here, so that asking for metadata or an sdist does not pay for loading torch.
        import ninja
        import torch
        from torch.utils import cpp_extension

        build_cuda, why, cure = decide_cuda(
            asked=os.environ.get("FLASH_ATTN_FORCE_CUDA", ""),
            torch_version=torch.__version__,
            torch_has_cuda=torch.version.cuda is not None,
            nvcc=cuda_home() is not None,
            gpu=has_nvidia_gpu(),
        )
        cuda = cuda_home() if build_cuda else None
        archs = cuda_archs() if cuda else []
        check_archs(archs)
        print(plan(ext.sources, archs, why, cure), file=sys.stderr, flush=True)

        includes = cpp_extension.include_paths()
        flags = [
            *CXX_FLAGS,
            "-I.",
            *(f"-isystem {path}" for path in includes),  # their warnings are not ours
            f"-ffile-prefix-map={includes[0]}=torch",  # no path of this machine in the library
        ]
        links = [
            *(f"-L{path}" for path in cpp_extension.library_paths()),
            *(f"-l{name}" for name in LIBRARIES),
        ]
        nvcc_flags = [*NVCC_FLAGS, "-I."]
        if os.environ.get("FLASH_ATTN_LINEINFO") == "1":
            nvcc_flags.append("-lineinfo")
        kernels = cuda_sources(archs)
        if cuda:
            present = [name for name in KERNEL_SETS if targets_of(KERNEL_SETS[name], archs)]
            defines = [f"-DFLASH_ATTN_WITH_{name.upper()}" for name in present]
            flags += [f"-DFLASH_ATTN_WITH_CUDA='\"{';'.join(archs)}\"'", *defines]
            flags.append(f"-isystem {cuda}/include")
            nvcc_flags += defines
            links += [f"-L{cuda}/lib64", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        library = OBJECTS / Path(self.get_ext_filename(ext.name)).name
        self.write_ninja_file(ext.sources, kernels, flags, nvcc_flags, links, library)
        jobs = parallel_jobs(cuda is not None)
        command = [os.path.join(ninja.BIN_DIR, "ninja"), "-f", str(OBJECTS / "build.ninja")]
        kept = {x: y for x, y in os.environ.items() if not re.fullmatch(r"NVCC_.*_FLAGS", x)}
        if subprocess.run([*command, "-j", jobs], cwd=ROOT, env=kept).returncode != 0:
            raise CompileError("the native library was not built; the compiler's message is above")
        if cuda:
            self.check_spills(list(kernels))

        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)  # a process that has the old one loaded keeps it
        shutil.copyfile(ROOT / library, target)

    def check_spills(self, sources: list[str]) -> None:
        """Refuses kernels that spill more than SPILLS allows; warns where nobody has measured.

        After ninja, not in its rule: all excesses show at once, and an edit of the list compiles
        nothing again.
        """
        logs = {source: (ROOT / OBJECTS / source).with_suffix(".o.ptxas") for source in sources}
        found = spilled_bytes({source: log.read_text() for source, log in logs.items()})
        release, listed = nvcc_release(), json.loads((ROOT / SPILLS).read_text())
        update = OBJECTS / SPILLS.name
        as_found = {"nvcc": release, "bytes": listed["bytes"] | found}
        (ROOT / update).write_text(json.dumps(as_found, indent=2) + "\n")
        refused: list[str] = []
        for arch, lines in excess_spills(found, listed["bytes"]).items():
            if release == listed["nvcc"] and arch in listed["bytes"]:
                refused += lines
            elif lines:
                heading = f"kernels spill registers (unmeasured for sm_{arch}, nvcc {release}):"
                self.warn("\n  ".join([heading, *lines]))
        if refused:
            cure = f"If it has to be, allow it: cp {update} {SPILLS}"
            raise CompileError("\n  ".join(["kernels spill registers:", *refused, cure]))

    @staticmethod
    def write_ninja_file(
        sources: list[str],
        kernels: dict[str, list[str]],
        flags: list[str],
        nvcc_flags: list[str],
        links: list[str],
        library: Path,
    ) -> None:
        """Writes OBJECTS/build.ninja; paths in it are relative to the project."""
        from ninja import ninja_syntax

        (ROOT / OBJECTS).mkdir(parents=True, exist_ok=True)
        with open(ROOT / OBJECTS / "build.ninja", "w", encoding="utf-8") as stream:
            writer = ninja_syntax.Writer(stream)
            writer.variable("builddir", OBJECTS.as_posix())
            writer.variable("cxx", os.environ.get("CXX") or "c++")
            writer.variable("flags", flags)
            writer.variable("nvcc", f"{cuda_home()}/bin/nvcc")
            writer.variable("nvcc_flags", nvcc_flags)
            writer.rule(
                "compile",
                "$cxx -MMD -MF $out.d $flags $isa_flags -c $in -o $out",
                description="compile $in",
                depfile="$out.d",
                deps="gcc",
            )
            # What ptxas says of every kernel goes to a file alone; errors, warnings and advisories,
            # which have a number in parentheses, to the terminal too.
            writer.rule(
                "compile_cuda",
                "$nvcc -MMD -MF $out.d $nvcc_flags $set_flags -c $in -o $out 2> $out.ptxas; "
                "status=$$?; "
                "grep -Ev '^ptxas info *: [^(]|bytes stack frame' $out.ptxas; exit $$status",
                description="compile $in",
                depfile="$out.d",
                deps="gcc",
            )
            writer.rule("link", "$cxx -shared $in -o $out $links", description="link $out")
            objects = []
            for source in sources:
                objects.append((OBJECTS / source).with_suffix(".o").as_posix())
                isa = isa_of(source)
                isa_flags = ISA_FLAGS[isa] if isa else []
                writer.build(objects[-1], "compile", source, variables={"isa_flags": isa_flags})
            for source, set_flags in kernels.items():
                objects.append((OBJECTS / source).with_suffix(".o").as_posix())
                writer.build(
                    objects[-1],
                    "compile_cuda",
                    source,
                    variables={"set_flags": set_flags},
                    implicit_outputs=f"{objects[-1]}.ptxas",
                )
            writer.build(library.as_posix(), "link", objects, variables={"links": links})
            writer.default(library.as_posix())


if __name__ == "__main__":  # imported, it is a list of settings: tests and benchmarks read them
    setup(
        ext_modules=[Extension("flash_attn._C", cpu_sources(), py_limited_api=True)],
        cmdclass={"build_ext": NinjaBuild},
        options={"bdist_wheel": {"py_limited_api": "cp{}{}".format(*MIN_PYTHON)}},
    )
