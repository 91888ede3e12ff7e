"""The rotation itself: one custom op, and its gradient.  `rotary.py` says by which formula.

Shape letters: b batch, s sequence, h heads, d head dim, t rows of a pack, r = rotary dim / 2.
"""

from typing import Any

import torch
from torch import Tensor

from flash_attn import _check_contents
from flash_attn._autograd import Kernel
from flash_attn._checks import refuse_transform
from flash_attn.layers import _rotary_checks as checks


def _positions(
    x: Tensor, seqlen_offset: int, seqlen_offsets: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Where in its sequence each row of x stands: (1, s), (b, s), or (t,) for a pack.

    The second result tells which rows have a position at all: not those of a pack that lie in no
    sequence, nor any before the first.  It is None where the offset is an int, which was checked.
    Whatever the tensors hold, no index here leaves its tensor: on a GPU nothing else would stop it.
    """
    if cu_seqlens is None:
        position = torch.arange(x.shape[1], device=x.device)[None] + seqlen_offset
        if seqlen_offsets is None:
            return position, None
        position = position + seqlen_offsets[:, None]
        return position, position >= 0
    row = torch.arange(x.shape[0], device=x.device)
    offsets = cu_seqlens.to(row.dtype)
    # right=True: a row that begins several sequences belongs to the last of them, the others are
    # empty.
    sequence = torch.searchsorted(offsets, row, right=True) - 1
    sequence = sequence.clamp(0, offsets.shape[0] - 2)
    first, end = offsets[sequence], offsets[sequence + 1]
    position = row - first + seqlen_offset
    if seqlen_offsets is not None:
        position = position + seqlen_offsets[sequence]
    return position, (first <= row) & (row < end) & (position >= 0)


def _turn_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    position: Tensor,
    has_position: Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """Turns the rows of x, (b, s, ..., d) or (t, ..., d), whose position has a row in the tables.

    The others keep their bytes.
    """
    if cos.shape[0] == 0:
        return
    dtype = torch.promote_types(x.dtype, torch.float32)
    heads = [1] * (x.ndim - 1 - position.ndim)
    turns = None
    if has_position is not None:
        turns = has_position & (position < cos.shape[0])
        position = position.masked_fill(~turns, 0)
        turns = turns.view(*position.shape, *heads, 1)

    def for_each_row(table: Tensor) -> Tensor:  # (S_ro, r) -> (rows of x, 1.., r)
        rows = table.index_select(0, position.flatten()).to(dtype)
        return rows.view(*position.shape, *heads, table.shape[1])

    cos, sin = for_each_row(cos), for_each_row(sin)
    if conjugate:
        sin = -sin
    r = cos.shape[-1]
    first, second = (
        (x[..., 0 : 2 * r : 2], x[..., 1 : 2 * r : 2])
        if interleaved
        else (x[..., :r], x[..., r : 2 * r])
    )
    x1, x2 = first.to(dtype), second.to(dtype)
    # One call a rounding.  Both results are complete before the first is written: x1 and x2 are
    # views of x where no cast was needed.
    out1 = (x1 * cos).sub_(x2 * sin)
    out2 = (x1 * sin).add_(x2 * cos)
    for half, turned in ((first, out1), (second, out2)):
        # Not by cos = 1 and sin = 0: that would spread an infinity, and lose the sign of a zero.
        half.copy_(turned if turns is None else torch.where(turns, turned.to(x.dtype), half))


@torch.library.custom_op("flash_attn::_apply_rotary_", mutates_args={"x"})
def _apply_rotary_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None,
    sin_k: Tensor | None,
    seqlen_offset: int,
    seqlen_offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    queries: int | None,
    keys: int,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """Rotates x in place, or of a packed x what `queries` and `keys` count off in dimension 2.

    Those are its first entries, which turn by cos and sin, and the next ones, which turn by cos_k
    and sin_k if given.  x is (b, s, ..., d), or (t, h, d) with cu_seqlens, whose longest sequence
    has max_seqlen rows.  `conjugate`: backwards.
    """
    if queries is None:
        parts = [(x, cos, sin)]
    elif cos_k is None or sin_k is None:
        parts = [(x.narrow(2, 0, queries + keys), cos, sin)]
    else:
        parts = [
            (x.narrow(2, 0, queries), cos, sin),
            (x.narrow(2, queries, keys), cos_k, sin_k),
        ]
    if cu_seqlens is not None and cu_seqlens.shape[0] == 1:  # no sequence
        return
    has_index = seqlen_offsets is not None or cu_seqlens is not None
    are_read = has_index and _check_contents.reads_contents(x.device)
    if are_read:
        rows = min(table.shape[0] for _, table, _ in parts)
        checks.contents(x, rows, seqlen_offsets, cu_seqlens, max_seqlen)
    position, has_position = _positions(x, seqlen_offset, seqlen_offsets, cu_seqlens)
    if are_read and cu_seqlens is None:  # the check has found a row of the tables for each row of x
        has_position = None
    for part, cos_part, sin_part in parts:
        _turn_(part, cos_part, sin_part, position, has_position, interleaved, conjugate)


class _Rotate(torch.autograd.Function):
    """`_apply_rotary_` on x itself or on a copy, with a gradient for x.

    The gradient is the conjugate rotation of the incoming one, in a tensor of its own, also where
    the forward worked in place: autograd may have given that very tensor to another branch of the
    graph (a residual connection does), which must not see it rotated.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        cos_k: Tensor | None,
        sin_k: Tensor | None,
        seqlen_offsets: Tensor | None,
        cu_seqlens: Tensor | None,
        queries: int | None,
        keys: int,
        seqlen_offset: int,
        max_seqlen: int,
        interleaved: bool,
        conjugate: bool,
        inplace: bool,
    ) -> Tensor:
        ctx.save_for_backward(cos, sin, cos_k, sin_k, seqlen_offsets, cu_seqlens)
        ctx.options = (queries, keys, seqlen_offset, max_seqlen, interleaved)
        ctx.conjugate = conjugate
        out = x if inplace else x.clone()
        _apply_rotary_(
            out,
            cos,
            sin,
            cos_k,
            sin_k,
            seqlen_offset,
            seqlen_offsets,
            cu_seqlens,
            max_seqlen,
            queries,
            keys,
            interleaved,
            conjugate,
        )
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = _Rotate.apply(grad_out, *ctx.saved_tensors, *ctx.options, not ctx.conjugate, False)
        return grad_x, *[None] * 13


# The op by itself, as a compiler leaves it in a graph, would let tangents pass unturned.
Kernel(_apply_rotary_)


def rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offset: int,
    seqlen_offsets: Tensor | None,
    interleaved: bool,
    inplace: bool,
    *,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    queries: int | None = None,
    keys: int = 0,
) -> Tensor:
    """x rotated as `_apply_rotary_` says; `inplace`: x itself, written to."""
    if torch._C._are_functorch_transforms_active():
        refuse_transform("the rotary embedding")
    return _Rotate.apply(
        x,
        cos,
        sin,
        cos_k,
        sin_k,
        seqlen_offsets,
        cu_seqlens,
        queries,
        keys,
        seqlen_offset,
        max_seqlen,
        interleaved,
        False,
        inplace,
    )
