"""What both packages called flash_attn are measured on; run by benchmarks.patched_upstream.

    python -m benchmarks.gpu.either_package FOLDER [LIBRARY]

FOLDER holds the package; LIBRARY is the extension module of one that is not installed, of which a
reduced build lacks functions that nobody calls here. Prints one line of JSON: calls that gave other
bytes in a smaller batch, microseconds, and mebibytes, with the mode on and off.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.instruments import as_graph, beyond_results, do_bench

MODES = {"deterministic": True, "standard": False}
HEAD_DIMS, DTYPES = (64, 128), (torch.float16, torch.bfloat16)
TURNS = 5

# b s_q s_k h_q h_kv d, causal: the points at which earlier attempts were measured, and decode.
TIMED = [
    ("prefill", 8, 4096, 4096, 32, 32, 64, True),
    ("prefill", 4, 2048, 2048, 32, 32, 64, True),
    ("decode", 1, 1, 8192, 32, 8, 128, False),
    ("decode", 8, 1, 8192, 32, 8, 128, False),
    ("decode", 64, 1, 8192, 32, 8, 128, False),
]
MEMORY = ("prefill", 4, 2048, 2048, 32, 32, 64, True)
LENGTHS = (5000, 1, 1024, 1025, 3333, 4096, 77, 2048)  # of eight sequences in a cache


def load(folder: str, library: str | None) -> Any:
    """The package in `folder`. Symbols that are not there are looked for when they are called."""
    if library:
        before = sys.getdlopenflags()
        sys.setdlopenflags(os.RTLD_LAZY)
        spec = importlib.util.spec_from_file_location("flash_attn_2_cuda", library)
        assert spec and spec.loader, library
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules["flash_attn_2_cuda"] = module
        sys.setdlopenflags(before)
    sys.path[0] = folder  # instead of this project's
    with contextlib.redirect_stdout(io.StringIO()):
        import flash_attn
    where = os.path.realpath(flash_attn.__file__)
    if not where.startswith(os.path.realpath(folder) + os.sep):
        raise SystemExit(f"flash_attn comes from {where}, not from {folder}")
    return flash_attn


def batched_calls(package: Any, d: int, dtype: torch.dtype) -> dict[str, Any]:
    """By name, calls on sequences [begin, end) of a batch of eight: out and lse."""
    torch.manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, d, device="cuda", dtype=dtype)

    def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Any:
        def call(begin: int, end: int) -> list[Tensor]:
            part = (x[begin:end].contiguous() for x in (q, k, v))
            out, lse, _ = package.flash_attn_func(*part, causal=causal, return_attn_probs=True)
            return [out, lse]

        return call

    def cached(q: Tensor, new: int) -> Any:
        cache, fresh = draw(2, 8, 6144, 2), draw(2, 8, max(new, 1), 2)
        lengths = torch.tensor(LENGTHS, dtype=torch.int32, device="cuda")

        def call(begin: int, end: int) -> list[Tensor]:
            k, v, k_new, v_new = (x[begin:end].clone() for x in (*cache, *fresh))
            out, lse = package.flash_attn_with_kvcache(
                q[begin:end].contiguous(),
                *(k, v),
                *((k_new, v_new) if new else (None, None)),
                cache_seqlens=lengths[begin:end].contiguous(),
                causal=True,
                return_softmax_lse=True,
            )
            return [out, lse]

        return call

    def packed(q: Tensor, k: Tensor, v: Tensor) -> Any:
        def call(begin: int, end: int) -> list[Tensor]:
            ends = torch.tensor([0, *LENGTHS[begin:end]]).cumsum(0)
            first = sum(LENGTHS[:begin])
            part = (x[first : first + int(ends[-1])].contiguous() for x in (q, k, v))
            cu, longest = ends.to("cuda", torch.int32), max(LENGTHS[begin:end])
            out, lse, _ = package.flash_attn_varlen_func(
                *part, cu, cu, longest, longest, causal=True, return_attn_probs=True
            )
            return [out, lse.transpose(0, 1)]  # (tokens, h): tokens of packs lie behind each other

        return call

    tokens = sum(LENGTHS)
    return {
        "prefill, packed": packed(draw(tokens, 4), draw(tokens, 2), draw(tokens, 2)),
        "prefill, dense": dense(draw(8, 1500, 4), draw(8, 1500, 2), draw(8, 1500, 2), True),
        "decode, dense": dense(draw(8, 1, 8), draw(8, 5000, 2), draw(8, 5000, 2), False),
        "prefill, kvcache": cached(draw(8, 300, 8), 300),
        "decode, kvcache": cached(draw(8, 1, 8), 0),
        "decode and append, kvcache": cached(draw(8, 1, 8), 1),
    }


def other_bytes(call: Any) -> int:
    """Bytes in which 4 + 4 and eight single sequences differ from the batch of eight."""
    whole = call(0, 8)
    count = 0
    for size in (4, 1):
        parts = [call(begin, begin + size) for begin in range(0, 8, size)]
        for index, expected in enumerate(whole):
            joined = torch.cat([part[index] for part in parts])
            different = joined.contiguous().view(torch.uint8) != expected.contiguous().view(
                torch.uint8
            )
            count += int(different.sum())
    return count


def compare_batches(package: Any) -> list[dict[str, Any]]:
    rows = []
    for d in HEAD_DIMS:
        for dtype in DTYPES:
            for name, call in batched_calls(package, d, dtype).items():
                row: dict[str, Any] = {"call": name, "d": d, "dtype": str(dtype).split(".")[1]}
                for mode, enabled in MODES.items():
                    package.set_deterministic(enabled)
                    row[mode] = other_bytes(call)
                rows.append(row)
    return rows


def refusals(package: Any) -> dict[str, bool]:
    """Whether the mode refuses what it cannot honour, by its own words."""
    q = torch.randn(1, 64, 2, 64, device="cuda", dtype=torch.float16, requires_grad=True)

    def refuses(action: Any) -> bool:
        try:
            action()
        except RuntimeError as error:
            return "deterministic mode" in str(error)
        return False

    package.set_deterministic(True)
    with torch.enable_grad():
        out = package.flash_attn_func(q, q, q)
        return {
            "dropout": refuses(lambda: package.flash_attn_func(q, q, q, dropout_p=0.1)),
            "backward": refuses(out.sum().backward),
        }


def problem(case: tuple[Any, ...]) -> tuple[Tensor, ...]:
    _, b, s_q, s_k, h_q, h_kv, d, _ = case
    torch.manual_seed(0)
    dtype = torch.float16 if s_q > 1 else torch.bfloat16
    shapes = ((b, s_q, h_q, d), (b, s_k, h_kv, d), (b, s_k, h_kv, d))
    return tuple(torch.randn(*shape, device="cuda", dtype=dtype) for shape in shapes)


def prepare(package: Any, case: tuple[Any, ...]) -> Any:
    """The call of a case, and its result checked against PyTorch's."""
    q, k, v = problem(case)
    lengths = torch.full((q.shape[0],), k.shape[1], dtype=torch.int32, device="cuda")

    def call() -> Tensor:
        result: Tensor = (
            package.flash_attn_func(q, k, v, causal=case[7])
            if case[0] == "prefill"
            else package.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)
        )
        return result

    def check() -> None:
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        expected = torch.nn.functional.scaled_dot_product_attention(
            *heads_first, is_causal=case[7], enable_gqa=True
        ).transpose(1, 2)
        error = (call().float() - expected.float()).norm() / expected.float().norm()
        if not error <= 0.01:
            raise SystemExit(f"{case}: off by {error:.2g} of the norm")

    return call, check


def time_cases(package: Any) -> list[dict[str, Any]]:
    rows = []
    for case in TIMED:
        call, check = prepare(package, case)
        runs: dict[str, Any] = {}
        for mode, enabled in MODES.items():
            package.set_deterministic(enabled)
            check()
            runs[mode] = as_graph(call)  # as engines decode: the host is not measured
        times: dict[str, list[float]] = {mode: [] for mode in MODES}
        for _ in range(TURNS):
            for mode, replay in runs.items():
                times[mode].append(1e3 * do_bench(replay))
        rows.append({"case": case} | {m: round(sorted(t)[TURNS // 2], 1) for m, t in times.items()})
    return rows


def scratch(package: Any) -> dict[str, float]:
    """Mebibytes by mode."""
    found = {}
    call, _ = prepare(package, MEMORY)
    for mode, enabled in MODES.items():
        package.set_deterministic(enabled)
        found[mode] = beyond_results(lambda: (call(),))
    return found


def main(folder: str, library: str | None = None) -> None:
    package = load(folder, library)
    with torch.no_grad():
        record = {
            "batches": compare_batches(package),
            "refused": refusals(package),
            "times": time_cases(package),
            "memory": {"case": MEMORY, "mib": scratch(package)},
        }
    print(json.dumps(record))


if __name__ == "__main__":
    main(*sys.argv[1:])
