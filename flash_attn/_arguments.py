"""The arguments of a call as the few objects that they are.

Public functions and ops have flat signatures: upstream's, and what PyTorch's schemas can say. Right
behind each of them its arguments become these objects, which checks and native calls take.

Letters: b batch, s_q queries, s_k keys, h_q query heads, h_kv key heads, d head dim, t_q and t_k
tokens of a packed batch. Lengths, windows and capacities count tokens. A field's comment says what
holds once the checks have accepted the object; before that its tensors are as the caller gave them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Inputs:
    """What attention multiplies: float16 or bfloat16, on the CPU float32 as well."""

    q: Tensor  # (b, s_q, h_q, d), or (t_q, h_q, d) of a packed batch
    k: Tensor  # (b, s_k, h_kv, d) or (t_k, h_kv, d), or (num_blocks, page_size, h_kv, d) in pages
    v: Tensor  # as k


@dataclass(frozen=True, slots=True)
class Scoring:
    """What a score is made of; the same for every row of a call."""

    softmax_scale: float
    causal: bool = False
    window_left: int = -1  # keys before a query's own place that it sees; negative: all
    window_right: int = -1
    softcap: float = 0.0  # 0: none
    alibi_slopes: Tensor | None = None  # (h_q,) or (b, h_q), fp32
    dropout_p: float = 0.0

    def depends_on_place(self, num_keys: int) -> bool:
        """Whether a row's place among the keys decides what it sees.

        A window that is not narrower than the keys hides none of them.
        """
        return self.causal or 0 <= self.window_left < num_keys or 0 <= self.window_right < num_keys


@dataclass(frozen=True, slots=True)
class Packing:
    """Where the sequences of a batch lie; all fields absent: a dense batch. int32 tensors."""

    cu_seqlens_q: Tensor | None = None  # (b + 1,)
    cu_seqlens_k: Tensor | None = None  # (b + 1,)
    max_seqlen_q: int = 0  # with cu_seqlens alone
    max_seqlen_k: int = 0
    seqused_k: Tensor | None = None  # (b,) keys in use, left padding included
    leftpad_k: Tensor | None = None  # (b,)
    cache_batch_idx: Tensor | None = None  # (b,)
    block_table: Tensor | None = None  # (b, max_pages)

    def batch(self, q: Tensor) -> int:
        """b, the number of sequences."""
        return q.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    def lengths(self, q: Tensor, k: Tensor) -> tuple[int, int]:
        """Largest (s_q, s_k) of the batch: given, or read off dense tensors."""
        if self.cu_seqlens_q is not None:
            return self.max_seqlen_q, self.max_seqlen_k
        return q.shape[1], keys_of_a_row(k, self.block_table)


DENSE = Packing()


def keys_of_a_row(k: Tensor, block_table: Tensor | None) -> int:
    """The keys that a row of dense keys or of a cache holds, or a row of its block table."""
    return k.shape[1] if block_table is None else block_table.shape[1] * k.shape[1]


@dataclass(frozen=True, slots=True)
class Cache:
    """Keys and values of earlier calls, and where each sequence has its own. int32 tensors."""

    k: Tensor  # (b_cache, s_cache, h_kv, d), or (num_blocks, page_size, h_kv, d) in pages
    v: Tensor  # as k
    seqlens: Tensor | None = None  # (b,) keys in use before an append; None: the whole cache
    batch_idx: Tensor | None = None  # (b,) the row of each sequence
    leftpad: Tensor | None = None  # (b,) keys to skip at the front, which seqlens counts
    block_table: Tensor | None = None  # (b, max_pages) the pages of each sequence, in order

    def capacity(self) -> int:
        """The keys that a sequence has room for."""
        return keys_of_a_row(self.k, self.block_table)

    def packing(self, lengths: Tensor) -> Packing:
        """The cache as what a forward pass reads, with ``lengths`` (b,) keys in use."""
        return Packing(
            seqused_k=lengths,
            leftpad_k=self.leftpad,
            cache_batch_idx=self.batch_idx,
            block_table=self.block_table,
        )


@dataclass(frozen=True, slots=True)
class Append:
    """What is written into a cache before attention reads it; all fields absent: nothing."""

    k: Tensor | None = None  # (b, s_new, h_kv, d)
    v: Tensor | None = None  # as k
    rotary_cos: Tensor | None = None  # (s_rotary, rotary_dim / 2) in the dtype of q; turns k and q
    rotary_sin: Tensor | None = None
    interleaved: bool = False  # pairs (0, 1), (2, 3), ... instead of (i, i + rotary_dim / 2)


NOTHING_NEW = Append()


@dataclass(frozen=True, slots=True)
class Outputs:
    """What a forward pass has returned, and the gradient that has come back for its out."""

    dout: Tensor  # as q
    out: Tensor  # as q
    softmax_lse: Tensor  # fp32, natural log: (b, h_q, s_q), or (h_q, t_q) of a packed batch
    rng_state: Tensor | None = None  # int64 (2,): seed of dropout, and offset with the mode


@dataclass(frozen=True, slots=True)
class Gradients:
    """The buffers that a caller wants gradients in; None: that one is not wanted."""

    dq: Tensor | None = None  # as q
    dk: Tensor | None = None  # as k
    dv: Tensor | None = None  # as v

    def buffers(self, inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
        """The buffers given, and new ones in place of the others: a kernel writes all three."""
        return (
            torch.empty_like(inputs.q) if self.dq is None else self.dq,
            torch.empty_like(inputs.k) if self.dk is None else self.dk,
            torch.empty_like(inputs.v) if self.dv is None else self.dv,
        )
