"""The problems that the verification runs: lengths, features, and tensors that follow from a seed.

A sequence's values depend on (seed, its index, its lengths) alone. So it can be lifted out of its
batch, cut into chunks or heads, moved and given other neighbours, and still be the same sequence.
Every relation is built on that.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence as Seq
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import determinism
from ..testing import random_normal


@dataclass(frozen=True)
class Sequence:
    """One sequence's tensors. Slicing keeps them a valid sequence of the same problem."""

    q: Tensor  # (s_q, h_q, d)
    k: Tensor  # (s_k, h_kv, d)
    v: Tensor  # (s_k, h_kv, d)
    dout: Tensor  # (s_q, h_q, d)
    slopes: Tensor | None = None  # fp32 (h_q,)

    @property
    def s_q(self) -> int:
        return self.q.shape[0]

    @property
    def s_k(self) -> int:
        return self.k.shape[0]

    def query_rows(self, start: int, stop: int, num_keys: int) -> Sequence:
        """Rows [start, stop) of the queries, in front of the first `num_keys` keys."""
        return replace(
            self,
            q=self.q[start:stop],
            k=self.k[:num_keys],
            v=self.v[:num_keys],
            dout=self.dout[start:stop],
        )

    def kv_heads(self, start: int, stop: int) -> Sequence:
        """Key heads [start, stop), each with its group of query heads: a tensor-parallel shard."""
        group = self.q.shape[1] // self.k.shape[1]
        queries = slice(start * group, stop * group)
        return Sequence(
            q=self.q[:, queries],
            k=self.k[:, start:stop],
            v=self.v[:, start:stop],
            dout=self.dout[:, queries],
            slopes=None if self.slopes is None else self.slopes[queries],
        )


@dataclass(frozen=True)
class Problem:
    """Shapes and features of one batch, with upstream's names where it has one.

    `seqlens_q` and `seqlens_k` hold one length per sequence. `alibi` draws other slopes for every
    sequence.
    """

    seqlens_q: tuple[int, ...]
    seqlens_k: tuple[int, ...]
    h_q: int = 4
    h_kv: int = 2
    d: int = 64
    dtype: torch.dtype = torch.float32
    causal: bool = True
    window_size: tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    softmax_scale: float | None = None
    dropout_p: float = 0.0
    page_size: int = 16
    device: str = "cpu"
    seed: int = 0
    name: str = ""

    def __post_init__(self) -> None:
        for name in ("seqlens_q", "seqlens_k"):  # lists are welcome; tuples can be looked up
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.seqlens_q) != len(self.seqlens_k) or not self.seqlens_q:
            raise ValueError("seqlens_q and seqlens_k need one length for each sequence")
        if self.h_q % self.h_kv:
            raise ValueError(f"h_kv={self.h_kv} must divide h_q={self.h_q}")

    def __str__(self) -> str:
        features = [name for name in ("causal", "alibi") if getattr(self, name)]
        features += [f"window={self.window_size}"] if self.window_size != (-1, -1) else []
        features += [f"softcap={self.softcap:g}"] if self.softcap else []
        features += [f"dropout={self.dropout_p:g}"] if self.dropout_p else []
        lengths = (
            _brief(self.seqlens_q)
            if self.seqlens_q == self.seqlens_k
            else f"{_brief(self.seqlens_q)} x {_brief(self.seqlens_k)}"
        )
        title = f"{self.name}: " if self.name else ""
        dtype = str(self.dtype).removeprefix("torch.")
        heads = f"h={self.h_q}/{self.h_kv} d={self.d}"
        return " ".join([f"{title}{lengths}", heads, dtype, *features])

    @property
    def batch(self) -> int:
        return len(self.seqlens_q)

    def replace(self, **changes: object) -> Problem:
        return replace(self, **changes)  # type: ignore[arg-type]

    @functools.lru_cache(maxsize=64)  # noqa: B019  bounded, and relations ask for the same again and again
    def sequence(self, index: int, s_q: int | None = None, s_k: int | None = None) -> Sequence:
        """Sequence `index`, with other lengths than the problem's when asked."""
        s_q = self.seqlens_q[index] if s_q is None else s_q
        s_k = self.seqlens_k[index] if s_k is None else s_k
        shapes = {
            "q": (s_q, self.h_q, self.d),
            "k": (s_k, self.h_kv, self.d),
            "v": (s_k, self.h_kv, self.d),
            "dout": (s_q, self.h_q, self.d),
        }
        base = (self.seed * 4099 + index) * len(shapes)  # 4099: more sequences than any batch here
        tensors = {
            name: random_normal(shape, seed=base + role, dtype=self.dtype, device=self.device)
            for role, (name, shape) in enumerate(shapes.items())
        }
        return Sequence(**tensors, slopes=self._slopes(index))

    def sequences(self) -> list[Sequence]:
        return [self.sequence(index) for index in range(self.batch)]

    def _slopes(self, index: int) -> Tensor | None:
        if not self.alibi:
            return None
        # The usual geometric ladder of ALiBi, shifted a little from sequence to sequence.
        heads = torch.arange(1, self.h_q + 1, dtype=torch.float32, device="cpu")
        return torch.exp2(-8.0 * (heads + index / 16) / self.h_q).to(self.device)

    @property
    def rows_keep_their_keys(self) -> bool:
        """Whether a chunk of the queries can see the same keys, equally far, in its own call.

        True for causal masks (bottom-right: drop the later keys with the later queries), and when
        nothing depends on the distance at all. A window to the right without `causal` is tied to
        the end of the keys.
        """
        return self.causal or (self.window_size == (-1, -1) and not self.alibi)

    def keys_for(self, index: int, stop: int) -> int:
        """Number of keys that a call for the query rows up to `stop` has to be given."""
        s_q, s_k = self.seqlens_q[index], self.seqlens_k[index]
        return max(0, stop + s_k - s_q) if self.causal else s_k


def contract_steps(problem: Problem) -> tuple[int, list[int]]:
    """Keys a block, and where the longest sequence's segments begin, as the library says."""
    plan = determinism.explain(
        max(problem.seqlens_q),
        max(1, *problem.seqlens_k),
        problem.h_q,
        problem.h_kv,
        problem.d,
        problem.dtype,
        device=problem.device,
        deterministic=True,
    )
    return int(plan.block), [int(edge) for edge in plan.boundaries]


def telling_rows(problem: Problem, index: int, limit: int) -> list[int]:
    """Rows where a schedule may slip: both sides of block and segment ends, first, last."""
    s_q, s_k = problem.seqlens_q[index], problem.seqlens_k[index]
    block, boundaries = contract_steps(problem)
    ends = [
        0,
        block,
        *boundaries[1:],
        s_k,
    ]  # a row's last visible key sits just before, at, or just after
    rows = {key + side - (s_k - s_q) for key in ends for side in (-1, 0, 1)}
    valid = sorted(row for row in rows | {0, s_q - 1} if 0 <= row < s_q)
    if len(valid) <= limit:
        return valid
    # An even choice that keeps both ends.
    return sorted({valid[round(i * (len(valid) - 1) / (limit - 1))] for i in range(limit)})


def _brief(lengths: Seq[int]) -> str:
    if len(set(lengths)) == 1:
        return f"{len(lengths)}x{lengths[0]}"
    shown = ",".join(str(length) for length in lengths[:5])
    return f"[{shown}{',...' if len(lengths) > 5 else ''}]"
