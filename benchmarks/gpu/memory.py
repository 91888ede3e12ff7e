"""Memory that a call takes for itself: the allocator's peak beyond inputs and outputs."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.attentions import Attention
from benchmarks.gpu.cases import MemoryCase
from benchmarks.gpu.instruments import beyond_results


def forward(attention: Attention, case: MemoryCase, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The forward pass of a case."""
    if not case.lengths:
        return attention.dense(q, k, v, case.shape.causal)
    if attention.packed is None:
        raise NotImplementedError("has no packed batches")
    ends = [0, *itertools.accumulate(case.lengths)]
    cu_seqlens = torch.tensor(ends, dtype=torch.int32, device=q.device)
    return attention.packed(q, k, v, cu_seqlens, max(case.lengths))


def scratch(attention: Attention, case: MemoryCase, tensors: tuple[Tensor, ...]) -> float:
    q, k, v = tensors
    if not case.backward:
        with torch.no_grad():
            return beyond_results(lambda: (forward(attention, case, q, k, v),))
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out = forward(attention, case, *leaves)
    dout = torch.ones_like(out)
    return beyond_results(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))


def measure_memory(
    case: MemoryCase, candidates: list[Attention], device: str = "cuda"
) -> dict[str, Any]:
    """One row of the record."""
    shape = case.shape
    sizes = shape.shapes
    if case.lengths:
        sizes = tuple((sum(case.lengths), *size[2:]) for size in sizes)
    tensors = tuple(torch.zeros(size, dtype=shape.dtype, device=device) for size in sizes)
    mib: dict[str, float | None] = {}
    missing: dict[str, str] = {}
    for attention in candidates:
        mib[attention.name], reason = attention.attempt(
            lambda a=attention: scratch(a, case, tensors)  # type: ignore[misc]
        )
        if reason:
            missing[attention.name] = reason
        torch.cuda.empty_cache()  # the next one's copies may need the room in one piece
    packed = f"-packed{len(case.lengths)}" if case.lengths else ""
    return {
        "case": shape.name.removeprefix("memory-") + packed,
        "why": case.why,
        "backward": case.backward,
        "mib": mib,
        "missing": missing,
    }
