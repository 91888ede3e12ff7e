"""Rotary position embeddings: each pair of a head's first dimensions turns by its position's angle.

    out1 = x1 * cos - x2 * sin        out2 = x1 * sin + x2 * cos

The four products and the two sums are each rounded to fp32 on their own (to fp64 for an fp64 x),
then the results once to the dtype of x.  A fused multiply-add would give other bits.
`flash_attn_with_kvcache` rotates by the same rule, so keys that were rotated here and keys that it
rotated are equal byte for byte.  The work sits in one custom op: no compiler looks inside and
fuses a product into a sum, so compiled code gives these bytes too.

Shape letters: b batch, s sequence, h heads, d head dim, t rows of a pack, r = rotary dim / 2.
"""

import torch
from torch import Tensor

from flash_attn import _check_scalars as scalars
from flash_attn.layers import _rotary_checks as checks
from flash_attn.layers._rotation import rotate

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
    checks.halves(x)
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
    checks.reference(x, cos, sin)
    rotary_dim = 2 * cos.shape[-1]

    def for_each_dim(table: Tensor) -> Tensor:  # (..., s, r) -> (..., s, 1, 2r)
        wide = table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)
        return wide.unsqueeze(-2)

    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    turned = turned * for_each_dim(cos) + rotate_half(turned, interleaved) * for_each_dim(sin)
    return torch.cat((turned, rest), dim=-1)


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

    What `seqlen_offsets` and `cu_seqlens` hold is checked on the CPU, and elsewhere with
    FLASH_ATTN_CHECK=1.  Unchecked, a row whose position is outside the tables comes back as it is.

    Returns:
        The shape and dtype of x.
    """
    if cu_seqlens is None:
        checks.rows_and_heads("x", x, "4 dimensions without cu_seqlens, 3 with it")
        offset, offsets = checks.dense("x", x, cos, sin, seqlen_offsets)
        return rotate(x, cos, sin, offset, offsets, interleaved, inplace)
    longest = checks.pack(x, cu_seqlens, max_seqlen)
    batch = cu_seqlens.shape[0] - 1
    offset, offsets = checks.tables("x", x, cos, sin, batch, longest, seqlen_offsets)
    return rotate(
        x,
        cos,
        sin,
        offset,
        offsets,
        interleaved,
        inplace,
        cu_seqlens=cu_seqlens,
        max_seqlen=longest,
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
    queries, keys = checks.heads_of_qkv(qkv, num_heads_q)
    offset, offsets = checks.dense("qkv", qkv, cos, sin, seqlen_offsets)
    checks.both_or_neither(cos_k, sin_k)
    if cos_k is not None and sin_k is not None:
        checks.dense("qkv", qkv, cos_k, sin_k, seqlen_offsets, "_k")
    return rotate(
        qkv,
        cos,
        sin,
        offset,
        offsets,
        interleaved,
        True,
        cos_k=cos_k,
        sin_k=sin_k,
        queries=queries,
        keys=keys,
    )


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotates the keys of kv (b, s, 2, h, d) in place and returns it; go on with that tensor."""
    checks.keys_and_values(kv)
    offset, offsets = checks.dense("kv", kv, cos, sin, seqlen_offsets)
    return rotate(kv, cos, sin, offset, offsets, interleaved, True, queries=0, keys=1)


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
        checks.table_length(seqlen)
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
        # Everything that can be known is checked before anything is written.
        if kv is None:
            checks.heads_of_qkv(qkv, num_heads_q)
        else:
            checks.rows_and_heads("qkv", qkv, "4 dimensions where kv is given")
            checks.keys_and_values(kv)
        offset, offsets = checks.first_positions(seqlen_offset, "seqlen_offset")
        if max_seqlen is None:
            rows = qkv.shape[1] + offset
        else:
            rows = scalars.any_integer("max_seqlen", max_seqlen)
        self._update_cos_sin_cache(rows, qkv.device, qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        assert cos is not None and sin is not None
        cos_k, sin_k = self._cos_k_cached, self._sin_k_cached
        positions = offset if offsets is None else offsets
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, positions, num_heads_q
            )
        if cos_k is None or sin_k is None:
            cos_k, sin_k = cos, sin
        checks.dense("kv", kv, cos_k, sin_k, positions)
        q = apply_rotary_emb(
            qkv, cos, sin, self.interleaved, inplace=True, seqlen_offsets=positions
        )
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, self.interleaved, positions)
