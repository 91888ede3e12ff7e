"""What the rotary functions accept.

A refusal has the type that upstream programs may catch: AssertionError where upstream asserts, and
ValueError for a wrong number of dimensions, which upstream's unpacking of a shape raises.  A
position outside the tables is an IndexError.  The rest is a RuntimeError, as elsewhere here.

Shape letters: b batch, s sequence, h heads, d head dim, t rows of a pack, r = rotary dim / 2.
"""

import torch
from torch import Tensor

from flash_attn import _check_contents
from flash_attn import _check_scalars as scalars
from flash_attn._check_rules import MAX_HEAD_DIM
from flash_attn._refusal import refuse

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
INDEX_DTYPES = (torch.int32, torch.int64)
MAX_POSITIONS = 2**24  # fp32, in which tables are made, tells no more of them apart


def _shape(name: str, tensor: Tensor) -> str:
    return f"{name} of shape {tuple(tensor.shape)}"


def _floating(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in DTYPES:
        rule = "float16, bfloat16, float32 or float64"
        refuse(f"{name} must be real floating-point numbers", f"{tensor.dtype}", rule)


def _same_device(name: str, tensor: Tensor, x_name: str, x: Tensor) -> None:
    if tensor.device != x.device:
        received = f"{x_name} on {x.device}, {name} on {tensor.device}"
        rule = "one device for all tensors"
        refuse(f"{name} is not on the device of {x_name}", received, rule)


# ---- Shapes --------------------------------------------------------------------------------------


def rows_and_heads(name: str, x: Tensor, rule: str) -> None:
    if x.ndim != 4:
        what = f"{name} must have shape (batch, seqlen, nheads, headdim)"
        refuse(what, _shape(name, x), rule, ValueError)


def heads_of_qkv(qkv: Tensor, num_heads_q: int | None) -> tuple[int, int]:
    """How many entries of dimension 2 are queries, and how many are keys."""
    if qkv.ndim == 5:
        if qkv.shape[2] != 3:
            what = "qkv must have shape (batch, seqlen, 3, nheads, headdim)"
            refuse(what, _shape("qkv", qkv), "size 3 in dimension 2", AssertionError)
        return 1, 1
    if qkv.ndim != 4:
        rule = "(b, s, 3, h, d), or (b, s, h_q + 2 * h_kv, d) and num_heads_q"
        what = "qkv must have 4 or 5 dimensions"
        refuse(what, _shape("qkv", qkv), rule, AssertionError)
    if num_heads_q is None:
        what = "num_heads_q is required for a qkv of 4 dimensions"
        refuse(what, _shape("qkv", qkv), "num_heads_q = h_q", AssertionError)
    queries = scalars.any_integer("num_heads_q", num_heads_q)
    keys = (qkv.shape[2] - queries) // 2
    if queries < 0 or keys < 1 or queries + 2 * keys != qkv.shape[2]:
        received = f"{_shape('qkv', qkv)}, {num_heads_q=}"
        what = "qkv must have num_heads_q + 2 * num_heads_k heads"
        rule = "num_heads_q >= 0, num_heads_k >= 1"
        refuse(what, received, rule, AssertionError)
    return queries, keys


def keys_and_values(kv: Tensor) -> None:
    if kv.ndim != 5 or kv.shape[2] != 2:
        what = "kv must have shape (batch, seqlen, 2, nheads, headdim)"
        rule = "5 dimensions, and size 2 in dimension 2"
        refuse(what, _shape("kv", kv), rule, AssertionError)


def reference(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """x (b, s, h, d) or (s, h, d), and tables of (s, r) or (b, s, r): a row for each row of x."""
    if cos.shape != sin.shape or cos.ndim < 2:
        received = f"{_shape('cos', cos)}, {_shape('sin', sin)}"
        what = "cos and sin must have one shape, (s, r) or (b, s, r)"
        refuse(what, received, "equal shapes of 2 or 3 dimensions", AssertionError)
    _rotary_dim("x", x, cos)
    places = x.shape[:-2]
    if x.ndim not in (3, 4) or cos.shape[:-1] not in (places, places[-1:], (1, *places[-1:])):
        received = f"{_shape('x', x)}, {_shape('cos', cos)}"
        rule = "x (b, s, h, d), cos and sin (s, r) or (b, s, r)"
        refuse("cos and sin must have a row for each row of x", received, rule, ValueError)


def halves(x: Tensor) -> None:
    if x.shape[-1] % 2:
        refuse("rotate_half needs pairs", _shape("x", x), "an even last dimension")


def _rotary_dim(name: str, x: Tensor, cos: Tensor) -> None:
    if 2 * cos.shape[-1] > x.shape[-1]:
        received = f"rotary_dim {2 * cos.shape[-1]}, {_shape(name, x)}"
        what = "rotary_dim must be <= headdim"
        refuse(what, received, "cos and sin have at most headdim / 2 columns", AssertionError)


# ---- Tables and offsets --------------------------------------------------------------------------


def first_positions(
    seqlen_offsets: int | Tensor, name: str = "seqlen_offsets"
) -> tuple[int, Tensor | None]:
    """The offsets as (int, tensor or None)."""
    if isinstance(seqlen_offsets, Tensor):
        return 0, seqlen_offsets
    offset = scalars.any_integer(name, seqlen_offsets)
    if offset < 0:
        what = f"{name} must be >= 0"
        refuse(what, f"{name}={offset}", "the position of a first row", AssertionError)
    return offset, None


def pack(x: Tensor, cu_seqlens: Tensor, max_seqlen: int | None) -> int:
    """x: (t, h, d).  Returns max_seqlen."""
    if max_seqlen is None:
        what = "If cu_seqlens is passed in, then max_seqlen must be passed"
        refuse(what, "cu_seqlens, max_seqlen=None", "both or neither", AssertionError)
    longest = scalars.any_integer("max_seqlen", max_seqlen)
    scalars.not_negative("max_seqlen", longest)
    if x.ndim != 3:
        what = "x must have shape (total, nheads, headdim) with cu_seqlens"
        rule = "3 dimensions with cu_seqlens, 4 without it"
        refuse(what, _shape("x", x), rule, ValueError)
    _same_device("cu_seqlens", cu_seqlens, "x", x)
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
        rule = "one dimension: where each sequence starts, and where the last one ends"
        refuse("cu_seqlens must have shape (b + 1)", _shape("cu_seqlens", cu_seqlens), rule)
    if cu_seqlens.dtype not in INDEX_DTYPES:
        what = "cu_seqlens must have dtype int32 or int64"
        refuse(what, f"{cu_seqlens.dtype}", "torch.int32 or torch.int64")
    return longest


def dense(
    name: str, x: Tensor, cos: Tensor, sin: Tensor, seqlen_offsets: int | Tensor, suffix: str = ""
) -> tuple[int, Tensor | None]:
    """`tables` for x (b, s, ..., d)."""
    return tables(name, x, cos, sin, x.shape[0], x.shape[1], seqlen_offsets, suffix)


def tables(
    x_name: str,
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    batch: int,
    seqlen: int,
    seqlen_offsets: int | Tensor,
    suffix: str = "",
) -> tuple[int, Tensor | None]:
    """Tables for `batch` sequences of `seqlen` rows; `suffix` ends their names.

    Checks what can be known without reading a tensor.  Returns `first_positions`.
    """
    _floating(x_name, x)
    for name, table in ((f"cos{suffix}", cos), (f"sin{suffix}", sin)):
        _same_device(name, table, x_name, x)
        _floating(name, table)
    if cos.ndim != 2 or cos.shape != sin.shape:
        what = f"cos{suffix} and sin{suffix} must have one shape, (S_ro, r)"
        received = f"{_shape(f'cos{suffix}', cos)}, {_shape(f'sin{suffix}', sin)}"
        refuse(what, received, "2 dimensions, equal sizes", AssertionError)
    _rotary_dim(x_name, x, cos)
    if x.shape[-1] > MAX_HEAD_DIM:
        what = f"Only support headdim <= {MAX_HEAD_DIM}"
        rule = f"d <= {MAX_HEAD_DIM}"
        refuse(what, _shape(x_name, x), rule, AssertionError)
    rows = cos.shape[0]
    if rows < seqlen:
        received = f"cos{suffix} of {rows} rows for {seqlen} positions"
        rule = f"cos{suffix} and sin{suffix} have a row for each position"
        refuse("seqlen_ro must be >= seqlen", received, rule, AssertionError)
    offset, offsets = first_positions(seqlen_offsets)
    if offsets is None:
        if offset + seqlen > rows:
            received = f"seqlen_offsets={offset}, seqlen={seqlen}, seqlen_ro={rows}"
            rule = f"cos{suffix} and sin{suffix} have a row for each position"
            what = "seqlen_offsets + seqlen must be <= seqlen_ro"
            refuse(what, received, rule, AssertionError)
        return offset, None
    _same_device("seqlen_offsets", offsets, x_name, x)
    if offsets.shape != (batch,):
        received, rule = _shape("seqlen_offsets", offsets), f"here that is ({batch},)"
        what = "seqlen_offsets must have shape (batch,)"
        refuse(what, received, rule, AssertionError)
    if offsets.dtype not in INDEX_DTYPES:
        what = "seqlen_offsets must have dtype int32 or int64"
        refuse(what, f"{offsets.dtype}", "torch.int32 or torch.int64", AssertionError)
    return 0, offsets


def both_or_neither(cos_k: Tensor | None, sin_k: Tensor | None) -> None:
    if (cos_k is None) != (sin_k is None):
        received = f"{'sin_k' if cos_k is None else 'cos_k'} alone"
        refuse("cos_k and sin_k come together", received, "both or neither", AssertionError)


def table_length(seqlen: int) -> None:
    scalars.not_negative("seqlen", seqlen)
    if seqlen > MAX_POSITIONS:
        rule = f"at most {MAX_POSITIONS} rows, the positions that fp32 tells apart"
        refuse("the rotary tables would be too long", f"{seqlen} rows", rule)


# ---- Contents of index tensors -------------------------------------------------------------------


def contents(
    x: Tensor,
    rows: int,
    seqlen_offsets: Tensor | None,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
) -> None:
    """Every row of a sequence has a row of the tables, of which there are `rows`.

    An int offset has been checked already, for every sequence up to max_seqlen.
    """
    lengths: Tensor | int = x.shape[1]
    if cu_seqlens is not None:
        total = x.shape[0]
        lengths = _check_contents.offsets(
            "cu_seqlens", cu_seqlens.cpu(), total, "max_seqlen", max_seqlen
        )
    if seqlen_offsets is None:
        return
    first = seqlen_offsets.cpu()
    # An empty sequence has no position.
    outside = torch.as_tensor(lengths > 0, device="cpu") & ((first < 0) | (first > rows - lengths))
    if bool(outside.any()):
        i = int(outside.nonzero()[0])
        start, length = int(first[i]), lengths if isinstance(lengths, int) else int(lengths[i])
        received = f"positions {start} to {start + length - 1} of sequence {i}"
        rule = f"0 <= position < {rows}, the rows of cos and sin"
        what = "a position is outside the rotary tables"
        refuse(what, received, rule, IndexError)
