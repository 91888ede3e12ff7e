"""What is verified, behind one interface: this package in one of its modes, or PyTorch's attention.

An engine gets sequences and a layout, and returns each sequence's results as its own tensors. The
layout is how the sequences are brought to the kernel: a dense batch, a packed batch, a cache,
pages. No result may depend on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
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


class Engine(ABC):
    """Something that computes attention over sequences."""

    name: str
    title: str
    layouts: tuple[str, ...] = LAYOUTS
    has_num_splits = True
    has_partials = True

    def supports(self, problem: Problem) -> bool:
        return True

    @abstractmethod
    def forward(
        self,
        problem: Problem,
        sequences: list[Sequence],
        layout: str,
        *,
        num_splits: int = 0,
        fill: float = float("nan"),
        page_seed: int = 0,
    ) -> list[Results]:
        """`fill` is what unused memory holds; `page_seed` shuffles pages and cache rows."""

    @abstractmethod
    def gradients(
        self, problem: Problem, sequences: list[Sequence], layout: str
    ) -> list[Results]: ...

    def from_partials(
        self, problem: Problem, sequences: list[Sequence], layout: str
    ) -> list[Results]:
        """The forward pass again, with its segments folded by PyTorch."""
        raise NotImplementedError(f"{self.name} does not hand out partials")


class FlashAttention(Engine):
    """This package, in deterministic or in standard mode, through its public functions."""

    def __init__(self, deterministic: bool) -> None:
        self.deterministic = deterministic
        self.name = "deterministic" if deterministic else "standard"
        self.title = self.name

    def forward(
        self,
        problem: Problem,
        sequences: list[Sequence],
        layout: str,
        *,
        num_splits: int = 0,
        fill: float = float("nan"),
        page_seed: int = 0,
    ) -> list[Results]:
        def run(group: list[Sequence]) -> list[Results]:
            if layout == "dense":
                return _dense_forward(problem, group)
            if layout in PACKED_LAYOUTS:
                return _packed_forward(problem, group, layout, fill, page_seed)
            return _cache_forward(problem, group, layout, num_splits, fill, page_seed)

        with determinism.deterministic(self.deterministic), torch.no_grad():
            _seed_dropout(problem)
            return _grouped(sequences, _group_key(layout), run)

    def gradients(self, problem: Problem, sequences: list[Sequence], layout: str) -> list[Results]:
        def run(group: list[Sequence]) -> list[Results]:
            if layout == "dense":
                q, k, v, dout = (
                    torch.stack([getattr(s, name) for s in group])
                    for name in ("q", "k", "v", "dout")
                )
                leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
                out = interface.flash_attn_func(*leaves, **_options(problem, group))
                return [
                    dict(zip(("dq", "dk", "dv"), grads, strict=True))
                    for grads in zip(*torch.autograd.grad(out, leaves, dout), strict=True)
                ]
            q, k, v, dout = (
                torch.cat([getattr(s, name) for s in group]) for name in ("q", "k", "v", "dout")
            )
            leaves = [tensor.requires_grad_() for tensor in (q, k, v)]
            out = interface.flash_attn_varlen_func(
                *leaves, **_lengths(group), **_options(problem, group)
            )
            dq, dk, dv = torch.autograd.grad(out, leaves, dout)
            queries, keys = [s.s_q for s in group], [s.s_k for s in group]
            parts = zip(dq.split(queries), dk.split(keys), dv.split(keys), strict=True)
            return [dict(zip(("dq", "dk", "dv"), part, strict=True)) for part in parts]

        with determinism.deterministic(self.deterministic):
            _seed_dropout(problem)
            return _grouped(sequences, _group_key(layout), run)

    def from_partials(
        self, problem: Problem, sequences: list[Sequence], layout: str
    ) -> list[Results]:
        def run(group: list[Sequence]) -> list[Results]:
            options = _options(problem, group)
            del options["dropout_p"]
            if layout == "dense":
                q, k, v = (torch.stack([getattr(s, name) for s in group]) for name in "qkv")
                partials = determinism.forward_partials(q, k, v, **options)
                out, lse = determinism.reduce_partials(partials, q.dtype)
                return _unstack(out, lse)
            q, k, v, extra = _packed_inputs(problem, group, layout, float("nan"), page_seed=0)
            partials = determinism.forward_partials(q, k, v, **_lengths(group), **extra, **options)
            out, lse = determinism.reduce_partials(partials, q.dtype)
            return _unpack(group, out, lse)

        with determinism.deterministic(self.deterministic), torch.no_grad():
            return _grouped(sequences, _group_key(layout), run)


class PyTorchAttention(Engine):
    """torch.nn.functional.scaled_dot_product_attention, called as people call it: a control.

    Equal lengths go in as a dense batch. Everything else is padded and masked, which is what a
    packed batch, a cache or a page table comes down to without a kernel for them.
    """

    name = "pytorch"
    title = "PyTorch"
    layouts = ("dense", "varlen", "kvcache")
    has_num_splits = False
    has_partials = False

    def supports(self, problem: Problem) -> bool:
        return not problem.softcap and not problem.dropout_p and min(problem.seqlens_k) > 0

    def forward(
        self,
        problem: Problem,
        sequences: list[Sequence],
        layout: str,
        *,
        num_splits: int = 0,
        fill: float = float("nan"),
        page_seed: int = 0,
    ) -> list[Results]:
        with torch.no_grad():
            return _grouped(
                sequences,
                _group_key(layout),
                lambda group: [{"out": out} for out in self._attend(problem, group)],
            )

    def gradients(self, problem: Problem, sequences: list[Sequence], layout: str) -> list[Results]:
        def run(group: list[Sequence]) -> list[Results]:
            leaves = [
                Sequence(*(t.clone().requires_grad_() for t in (s.q, s.k, s.v)), s.dout, s.slopes)
                for s in group
            ]
            outs = self._attend(problem, leaves)
            inputs = [tensor for s in leaves for tensor in (s.q, s.k, s.v)]
            grads = torch.autograd.grad(outs, inputs, [s.dout for s in leaves])
            return [
                dict(zip(("dq", "dk", "dv"), grads[3 * i : 3 * i + 3], strict=True))
                for i in range(len(leaves))
            ]

        return _grouped(sequences, _group_key(layout), run)

    def _attend(self, problem: Problem, group: list[Sequence]) -> list[Tensor]:
        s_q, s_k = max(s.s_q for s in group), max(s.s_k for s in group)
        even = all((s.s_q, s.s_k) == (s_q, s_k) for s in group)
        plain = problem.window_size == (-1, -1) and not problem.alibi
        q = padded_rows([s.q for s in group], s_q, fill=0.0).transpose(1, 2)
        k, v = (
            padded_rows([getattr(s, name) for s in group], s_k, fill=0.0)
            .transpose(1, 2)
            .repeat_interleave(problem.h_q // problem.h_kv, dim=1)
            for name in ("k", "v")
        )
        sees_all = not problem.causal or s_q == 1
        if even and plain and (sees_all or s_q == s_k):
            arguments: dict[str, Any] = {"is_causal": not sees_all}
        else:
            mask = torch.stack([_mask(problem, s, s_q, s_k) for s in group])
            arguments = {"attn_mask": mask}
        out = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, scale=problem.softmax_scale, **arguments
        ).transpose(1, 2)
        return [row[: s.s_q] for row, s in zip(out, group, strict=True)]


ENGINES: dict[str, Engine] = {
    engine.name: engine
    for engine in (
        FlashAttention(deterministic=True),
        FlashAttention(deterministic=False),
        PyTorchAttention(),
    )
}


def _grouped(
    sequences: list[Sequence],
    key: Callable[[Sequence], Hashable],
    run: Callable[[list[Sequence]], list[Results]],
) -> list[Results]:
    """One call for each group of sequences that fit into one; the results in the old order."""
    groups: dict[Hashable, list[int]] = {}
    for index, sequence in enumerate(sequences):
        groups.setdefault(key(sequence), []).append(index)
    results: dict[int, Results] = {}
    for indices in groups.values():
        outputs = run([sequences[index] for index in indices])
        results.update(zip(indices, outputs, strict=True))
    return [results[index] for index in range(len(sequences))]


def _group_key(layout: str) -> Callable[[Sequence], Hashable]:
    if layout == "dense":
        return lambda sequence: (sequence.s_q, sequence.s_k)
    if layout in PACKED_LAYOUTS:
        return lambda sequence: None  # everything fits into one packed call
    return lambda sequence: sequence.s_q


def _seed_dropout(problem: Problem) -> None:
    if problem.dropout_p:
        torch.manual_seed(problem.seed)


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


def _dense_forward(problem: Problem, group: list[Sequence]) -> list[Results]:
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


def _packed_forward(
    problem: Problem, group: list[Sequence], layout: str, fill: float, page_seed: int
) -> list[Results]:
    options = _options(problem, group)
    if layout == "seqused":
        return _seqused_forward(problem, group, options, fill)
    q, k, v, extra = _packed_inputs(problem, group, layout, fill, page_seed)
    out, lse, _ = interface.flash_attn_varlen_func(
        q, k, v, **_lengths(group), **options, **extra, return_attn_probs=True
    )
    return _unpack(group, out, lse)


def _seqused_forward(
    problem: Problem, group: list[Sequence], options: dict[str, Any], fill: float
) -> list[Results]:
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
    window = options.pop("window_size")
    if options["softmax_scale"] is None:
        options["softmax_scale"] = problem.d**-0.5
    out, lse, _, _ = interface._flash_attn_varlen_forward(
        q,
        k,
        v,
        **lengths,
        **options,
        window_size_left=window[0],
        window_size_right=window[1],
        seqused_k=torch.tensor([s.s_k for s in group], dtype=torch.int32, device=q.device),
    )
    return _unpack(group, out, lse)


def _cache_forward(
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
    order = torch.randperm(2 * batch, generator=torch.Generator().manual_seed(seed))[:batch]
    slots = order.to(caches[0].device)
    larger = [cache.new_full((2 * batch, *cache.shape[1:]), fill) for cache in caches]
    for target, source in zip(larger, caches, strict=True):
        target[slots] = source
    return larger, slots.to(torch.int32)


def _mask(problem: Problem, sequence: Sequence, s_q: int, s_k: int) -> Tensor:
    """attn_mask (1 or h_q, s_q, s_k) of one padded sequence: bool, or with ALiBi's bias."""
    device = sequence.q.device
    position = torch.arange(s_q, device=device)[:, None] + sequence.s_k - sequence.s_q
    key = torch.arange(s_k, device=device)[None, :]
    left, right = problem.window_size
    right = 0 if problem.causal else right
    visible = (key < sequence.s_k).expand(s_q, s_k)
    if left >= 0:
        visible = visible & (key >= position - left)
    if right >= 0:
        visible = visible & (key <= position + right)
    if sequence.slopes is None:
        return visible[None]
    bias = -sequence.slopes[:, None, None] * (position - key).abs()
    return bias.masked_fill(~visible, float("-inf")).to(sequence.q.dtype)
