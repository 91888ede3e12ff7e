"""What is verified, behind one interface: this package in one of its modes, or PyTorch's attention.

An engine gets sequences and a layout, and returns each sequence's results as its own tensors. The
layout is how the sequences are brought to the kernel: a dense batch, a packed batch, a cache,
pages. No result may depend on it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .. import determinism
from ..testing import padded_rows
from . import layouts
from .layouts import LAYOUTS, PACKED_LAYOUTS, Results
from .problem import Problem, Sequence


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
                return layouts.dense_forward(problem, group)
            if layout == "seqused":
                return layouts.seqused_forward(problem, group, fill)
            if layout in PACKED_LAYOUTS:
                return layouts.packed_forward(problem, group, layout, fill, page_seed)
            return layouts.cache_forward(problem, group, layout, num_splits, fill, page_seed)

        with determinism.deterministic(self.deterministic), torch.no_grad():
            _seed_dropout(problem)
            return _grouped(sequences, _group_key(layout), run)

    def gradients(self, problem: Problem, sequences: list[Sequence], layout: str) -> list[Results]:
        run = layouts.dense_gradients if layout == "dense" else layouts.packed_gradients
        with determinism.deterministic(self.deterministic):
            _seed_dropout(problem)
            return _grouped(sequences, _group_key(layout), partial(run, problem))

    def from_partials(
        self, problem: Problem, sequences: list[Sequence], layout: str
    ) -> list[Results]:
        run = layouts.dense_partials if layout == "dense" else layouts.packed_partials(layout)
        with determinism.deterministic(self.deterministic), torch.no_grad():
            return _grouped(sequences, _group_key(layout), partial(run, problem))


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
                replace(s, **{n: getattr(s, n).clone().requires_grad_() for n in ("q", "k", "v")})
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
