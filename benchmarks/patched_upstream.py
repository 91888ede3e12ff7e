"""flash-attn 2.8.3 with the patches of patches/, beside this package, on one GPU.

    python -m benchmarks.patched_upstream flash_attn-2.8.3.tar.gz
    python -m benchmarks.patched_upstream --render results/<gpu>/patched_upstream.json

Patches the sources, compiles what the measurement needs of them (the forward pass at head dims 64
and 128, fp16 and bf16; no ALiBi, softcap or window) for this machine's GPU and torch, and
asks both packages for the same: whether a batch of 8 has the bytes of 4 + 4 and of 1, with the mode
on and off, and what the mode costs. Writes results/<gpu>/patched_upstream.json.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.child import answer_of
from benchmarks.records import (
    ROOT,
    gpu_provenance,
    origin,
    read_record,
    results_path,
    write_record,
)
from patches import apply

LEFT_OUT = ("ALIBI", "SOFTCAP", "LOCAL", "UNEVEN_K")


def digest_of_patches() -> str:
    """SHA-256 over what the patched files must become: which patches were measured."""
    return apply.digest("".join(patch.after for patch in apply.PATCHES).encode())


def sources(tree: Path) -> list[Path]:
    """The binding, and the kernels of head dims 64 and 128."""
    folder = tree / "csrc/flash_attn"
    kernels = [
        path
        for d in (64, 128)
        for path in sorted((folder / "src").glob(f"flash_fwd_*hdim{d}_*.cu"))
    ]
    return [folder / "flash_api.cpp", *kernels]


def build(tree: Path, objects: Path) -> Path:
    """The reduced extension module, compiled side by side."""
    import torch
    from torch.utils import cpp_extension
    from tqdm.auto import tqdm

    arch = "".join(map(str, torch.cuda.get_device_capability()))
    includes = [tree / "csrc/flash_attn", tree / "csrc/flash_attn/src"]
    includes += [tree / "csrc/cutlass/include", Path(sysconfig.get_paths()["include"])]
    includes += map(Path, cpp_extension.include_paths("cuda"))
    shared = ["-O3", "-std=c++17", "-DTORCH_EXTENSION_NAME=flash_attn_2_cuda"]
    shared += [f"-DFLASHATTENTION_DISABLE_{name}" for name in LEFT_OUT]
    shared += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"]
    shared += [f"-I{path}" for path in includes]
    nvcc = ["--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math", "-w"]
    nvcc += [f"-U__CUDA_NO_{name}__" for name in ("HALF_OPERATORS", "HALF_CONVERSIONS")]
    nvcc += [f"-U__CUDA_NO_{name}__" for name in ("HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")]
    nvcc += [f"-gencode=arch=compute_{arch},code=sm_{arch}", "-Xcompiler=-fPIC"]
    compiler = str(Path(cpp_extension.CUDA_HOME or "/usr/local/cuda") / "bin/nvcc")

    def compile_one(source: Path) -> Path:
        to = objects / f"{source.stem}.o"
        host = source.suffix == ".cpp"
        command = ["c++", "-w", "-fPIC"] if host else [compiler, *nvcc]
        done = subprocess.run(
            [*command, *shared, "-c", str(source), "-o", str(to)], capture_output=True, text=True
        )
        if done.returncode != 0:
            raise SystemExit(f"{source.name} does not compile:\n{done.stderr[-3000:]}")
        return to

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compile_one, source) for source in sources(tree)]
        compiled = [
            str(job.result()) for job in tqdm(as_completed(jobs), total=len(jobs), unit="file")
        ]
    library = objects / "flash_attn_2_cuda.so"
    names = ("c10", "c10_cuda", "torch", "torch_cpu", "torch_cuda", "torch_python")
    links = [f"-L{path}" for path in cpp_extension.library_paths("cuda")]
    links += [*(f"-l{name}" for name in names), "-lcudart", "-Wl,-z,lazy"]
    subprocess.run(["c++", "-shared", *compiled, "-o", str(library), *links], check=True)
    return library


def measure(folder: Path, library: Path | None = None) -> dict[str, Any]:
    """What either_package.py finds, in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.gpu.either_package", str(folder)]
    command += [str(library)] if library else []
    found: dict[str, Any] = answer_of(command, str(folder))
    return found


def named(case: list[Any]) -> str:
    kind, b, s_q, s_k, h_q, h_kv, d, causal = case
    return f"{kind} b{b}-q{s_q}-k{s_k}-h{h_q}.{h_kv}-d{d}{'-causal' if causal else ''}"


def failures(record: dict[str, Any]) -> list[str]:
    """What falls short of the promise: a batch that shows with the mode on, a dead control."""
    wrong = []
    for name in ("patched", "ours"):
        for row in record[name]["batches"]:
            where = f"{name}, {row['call']}, d={row['d']}, {row['dtype']}"
            if row["deterministic"]:
                wrong.append(f"{where}: {row['deterministic']} other bytes with the mode on")
    for name, refused in record["patched"]["refused"].items():
        if not refused:
            wrong.append(f"patched, {name}: not refused with the mode on")
    upstream = record["patched"]["batches"]
    for call in sorted({row["call"] for row in upstream if "decode" in row["call"]}):
        if not any(row["standard"] for row in upstream if row["call"] == call):
            wrong.append(f"patched, {call}: the control has the same bytes with the mode off")
    return wrong


def render(record: dict[str, Any]) -> str:
    patched, ours = record["patched"], record["ours"]
    lines = [
        f"{origin(record)}: {record['source']}, patched, and this package.",
        "",
        "| 8 = 4 + 4 = 1: bytes that differ, d 64 and 128, fp16 and bf16 "
        "| patched, on | patched, off | this package, on |",
        "|---|---|---|---|",
    ]
    for call in dict.fromkeys(row["call"] for row in patched["batches"]):
        on, off, mine = (
            sum(row[mode] for row in side["batches"] if row["call"] == call)
            for side, mode in (
                (patched, "deterministic"),
                (patched, "standard"),
                (ours, "deterministic"),
            )
        )
        lines.append(f"| {call} | {on:,} | {off:,} | {mine:,} |")
    lines += [
        "",
        "| microseconds (medians, CUDA graphs) | patched, off | patched, on | on / off "
        "| this package, on | patched, on / this package |",
        "|---|---|---|---|---|---|",
    ]
    for theirs, mine in zip(patched["times"], ours["times"], strict=True):
        off, on, own = theirs["standard"], theirs["deterministic"], mine["deterministic"]
        lines.append(
            f"| {named(theirs['case'])} | {off:g} | {on:g} | {on / off:.2f} | {own:g} "
            f"| {on / own:.2f} |"
        )
    mib, own_mib = patched["memory"]["mib"], ours["memory"]["mib"]
    lines += [
        "",
        "| scratch MiB | patched, off | patched, on | this package, on |",
        "|---|---|---|---|",
        f"| {named(patched['memory']['case'])} | {mib['standard']:g} | {mib['deterministic']:g} "
        f"| {own_mib['deterministic']:g} |",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path, nargs="?", help="the source archive")
    parser.add_argument("--render", type=Path, help="print the tables of a recorded run and stop")
    options = parser.parse_args(arguments)
    if options.render:
        print(render(read_record(options.render)))
        return 0
    if options.source is None:
        parser.error("names no source archive")
    import torch

    if not torch.cuda.is_available():
        parser.error("needs a GPU; --render prints what was measured on one")
    with tempfile.TemporaryDirectory() as folder:
        tree = apply.unpack(options.source, Path(folder))
        apply.apply(tree)
        patched = measure(tree, build(tree, Path(folder)))
    record = gpu_provenance("python -m benchmarks.patched_upstream")
    record |= {"source": apply.DIGESTS["source"], "patches": digest_of_patches()}
    record |= {"patched": patched, "ours": measure(ROOT)}
    print(render(record))
    path = results_path(record, "patched_upstream.json")
    write_record(path, record)
    print(f"\nrecorded in {path}")
    wrong = failures(record)
    print("\n".join(wrong))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
