"""Times of one case: every implementation in turns, after its result was found right.

A turn is a median of triton.testing.do_bench, which empties the second-level cache before each
call: a layer finds its keys where the other layers left them. Each implementation first runs until
the clock has settled to what its own power allows: right after cuDNN's, which draws most, the same
kernel measured 3 to 8 % slower on an H200. Turns go forth and back, so that a drift meets all
alike; a ratio is the median over turns of the ratio within a turn.
Decode is timed as replays of a CUDA graph, as engines run it: the host takes longer than the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.bench_attention import quantile
from benchmarks.cases import Case
from benchmarks.gpu.attentions import OURS, Attention
from benchmarks.gpu.instruments import as_graph, do_bench

TURNS = 5

# Two 16-bit results of one problem differ by about 0.002 of their norm; one wrong tile of 64 rows
# in the longest case is 0.016 of it.
MAX_NORM_ERROR, MAX_ERROR = 0.01, 0.03

Clock = Callable[[Callable[[], Any]], float]


def disagreement(actual: Tensor, expected: Tensor) -> str:
    """Why a result is not the other one up to 16-bit rounding; empty when it is."""
    if actual.shape != expected.shape:
        return f"shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    elsewhere = actual.isfinite() != expected.isfinite()
    if elsewhere.any():
        return f"non-finite at {int(elsewhere.sum())} other places"
    truth = torch.where(expected.isfinite(), expected, 0.0).float()
    error = torch.where(expected.isfinite(), actual, 0.0).float() - truth
    norm = (error.norm() / truth.norm()).item()
    largest = (error.abs().max() / truth.abs().max()).item()
    if norm <= MAX_NORM_ERROR and largest <= MAX_ERROR:
        return ""
    return f"off by {norm:.2g} of the norm, {largest:.2g} of the largest value"


def prepare(
    attention: Attention, case: Case, tensors: tuple[Tensor, ...]
) -> tuple[Callable[[], Any], list[Tensor]]:
    """The call to be timed, and its results."""
    q, k, v, dout = tensors
    if case.kind == "backward":
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attention.dense(*leaves, case.causal)

        def backward() -> tuple[Tensor, ...]:
            return torch.autograd.grad(out, leaves, dout, retain_graph=True)

        return backward, list(backward())

    if case.kind == "decode":
        lengths = torch.full((case.b,), case.s_k, dtype=torch.int32, device=q.device)
        forward = partial(attention.decode, q, k, v, lengths)
    else:
        forward = partial(attention.dense, q, k, v, case.causal)
    results = [forward()]
    return as_graph(forward) if case.kind == "decode" else forward, results


def prepare_all(
    case: Case, candidates: list[Attention], tensors: tuple[Tensor, ...]
) -> tuple[dict[str, Callable[[], Any]], dict[str, str]]:
    """The calls whose results agree with the first peer's, and the reasons of those left out."""
    calls: dict[str, Callable[[], Any]] = {}
    missing: dict[str, str] = {}
    expected: list[Tensor] = []
    for attention in candidates:
        prepared, reason = attention.attempt(lambda a=attention: prepare(a, case, tensors))  # type: ignore[misc]
        if prepared is None:
            missing[attention.name] = reason
            continue
        call, results = prepared
        expected = expected or results
        wrong = [disagreement(*pair) for pair in zip(results, expected, strict=True)]
        if any(wrong):
            if attention.name in OURS:
                raise SystemExit(f"{case.name}: {attention.name} is wrong: {'; '.join(wrong)}")
            missing[attention.name] = f"another result: {'; '.join(wrong)}"
            continue
        calls[attention.name] = call
    return calls, missing


def time_case(
    case: Case,
    candidates: list[Attention],
    device: str = "cuda",
    clock: Clock = do_bench,
    turns_wanted: int = TURNS,
) -> dict[str, Any]:
    """One row of the record: microseconds (p20, p50, p80 of the turns), ratios, and what failed."""
    torch.manual_seed(0)
    tensors = tuple(  # q, k, v and dout
        torch.randn(x, device=device, dtype=case.dtype) for x in (*case.shapes, case.shapes[0])
    )
    with torch.set_grad_enabled(case.kind == "backward"):
        calls, missing = prepare_all(case, candidates, tensors)
        turns: list[dict[str, float]] = []
        running = [attention for attention in candidates if attention.name in calls]
        for _ in range(turns_wanted):
            turn = {}
            for attention in running:
                with attention.context():
                    turn[attention.name] = clock(calls[attention.name])
            turns.append(turn)
            running.reverse()

    def quantiles(values: list[float], digits: int) -> list[float]:
        return [round(quantile(values, p), digits) for p in (0.2, 0.5, 0.8)]

    def ratio(numerator: str, denominator: str) -> list[float] | None:
        if numerator not in calls or denominator not in calls:
            return None
        return quantiles([turn[numerator] / turn[denominator] for turn in turns], 4)

    return {
        "case": case.name,
        "kind": case.kind,
        "flops": case.flops(),
        "bytes": case.bytes(),
        "us": {
            attention.name: quantiles([1e3 * turn[attention.name] for turn in turns], 2)
            if attention.name in calls
            else None
            for attention in candidates
        },
        "speedup": ratio("sdpa_flash", "deterministic"),
        "price": ratio("deterministic", "standard"),
        "missing": missing,
    }
