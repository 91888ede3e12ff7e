"""Rotary position embeddings: each pair of a head's first dimensions turns by its position's angle.

    out1 = x1 * cos - x2 * sin        out2 = x1 * sin + x2 * cos

The four products and the two sums are each rounded to fp32 on their own (to fp64 for an fp64 x),
then the results once to the dtype of x.  A fused multiply-add would give other bits.
`flash_attn_with_kvcache` rotates by the same rule, so keys that were rotated here and keys that it
rotated are equal byte for byte.  The work sits in one custom op: no compiler looks inside and
fuses a product into a sum, so compiled code gives these bytes too.

Shape letters: b batch, s sequence, h heads, d head dim, t rows of a pack, r = rotary dim / 2.
"""

from typing import Any

import torch
from torch import Tensor

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Every pair (x1, x2) of the last dimension becomes (-x2, x1).

    Pairs are (i, i + d/2), or (2i, 2i + 1) with `interleaved`.
    """
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """The formula in plain PyTorch, in the dtypes given: a reference, not bound to any rounding.

    x is (b, s, h, d); cos and sin are (s, r) or (b, s, r).
    """
    rotary_dim = 2 * cos.shape[-1]
    assert rotary_dim <= x.shape[-1], "rotary_dim must be <= headdim"

    def for_each_dim(table: Tensor) -> Tensor:  # (..., s, r) -> (..., s, 1, 2r)
        wide = table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)
        return wide.unsqueeze(-2)

    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    turned = turned * for_each_dim(cos) + rotate_half(turned, interleaved) * for_each_dim(sin)
    return torch.cat((turned, rest), dim=-1)


def _positions(
    x: Tensor, seqlen_offset: int, seqlen_offsets: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Where in its sequence each row of x stands: (s,), (b, s), or (t,) for a pack.

    A pack may be longer than its sequences.  The second result tells which rows are behind them;
    they have position 0.
    """
    if cu_seqlens is None:
        position = torch.arange(x.shape[1], device=x.device) + seqlen_offset
        if seqlen_offsets is not None:
            position = position + seqlen_offsets[:, None]
        return position, None
    row = torch.arange(x.shape[0], device=x.device, dtype=cu_seqlens.dtype)
    # right=True: a row that begins several sequences belongs to the last of them, the others are
    # empty.
    sequence = torch.searchsorted(cu_seqlens, row, right=True) - 1
    behind = row >= cu_seqlens[-1]
    sequence = sequence.masked_fill(behind, 0)
    position = row - cu_seqlens[sequence] + seqlen_offset
    if seqlen_offsets is not None:
        position = position + seqlen_offsets[sequence]
    return position.masked_fill(behind, 0), behind


@torch.library.custom_op("flash_attn::_apply_rotary_", mutates_args={"x"})
def _apply_rotary_(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offset: int,
    seqlen_offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """Rotates x in place, (b, s, ..., d) or (t, ..., d) with cu_seqlens; `conjugate`: backwards."""
    position, behind = _positions(x, seqlen_offset, seqlen_offsets, cu_seqlens)
    if position.device.type == "cpu" and position.numel() > 0:
        first_position, last_position = (int(end) for end in position.aminmax())
        if first_position < 0 or last_position >= cos.shape[0]:
            raise IndexError(
                f"flash_attn: a position is outside the rotary tables; received positions "
                f"{first_position} to {last_position}; rule: 0 <= position < {cos.shape[0]}, the "
                f"rows of cos and sin"
            )

    dtype = torch.promote_types(x.dtype, torch.float32)
    heads = [1] * (x.ndim - (3 if cu_seqlens is None else 2))

    def for_each_row(table: Tensor, outside: int) -> Tensor:  # (S_ro, r) -> (rows of x, 1.., r)
        rows = table.index_select(0, position.flatten()).to(dtype)
        if behind is not None:
            rows = rows.masked_fill(behind[:, None], outside)
        return rows.view(*position.shape, *heads, table.shape[1])

    cos, sin = for_each_row(cos, 1), for_each_row(sin, 0)
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
    first.copy_(out1)
    second.copy_(out2)


class _Rotate(torch.autograd.Function):
    """Rotates x, or of a packed x what `queries` and `keys` count off in dimension 2.

    Those are its first entries, which turn by cos and sin, and the next ones, which turn by cos_k
    and sin_k if given.

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
        interleaved: bool,
        conjugate: bool,
        inplace: bool,
    ) -> Tensor:
        ctx.save_for_backward(cos, sin, cos_k, sin_k, seqlen_offsets, cu_seqlens)
        ctx.options = (queries, keys, seqlen_offset, interleaved)
        ctx.conjugate = conjugate
        out = x if inplace else x.clone()
        if queries is None:
            parts = [(out, cos, sin)]
        elif cos_k is None or sin_k is None:
            parts = [(out.narrow(2, 0, queries + keys), cos, sin)]
        else:
            parts = [
                (out.narrow(2, 0, queries), cos, sin),
                (out.narrow(2, queries, keys), cos_k, sin_k),
            ]
        for part, cos_part, sin_part in parts:
            _apply_rotary_(
                part,
                cos_part,
                sin_part,
                seqlen_offset,
                seqlen_offsets,
                cu_seqlens,
                interleaved,
                conjugate,
            )
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grad_x = _Rotate.apply(grad_out, *ctx.saved_tensors, *ctx.options, not ctx.conjugate, False)
        return grad_x, *[None] * 12


def _check(
    headdim: int, cos: Tensor, sin: Tensor, batch: int, seqlen: int, seqlen_offsets: int | Tensor
) -> tuple[int, Tensor | None]:
    """Asserts what can be known without reading a tensor; the offsets as (int, tensor or None)."""
    assert cos.ndim == 2 and cos.shape == sin.shape, "cos and sin must have one shape, (S_ro, r)"
    seqlen_ro, r = cos.shape
    assert 2 * r <= headdim, "rotary_dim must be <= headdim"
    assert headdim <= 256, "Only support headdim <= 256"
    assert seqlen_ro >= seqlen, "seqlen_ro must be >= seqlen"
    if isinstance(seqlen_offsets, Tensor):
        assert seqlen_offsets.shape == (batch,), "seqlen_offsets must have shape (batch,)"
        assert seqlen_offsets.dtype in (torch.int32, torch.int64), (
            "seqlen_offsets must have dtype int32 or int64"
        )
        return 0, seqlen_offsets
    assert seqlen_offsets >= 0, "seqlen_offsets must be >= 0"
    assert seqlen_offsets + seqlen <= seqlen_ro, "seqlen_offsets + seqlen must be <= seqlen_ro"
    return seqlen_offsets, None


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotates the first 2r dimensions of every head; the rest passes through.

    Args:
        x: (b, s, h, d), or (t, h, d) with cu_seqlens.
        cos, sin: (S_ro, r), a row for each position.
        interleaved: pairs are (2i, 2i + 1) instead of (i, i + r).
        inplace: writes to x and returns it.  Go on with the returned tensor: the gradient follows
            that one.
        seqlen_offsets: the position of each sequence's first row: an int, or (b,) int32 or int64.
        cu_seqlens: (b + 1,), offsets of the sequences in a pack.  Rows of the pack behind the last
            sequence come back as they are.
        max_seqlen: the longest sequence of the pack.

    Returns:
        The shape and dtype of x.
    """
    if cu_seqlens is None:
        batch, seqlen = x.shape[0], x.shape[1]
    else:
        assert max_seqlen is not None, "If cu_seqlens is passed in, then max_seqlen must be passed"
        batch, seqlen = cu_seqlens.shape[0] - 1, max_seqlen
    offset, offsets = _check(x.shape[-1], cos, sin, batch, seqlen, seqlen_offsets)
    return _Rotate.apply(
        x, cos, sin, None, None, offsets, cu_seqlens, None, 0, offset, interleaved, False, inplace
    )


apply_rotary_emb_func = apply_rotary_emb


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotates queries and keys of qkv in place and returns it; go on with the returned tensor.

    Args:
        qkv: (b, s, 3, h, d), or (b, s, h_q + 2 * h_kv, d), which needs num_heads_q = h_q.
        cos, sin: (S_ro, r), for the queries, and for the keys unless they have their own.
        cos_k, sin_k: (S_ro, r), for the keys.
        interleaved, seqlen_offsets: as in `apply_rotary_emb`.
    """
    if qkv.ndim == 5:
        assert qkv.shape[2] == 3, "qkv must have shape (batch, seqlen, 3, nheads, headdim)"
        queries, keys = 1, 1
    else:
        assert qkv.ndim == 4, "qkv must have 4 or 5 dimensions"
        assert num_heads_q is not None, "num_heads_q is required for a qkv of 4 dimensions"
        keys, odd = divmod(qkv.shape[2] - num_heads_q, 2)
        assert keys > 0 and odd == 0, "qkv must have num_heads_q + 2 * num_heads_k heads"
        queries = num_heads_q
    assert (cos_k is None) == (sin_k is None), "cos_k and sin_k come together"

    batch, seqlen, headdim = qkv.shape[0], qkv.shape[1], qkv.shape[-1]
    offset, offsets = _check(headdim, cos, sin, batch, seqlen, seqlen_offsets)
    if cos_k is not None and sin_k is not None:
        _check(headdim, cos_k, sin_k, batch, seqlen, seqlen_offsets)
    return _Rotate.apply(
        qkv, cos, sin, cos_k, sin_k, offsets, None, queries, keys, offset, interleaved, False, True
    )


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotates the keys of kv (b, s, 2, h, d) in place and returns it; go on with that tensor."""
    assert kv.ndim == 5 and kv.shape[2] == 2, (
        "kv must have shape (batch, seqlen, 2, nheads, headdim)"
    )
    offset, offsets = _check(kv.shape[-1], cos, sin, kv.shape[0], kv.shape[1], seqlen_offsets)
    return _Rotate.apply(
        kv, cos, sin, None, None, offsets, None, 0, 1, offset, interleaved, False, True
    )


def _inverse_frequencies(dim: int, base: float, device: torch.device | str | None) -> Tensor:
    """base ** (-2i / dim) for each pair i: (r,), fp32."""
    even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
    return 1.0 / base ** (even / dim)


def _xpos_scales(dim: int, device: torch.device | str | None) -> Tensor:
    """(2i / dim + 0.4) / 1.4 for each pair i: (r,), fp32."""
    even = torch.arange(0, dim, 2, device=device, dtype=torch.float32)
    return (even + 0.4 * dim) / (1.4 * dim)


@torch.library.custom_op("flash_attn::_rotary_tables", mutates_args=())
def _rotary_tables(
    inv_freq: Tensor,
    scale: Tensor | None,
    dim: int,
    base: float,
    scale_base: float,
    seqlen: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    """[cos, sin], with scale [cos, sin, cos_k, sin_k]: (seqlen, r), made in fp32, cast to dtype.

    An op, because a compiler's own cos and sin may give other bits than PyTorch's.
    """
    device = inv_freq.device
    # model.to(bfloat16) rounds the buffers too; fp32 ones are made anew then.
    if inv_freq.dtype != torch.float32:
        inv_freq = _inverse_frequencies(dim, base, device)
    position = torch.arange(seqlen, device=device, dtype=torch.float32)
    angle = torch.outer(position, inv_freq)
    cos, sin = angle.cos(), angle.sin()
    tables = [cos, sin]
    if scale is not None:
        if scale.dtype != torch.float32:
            scale = _xpos_scales(dim, device)
        growth = scale ** ((position - seqlen // 2) / scale_base)[:, None]
        tables = [cos * growth, sin * growth, cos / growth, sin / growth]
    return [table.to(dtype) for table in tables]


@_rotary_tables.register_fake
def _(
    inv_freq: Tensor,
    scale: Tensor | None,
    dim: int,
    base: float,
    scale_base: float,
    seqlen: int,
    dtype: torch.dtype,
) -> list[Tensor]:
    count = 2 if scale is None else 4
    return [inv_freq.new_empty(seqlen, (dim + 1) // 2, dtype=dtype) for _ in range(count)]


class RotaryEmbedding(torch.nn.Module):
    """Rotary embedding with tables that grow with the longest sequence seen.

    The angle of pair i at position p is `p / base ** (2i / dim)`.  With `scale_base` queries and
    keys are also scaled as XPos does (https://arxiv.org/abs/2212.10554), and the product of a query
    and a key decays with their distance.  The scales are centred on the middle of the table, so
    keys that are kept across calls need one `max_seqlen` from the first call on.
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        scale = None if scale_base is None else _xpos_scales(dim, device)
        self.register_buffer(
            "inv_freq", _inverse_frequencies(dim, self.base, device), persistent=False
        )
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _update_cos_sin_cache(
        self, seqlen: int, device: torch.device, dtype: torch.dtype = torch.float32
    ) -> None:
        """Makes tables of at least `seqlen` rows."""
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and (cached.device, cached.dtype) == (device, dtype)
        ):
            return
        # A table made in inference mode could not be saved for a later backward pass.
        with torch.inference_mode(False):
            tables = _rotary_tables(
                self.inv_freq.to(device=device),
                None if self.scale is None else self.scale.to(device=device),
                self.dim,
                self.base,
                self.scale_base or 0.0,
                seqlen,
                dtype,
            )
        self._seq_len_cached = seqlen
        self._cos_cached, self._sin_cached = tables[:2]
        if self.scale is not None:
            self._cos_k_cached, self._sin_k_cached = tables[2:]

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates in place, and returns what to go on with.

        Args:
            qkv: as in `apply_rotary_emb_qkv_`; or with kv, the queries alone, (b, s, h_q, d).
            kv: (b, s, 2, h_kv, d).
            seqlen_offset: the position of each sequence's first row, int or (b,).
            max_seqlen: makes tables of that many rows at once.  A tensor `seqlen_offset` needs it,
                unless the tables are long enough already.

        Returns:
            qkv, or (q, kv).
        """
        if max_seqlen is None:
            max_seqlen = qkv.shape[1]
            if not isinstance(seqlen_offset, Tensor):
                max_seqlen += seqlen_offset
        self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        assert cos is not None and sin is not None
        cos_k, sin_k = self._cos_k_cached, self._sin_k_cached
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb(
            qkv, cos, sin, self.interleaved, inplace=True, seqlen_offsets=seqlen_offset
        )
        if cos_k is not None and sin_k is not None:
            cos, sin = cos_k, sin_k
        return q, apply_rotary_emb_kv_(kv, cos, sin, self.interleaved, seqlen_offset)
