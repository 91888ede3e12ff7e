"""Sequences brought to the public functions: as a dense batch, packed, in a cache, in pages.

Every function takes the sequences of one call and returns each one's results as tensors of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import determinism
from .. import flash_attn_interface as interface
from ..testing import cumulative_lengths, padded_rows, page_table, paged_rows
from .problem import Problem, Sequence

Results = dict[str, Tensor]  # out (s_q, h_q, d), lse (h_q, s_q); or dq, dk, dv

# One query length per call, and keys that sit in a cache.
CACHE_LAYOUTS = ("kvcache", "paged", "leftpad", "batch_idx")
# A cache to which this very call appends the keys of its own queries.
APPEND_LAYOUTS = ("append", "append_paged")
PACKED_LAYOUTS = ("varlen", "varlen_paged", "seqused")
LAYOUTS = ("dense", *PACKED_LAYOUTS, *CACHE_LAYOUTS, *APPEND_LAYOUTS)


def _options(problem: Problem, group: list[Sequence]) -> dict[str, Any]:
    slopes = [s.slopes for s in group if s.slopes is not None]
    return {
        "dropout_p": problem.dropout_p,
        "softmax_scale": problem.softmax_scale,
        "causal": problem.causal,
        "window_size": problem.window_size,
        "softcap": problem.softcap,
        "alibi_slopes": torch.stack(slopes) if slopes else None,  # (b, h_q)
    }


def _lengths(group: list[Sequence]) -> dict[str, Any]:
    queries, keys = [s.s_q for s in group], [s.s_k for s in group]
    device = group[0].q.device
    return {
        "cu_seqlens_q": cumulative_lengths(queries, device),
        "cu_seqlens_k": cumulative_lengths(keys, device),
        "max_seqlen_q": max(queries),
        "max_seqlen_k": max(keys),
    }


def _unstack(out: Tensor, lse: Tensor) -> list[Results]:
    return [{"out": o, "lse": l} for o, l in zip(out, lse, strict=True)]


def _unpack(group: list[Sequence], out: Tensor, lse: Tensor) -> list[Results]:
    queries = [s.s_q for s in group]
    parts = zip(out.split(queries), lse.split(queries, dim=1), strict=True)
    return [{"out": o, "lse": l} for o, l in parts]


def dense_forward(problem: Problem, group: list[Sequence]) -> list[Results]:
    q, k, v = (torch.stack([getattr(s, name) for s in group]) for name in "qkv")
    out, lse, _ = interface.flash_attn_func(
        q, k, v, **_options(problem, group), return_attn_probs=True
    )
    return _unstack(out, lse)


def _packed_inputs(
    problem: Problem, group: list[Sequence], layout: str, fill: float, page_seed: int
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    q = torch.cat([s.q for s in group])
    if layout == "varlen":
        return q, torch.cat([s.k for s in group]), torch.cat([s.v for s in group]), {}
    table, num_pages = page_table(
        [s.s_k for s in group], problem.page_size, seed=page_seed, device=q.device
    )
    k, v = (
        paged_rows(
            [getattr(s, name) for s in group], table, num_pages, problem.page_size, fill=fill
        )
        for name in "kv"
    )
    return q, k, v, {"block_table": table}


def packed_forward(
    problem: Problem, group: list[Sequence], layout: str, fill: float, page_seed: int
) -> list[Results]:
    q, k, v, extra = _packed_inputs(problem, group, layout, fill, page_seed)
    out, lse, _ = interface.flash_attn_varlen_func(
        q, k, v, **_lengths(group), **_options(problem, group), **extra, return_attn_probs=True
    )
    return _unpack(group, out, lse)


def seqused_forward(problem: Problem, group: list[Sequence], fill: float) -> list[Results]:
    """A pack with unused rows behind every sequence, as the low-level op takes it (`seqused_k`)."""
    gap = 5  # odd, so that no sequence starts where a block would
    q = torch.cat([s.q for s in group])
    k, v = (
        torch.cat([padded_rows([getattr(s, name)], s.s_k + gap, fill=fill)[0] for s in group])
        for name in "kv"
    )
    lengths = _lengths(group)
    lengths["cu_seqlens_k"] = cumulative_lengths([s.s_k + gap for s in group], q.device)
    lengths["max_seqlen_k"] += gap
    options = _options(problem, group)
    window = options.pop("window_size")
    if options["softmax_scale"] is None:
        options["softmax_scale"] = problem.d**-0.5
    # The low-level op takes head dims of whole eights; columns of zeros change no other bit.
    d, eights = problem.d, -problem.d % 8
    out, lse, _, _ = interface._flash_attn_varlen_forward(
        *(torch.nn.functional.pad(x, (0, eights)) for x in (q, k, v)),
        **lengths,
        **options,
        window_size_left=window[0],
        window_size_right=window[1],
        seqused_k=torch.tensor([s.s_k for s in group], dtype=torch.int32, device=q.device),
    )
    return _unpack(group, out[..., :d], lse)


def dense_gradients(problem: Problem, group: list[Sequence]) -> list[Results]:
    q, k, v, dout = (torch.stack(tensors) for tensors in _columns(group))
    for leaf in (q, k, v):
        leaf.requires_grad_()
    out = interface.flash_attn_func(q, k, v, **_options(problem, group))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    return [
        {"dq": a, "dk": b, "dv": c}
        for a, b, c in zip(dq.unbind(), dk.unbind(), dv.unbind(), strict=True)
    ]


def packed_gradients(problem: Problem, group: list[Sequence]) -> list[Results]:
    q, k, v, dout = (torch.cat(tensors) for tensors in _columns(group))
    for leaf in (q, k, v):
        leaf.requires_grad_()
    out = interface.flash_attn_varlen_func(q, k, v, **_lengths(group), **_options(problem, group))
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), dout)
    queries, keys = [s.s_q for s in group], [s.s_k for s in group]
    return [
        {"dq": a, "dk": b, "dv": c}
        for a, b, c in zip(dq.split(queries), dk.split(keys), dv.split(keys), strict=True)
    ]


def _columns(group: list[Sequence]) -> list[list[Tensor]]:
    return [[getattr(s, name) for s in group] for name in ("q", "k", "v", "dout")]


def dense_partials(problem: Problem, group: list[Sequence]) -> list[Results]:
    options = _options(problem, group)
    del options["dropout_p"]
    q, k, v = (torch.stack([getattr(s, name) for s in group]) for name in "qkv")
    partials = determinism.forward_partials(q, k, v, **options)
    out, lse = determinism.reduce_partials(partials, q.dtype)
    return _unstack(out, lse)


def packed_partials(layout: str) -> Callable[[Problem, list[Sequence]], list[Results]]:
    def run(problem: Problem, group: list[Sequence]) -> list[Results]:
        options = _options(problem, group)
        del options["dropout_p"]
        q, k, v, extra = _packed_inputs(problem, group, layout, float("nan"), page_seed=0)
        partials = determinism.forward_partials(q, k, v, **_lengths(group), **extra, **options)
        out, lse = determinism.reduce_partials(partials, q.dtype)
        return _unpack(group, out, lse)

    return run


def cache_forward(
    problem: Problem,
    group: list[Sequence],
    layout: str,
    num_splits: int,
    fill: float,
    page_seed: int,
) -> list[Results]:
    options = _options(problem, group)
    del options["dropout_p"]
    q = torch.stack([s.q for s in group])
    appended = group[0].s_q if layout in APPEND_LAYOUTS else 0
    if appended:
        options["k"], options["v"] = (
            torch.stack([getattr(s, name)[s.s_k - appended :] for s in group]) for name in "kv"
        )
    keys = [s.s_k for s in group]
    used = [length - appended for length in keys]  # what the cache holds before the call
    cached = {
        name: [getattr(s, name)[:n] for s, n in zip(group, used, strict=True)] for name in "kv"
    }
    capacity = max(keys) + 7  # some rows beyond every sequence, never a whole block
    starts: list[int] | None = None
    if layout in ("paged", "append_paged"):
        table, num_pages = page_table(keys, problem.page_size, seed=page_seed, device=q.device)
        caches = [
            paged_rows(cached[name], table, num_pages, problem.page_size, fill=fill)
            for name in "kv"
        ]
        options["block_table"] = table
    else:
        if layout == "leftpad":
            starts = [3 + 11 * index for index in range(len(group))]
            capacity += max(starts)
            options["cache_leftpad"] = torch.tensor(starts, dtype=torch.int32, device=q.device)
        caches = [padded_rows(cached[name], capacity, fill=fill, left=starts) for name in "kv"]
        if layout == "batch_idx":
            caches, options["cache_batch_idx"] = _scattered(caches, fill, page_seed)
    ends = used if starts is None else [n + start for n, start in zip(used, starts, strict=True)]
    out, lse = interface.flash_attn_with_kvcache(
        q,
        caches[0],
        caches[1],
        **options,
        cache_seqlens=torch.tensor(ends, dtype=torch.int32, device=q.device),
        num_splits=num_splits,
        return_softmax_lse=True,
    )
    return _unstack(out, lse)


def _scattered(caches: list[Tensor], fill: float, seed: int) -> tuple[list[Tensor], Tensor]:
    """Move the rows of a cache to random slots of one twice as large, and say where they went."""
    batch = caches[0].shape[0]
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(2 * batch, generator=generator, device="cpu")
    slots = order[:batch].to(caches[0].device)
    larger = [cache.new_full((2 * batch, *cache.shape[1:]), fill) for cache in caches]
    for target, source in zip(larger, caches, strict=True):
        target[slots] = source
    return larger, slots.to(torch.int32)
