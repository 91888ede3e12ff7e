"""The NVIDIA kernels compile, on a machine without a GPU too; skipped where there is no nvcc."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from setuptools import Distribution, Extension
from setuptools.errors import CompileError

import setup

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "csrc/instantiations"))
import generate  # noqa: E402

# One instantiation of every kernel, with features and without.
INSTANTIATIONS = [
    "sm80_forward_d64_bf16_decode_plain",
    "sm80_forward_d128_fp16_decode_features",
    "sm80_forward_d128_bf16_prefill_plain",
    "sm80_forward_d192_fp16_prefill_features",
    "sm80_backward_d128_walk_bf16_plain",
    "sm80_backward_d128_narrow_fp16_features",
    "sm80_backward_d192_queries_bf16_plain",
    "sm80_backward_d256_keys_fp16_features",
]
SOURCES = [f"csrc/instantiations/{name}.cu" for name in INSTANTIATIONS]
WITHOUT_KERNELS = ("backward", "backward_launch", "faults", "forward", "forward_plan", "kernels")
WITHOUT_KERNELS += ("multiprocessors",)
SOURCES += sorted(
    path.relative_to(ROOT).as_posix()
    for folder in ("gpu", "sm80")
    for path in (ROOT / "csrc" / folder).glob("*.cu")
)


SPILLS = json.loads((ROOT / setup.SPILLS).read_text())
NVCC = setup.cuda_home() and f"{setup.cuda_home()}/bin/nvcc"
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")


def test_instantiations_are_up_to_date():
    present = {path.name: path.read_text() for path in generate.FOLDER.glob("*.cu")}
    assert present == generate.files()


def test_spills_are_of_sources_that_exist():
    """A name left behind, or mistyped, would allow nothing and say nothing."""
    stems = {Path(source).stem for source in setup.cuda_sources(list(setup.CUDA_ARCHS))}
    assert {stem for of_arch in SPILLS["bytes"].values() for stem in of_arch} <= stems


def test_every_source_belongs_to_a_set():
    """One that does not would be missed when the library is loaded."""
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.cu")}
    assert set(setup.cuda_sources(list(setup.CUDA_ARCHS))) == found


@pytest.mark.parametrize(
    "targets, ptx",
    [
        (["80", "90"], "90"),
        (["80", "90a"], "80"),
        (["90a", "80", "100f"], "80"),
        (["90a"], None),
    ],
    ids=str,
)
def test_ptx_is_of_the_last_that_others_can_run(targets, ptx):
    sass = [f"-gencode=arch=compute_{target},code=sm_{target}" for target in targets]
    last = [f"-gencode=arch=compute_{ptx},code=compute_{ptx}"] if ptx else []
    assert setup.gencode(targets) == sass + last


@pytest.mark.parametrize("asked", ["80;90", "80;90a"])
def test_a_set_is_compiled_for_its_own_architectures(asked, tmp_path, monkeypatch):
    """A later set: for 90a where 9.0 is asked for, left out where it is not."""
    for name in ("sm80/fold.cu", "sm90/forward.cu", "instantiations/sm90_d64.cu"):
        (tmp_path / "csrc" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "csrc" / name).touch()
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setitem(setup.KERNEL_SETS, "sm90", setup.KernelSet(("90a",), ("-DWIDE",)))
    shared = {"csrc/sm80/fold.cu": setup.gencode(asked.split(";"))}
    own = ["-DWIDE", "-gencode=arch=compute_90a,code=sm_90a"]
    assert setup.cuda_sources(asked.split(";")) == shared | dict.fromkeys(
        ("csrc/sm90/forward.cu", "csrc/instantiations/sm90_d64.cu"), own
    )
    assert list(setup.cuda_sources(["80", "100"])) == ["csrc/sm80/fold.cu"]
    assert setup.cuda_sources([]) == {}


def test_architectures_come_from_the_environment_or_the_gpus(monkeypatch):
    monkeypatch.setenv("FLASH_ATTN_CUDA_ARCHS", " 80, 90a;80;")
    assert setup.cuda_archs() == ["80", "90a"]
    monkeypatch.setenv("FLASH_ATTN_CUDA_ARCHS", ";")
    for cards, archs in {
        (): list(setup.CUDA_ARCHS),
        ((10, 0), (9, 0), (10, 0)): ["90", "100"],
        ((7, 5), (8, 6)): ["86"],
    }.items():
        monkeypatch.setattr(torch.cuda, "is_available", lambda cards=cards: bool(cards))
        monkeypatch.setattr(torch.cuda, "device_count", lambda cards=cards: len(cards))
        monkeypatch.setattr(torch.cuda, "get_device_capability", cards.__getitem__)
        assert setup.cuda_archs() == archs


@needs_nvcc
def test_targets_that_nvcc_cannot_take_are_refused():
    setup.check_archs(["80", "90", "90a"])
    for arch in ("75", "9.0", "sm_90", "90b", "80a", "999"):
        with pytest.raises(CompileError, match=f"received '{arch}'; rule: .* from 80 on"):
            setup.check_archs(["80", arch])


CPU_TORCH, CUDA_TORCH = ("2.11.0+cpu", False), ("2.11.0+cu130", True)
NVCC_MISSING, ISOLATED = "put nvcc on PATH or set CUDA_HOME", "pip install --no-build-isolation"
# FLASH_ATTN_FORCE_CUDA, PyTorch, nvcc, an NVIDIA driver; whether the NVIDIA kernels are built, and
# the cures that are named. Without a cure the line is a calm one.
DECISIONS = {
    "nothing of NVIDIA's": ("", CPU_TORCH, False, False, False, ()),
    "nvcc alone": ("", CPU_TORCH, True, False, False, ()),
    "a GPU and a CPU build": ("", CPU_TORCH, True, True, False, (ISOLATED,)),
    "a GPU alone": ("", CPU_TORCH, False, True, False, (NVCC_MISSING, ISOLATED)),
    "a GPU without nvcc": ("", CUDA_TORCH, False, True, False, (NVCC_MISSING,)),
    "a CUDA build alone": ("", CUDA_TORCH, False, False, False, (NVCC_MISSING,)),
    "all": ("", CUDA_TORCH, True, True, True, ()),
    "all but a GPU": ("", CUDA_TORCH, True, False, True, ()),
    "left out on purpose": ("0", CUDA_TORCH, True, True, False, ()),
    "asked for": ("1", CPU_TORCH, True, False, True, ()),
}


@pytest.mark.parametrize(
    "asked, pytorch, nvcc, gpu, built, cures", DECISIONS.values(), ids=DECISIONS
)
def test_a_build_says_what_it_leaves_out(asked, pytorch, nvcc, gpu, built, cures):
    build_cuda, why, cure = setup.decide_cuda(asked, *pytorch, nvcc, gpu)
    assert build_cuda is built
    assert [named in cure for named in (NVCC_MISSING, ISOLATED)] == [
        named in cures for named in (NVCC_MISSING, ISOLATED)
    ]
    assert (f"FLASH_ATTN_FORCE_CUDA={asked}" if asked else pytorch[0]) in why
    sources = ["csrc/cpu/isa_avx2.cpp", "csrc/cpu/isa_generic.cpp", "csrc/cpu/plan.cpp"]
    said = setup.plan(sources, ["80", "90"] if built else [], why, cure)
    first, *rest = said.splitlines()
    assert first.endswith(": avx2, generic")
    text = " ".join(line.strip() for line in rest)
    assert why in text and cure in text
    if cures:
        assert rest[0] == rest[-1] == "*" * 80 and max(map(len, rest)) <= 80
        assert "WITHOUT its NVIDIA kernels" in text and "FLASH_ATTN_FORCE_CUDA=0" in text
    else:
        assert len(rest) == 1 and ("sm_80, sm_90" if built else "left out") in text


@pytest.mark.parametrize("asked, words", [("1", "needs nvcc"), ("TRUE", "0, 1 or unset")])
def test_what_cannot_be_built_is_refused(asked, words):
    with pytest.raises(CompileError, match=words):
        setup.decide_cuda(asked, *CUDA_TORCH, False, True)


def test_a_build_speaks_before_it_compiles(tmp_path, monkeypatch, capfd):
    """On a machine with a GPU and without nvcc, and with a compiler that fails."""
    monkeypatch.delenv("FLASH_ATTN_FORCE_CUDA", raising=False)
    monkeypatch.setenv("CXX", "false")
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    monkeypatch.setattr(setup, "cuda_home", lambda: None)
    monkeypatch.setattr(setup, "has_nvidia_gpu", lambda: True)
    (tmp_path / "isa_generic.cpp").touch()
    extension = Extension("flash_attn._C", ["isa_generic.cpp"], py_limited_api=True)
    command = setup.NinjaBuild(Distribution({"ext_modules": [extension]}))
    command.build_lib = str(tmp_path / "lib")
    command.ensure_finalized()
    with pytest.raises(CompileError, match="was not built"):
        command.build_extension(extension)
    said = capfd.readouterr().err
    assert ": generic\n" in said
    assert "WITHOUT its NVIDIA kernels" in said and torch.__version__ in said


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES, ids=lambda source: Path(source).stem)
def test_kernel_compiles_within_its_registers(source, tmp_path):
    command = [NVCC, *setup.NVCC_FLAGS, "-I.", "-c", source, "-o", str(tmp_path / "o.o")]
    command += setup.cuda_sources(list(SPILLS["bytes"]))[source]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = setup.spilled_bytes({source: result.stderr})
    has_kernels = Path(source).stem not in WITHOUT_KERNELS
    assert found.keys() == (SPILLS["bytes"].keys() if has_kernels else set())
    assert not any(setup.excess_spills(found, SPILLS["bytes"]).values())
    assert "C7510" not in result.stderr


# 96 values that are all needed at once, in 64 registers; a warning of nvcc's that must be seen.
SPILLING = """
#if defined(FLAG_FROM_OUTSIDE)
#error
#endif
__global__ void __launch_bounds__(1024) control(float* x) {
  int unused;
  float value[96];
#pragma unroll
  for (int i = 0; i < 96; ++i) value[i] = x[i * 1024 + threadIdx.x];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 96; ++i) x[i * 1024 + threadIdx.x] = value[i] * value[(i + 1) % 96];
}
"""


@pytest.fixture
def build(tmp_path, monkeypatch):
    """build(list of spills): setup.py's build of a tree with one kernel, for sm_90; the library."""
    monkeypatch.setenv("FLASH_ATTN_FORCE_CUDA", "1")
    monkeypatch.setenv("FLASH_ATTN_CUDA_ARCHS", "90")
    monkeypatch.setenv("FLASH_ATTN_LINEINFO", "1")
    monkeypatch.setenv("NVCC_APPEND_FLAGS", "-DFLAG_FROM_OUTSIDE")
    folder = tmp_path / "csrc/instantiations"
    folder.mkdir(parents=True)
    (folder / "sm80_control.cu").write_text(SPILLING)
    monkeypatch.setattr(setup, "ROOT", tmp_path)
    extension = Extension("flash_attn._C", [], py_limited_api=True)
    command = setup.NinjaBuild(Distribution({"ext_modules": [extension]}))
    command.build_lib = str(tmp_path / "lib")
    command.ensure_finalized()

    def run(spills):
        (folder / "spills.json").write_text(json.dumps(spills))
        command.build_extension(extension)
        return Path(command.get_ext_fullpath("flash_attn._C"))

    return run


@needs_nvcc
def test_control_a_spill_fails_the_build(build, tmp_path, capfd, caplog):
    """Refused beyond what is listed, built within it; told where nobody has measured."""
    release = setup.nvcc_release()
    with pytest.raises(CompileError) as refused:
        build({"nvcc": release, "bytes": {"80": {"other": 4}, "90": {}}})
    as_found = json.loads((tmp_path / "build/objects/spills.json").read_text())
    spilled = as_found["bytes"]["90"]["sm80_control"]
    assert as_found == {
        "nvcc": release,
        "bytes": {"80": {"other": 4}, "90": {"sm80_control": spilled}},
    }
    line = f"sm80_control.cu, sm_90: {spilled} bytes spilled, 0 allowed"
    assert line in str(refused.value)
    assert "cp build/objects/spills.json csrc/instantiations/spills.json" in str(refused.value)
    assert not list(tmp_path.glob("lib/**/*.so"))
    printed = capfd.readouterr().out
    assert '"unused" was declared' in printed and "ptxas info" not in printed

    with pytest.raises(CompileError, match=f"{spilled - 1} allowed"):
        build({"nvcc": release, "bytes": {"90": {"sm80_control": spilled - 1}}})
    assert build(as_found).exists()
    written = (tmp_path / "build/objects/build.ninja").read_text().split()
    assert {*setup.gencode(["90"]), "-DFLASH_ATTN_WITH_SM80", "-lineinfo"} <= set(written)
    assert line not in caplog.text
    for spills in ({"nvcc": release, "bytes": {"80": {}}}, {"nvcc": "1.0", "bytes": {"90": {}}}):
        caplog.clear()
        assert build(spills).exists()
        assert line in caplog.text
    assert "compile" not in capfd.readouterr().out, "an edit of the list compiles nothing again"
