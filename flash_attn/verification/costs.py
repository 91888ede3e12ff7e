"""What determinism costs: time and peak memory of both modes, with PyTorch's attention beside.

The reference points are memory at (b=4, s=2048, h=32, d=64) and time at (b=8, s=4096, h=32, d=64),
causal. A CPU gets them scaled down in batch and heads, which changes neither ratio: every head does
the same work.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .. import determinism
from .. import flash_attn_interface as interface
from .child import output_of, start_python

MODES = ("standard", "deterministic", "pytorch")


@dataclass(frozen=True)
class Shape:
    """A causal self-attention problem: q, k, v (b, s, h, d)."""

    b: int
    s: int
    h: int
    d: int

    def __str__(self) -> str:
        return f"(b={self.b}, s={self.s}, h={self.h}, d={self.d})"


MEMORY_POINT = Shape(b=4, s=2048, h=32, d=64)
TIME_POINT = Shape(b=8, s=4096, h=32, d=64)
DECODE_POINT = Shape(b=1, s=16384, h=32, d=64)  # one query against s keys: where splitting matters


def scaled(point: Shape, heads: int, effort: str, device: str) -> Shape:
    """The point itself on a GPU and for "full"; else one sequence, and at most `heads` heads."""
    if torch.device(device).type == "cuda" or effort == "full":
        return point
    return replace(point, b=1, h=min(point.h, heads))


def time_rows(effort: str, device: str) -> list[dict[str, Any]]:
    """Milliseconds, the modes taking turns so that a busy moment hits all of them."""
    quick = effort == "quick"
    shape = scaled(TIME_POINT, 1 if quick else 8, effort, device)
    one_query = scaled(DECODE_POINT, 8 if quick else 32, effort, device)
    seconds = {"quick": 1.0, "default": 5.0, "full": 60.0}[effort]
    forward, both = _calls(shape, shape.s, device, backward=False), _calls(shape, shape.s, device)
    decode = _calls(one_query, 1, device, backward=False)
    return [
        _timed(f"forward {shape}", forward, seconds, device),
        _timed(f"forward + backward {shape}", both, seconds, device),
        _timed(f"decode {one_query}", decode, seconds, device),
    ]


def memory_rows(effort: str, device: str) -> list[dict[str, Any]]:
    """Peak mebibytes beyond the inputs, each mode in a process of its own."""
    shape = scaled(MEMORY_POINT, 16 if effort == "quick" else 32, effort, device)
    children = {
        mode: start_python(
            f"from {__name__} import print_peaks; print_peaks()",
            [json.dumps({"shape": asdict(shape), "mode": mode, "device": device})],
            {},
        )
        for mode in MODES
    }
    peaks = {mode: json.loads(output_of(child)) for mode, child in children.items()}
    rows: list[dict[str, Any]] = []
    for what in ("forward", "forward + backward"):
        found = {mode: peaks[mode][what] for mode in MODES}
        known = found["standard"] and found["deterministic"]
        ratio = found["deterministic"] / found["standard"] if known else None
        rows.append({"what": f"{what} {shape}", "unit": "MiB", **found, "ratio": ratio})
    return rows


def _tensors(shape: Shape, s_q: int, device: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(
            *(shape.b, rows, shape.h, shape.d),
            generator=generator,
            dtype=torch.float32,
            device="cpu",
        ).to(device, dtype)
        for rows in (s_q, shape.s, shape.s, s_q)
    )
    return q, k, v, dout


def _attention(mode: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention over (b, s, h, d); a single query sees every key."""
    causal = q.shape[1] > 1
    if mode == "pytorch":
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal
        ).transpose(1, 2)
    with determinism.deterministic(mode == "deterministic"):
        if causal:
            out = interface.flash_attn_func(q, k, v, causal=True)
        else:
            out = interface.flash_attn_with_kvcache(q, k, v, cache_seqlens=k.shape[1])
    assert isinstance(out, Tensor)  # nothing but out was asked for
    return out


def _calls(
    shape: Shape, s_q: int, device: str, backward: bool = True
) -> dict[str, Callable[[], None]]:
    q, k, v, dout = _tensors(shape, s_q, device)

    def call(mode: str) -> None:
        if not backward:
            with torch.no_grad():
                _attention(mode, q, k, v)
            return
        leaves = [tensor.detach().requires_grad_() for tensor in (q, k, v)]
        torch.autograd.grad(_attention(mode, *leaves), leaves, dout)

    return {mode: lambda mode=mode: call(mode) for mode in MODES}  # type: ignore[misc]


def _timed(
    what: str, calls: dict[str, Callable[[], None]], seconds: float, device: str
) -> dict[str, Any]:
    """Medians over turns, 5 to 50 of them; the ratio is the median of the ratios within a turn."""
    turns: list[dict[str, float]] = []
    end = time.perf_counter() + seconds
    while len(turns) <= 5 or (len(turns) <= 50 and time.perf_counter() < end):
        turn = {}
        for mode, call in calls.items():
            _synchronize(device)
            start = time.perf_counter()
            call()
            _synchronize(device)
            turn[mode] = (time.perf_counter() - start) * 1e3
        turns.append(turn)
    del turns[0]  # it warmed up
    medians = {mode: statistics.median(turn[mode] for turn in turns) for mode in calls}
    ratio = statistics.median(turn["deterministic"] / turn["standard"] for turn in turns)
    return {"what": what, "unit": "ms", **medians, "ratio": ratio}


def _synchronize(device: str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)


def print_peaks() -> None:
    """In the child: the request is the first argument, the peaks are printed as JSON."""
    request = json.loads(sys.argv[1])
    mode, device, shape = request["mode"], request["device"], Shape(**request["shape"])
    for call in _calls(Shape(b=1, s=64, h=1, d=64), 64, device).values():
        call()  # threads and code pages exist before anything is measured
    peaks: dict[str, float | None] = {}
    for what, backward in (("forward", False), ("forward + backward", True)):
        call = _calls(shape, shape.s, device, backward)[mode]
        before = _reset_peak(device)
        call()
        peak = _peak(device)
        peaks[what] = None if before is None else (peak - before) / 2**20
    print(json.dumps(peaks))


def _reset_peak(device: str) -> int | None:
    """Bytes in use now, from which the next peak counts; None where the system cannot say."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    try:
        Path("/proc/self/clear_refs").write_text("5")  # Linux: set the high-water mark to now
    except OSError:
        return None
    return _peak(device)


def _peak(device: str) -> int:
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage: a child inherits the maximum of the process that started it.
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
