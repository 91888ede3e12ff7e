"""The rules that arguments must keep, and every message that a user can meet.

One function is one group of rules; ``_checks.py`` says which groups hold for which operation. Every
message has the same three parts

    flash_attn: <what is wrong>; received <what came>; rule: <what is accepted>

and where flash-attn 2.8 has a text for the case, <what is wrong> holds its words, because programs
match on them. A decode call passes through here once per layer and token. So a rule that accepts
reads metadata only, or runs one vectorised test over an index tensor; the first offending index is
looked for once that test has failed.
"""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from flash_attn import _native

MAX_HEAD_DIM = 256
MAX_NUM_SPLITS = 128
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def refuse(what: str, received: str, rule: str, error: type[Exception] = RuntimeError) -> NoReturn:
    raise error(f"flash_attn: {what}; received {received}; rule: {rule}")


# ---- Scalars -------------------------------------------------------------------------------------


def window(window_size: Sequence[int] | Tensor) -> tuple[int, int]:
    """The window as two ints; callers pass a tuple, a list or a CPU tensor."""
    entries = window_size.tolist() if isinstance(window_size, Tensor) else window_size
    if not isinstance(entries, (tuple, list)) or len(entries) != 2:
        rule = "(left, right), two integers, where a negative one means unlimited"
        refuse("window_size must have two entries", f"{window_size!r}", rule)
    return integer("window_size", entries[0]), integer("window_size", entries[1])


def integer(name: str, value: Any) -> int:
    """``value`` as an int. Its size has rules of its own, which run inside the ops: under
    torch.compile nothing may be known about it yet."""
    if isinstance(value, int):
        return value
    try:  # integers of numpy, and integer tensors with one element; a float has no __index__
        return operator.index(value)
    except (TypeError, RuntimeError):
        refuse(f"{name} must hold integers", f"{value!r}", "an int, or an integer tensor")


def not_negative(name: str, value: int) -> None:
    if value < 0:
        refuse(f"{name} must not be negative", f"{name}={value}", f"{name} >= 0")


def generator_is_none(gen: object) -> None:
    if gen is not None:
        what = "The `generator` argument is no longer supported"
        refuse(what, f"a {type(gen).__name__}", "pass None and seed PyTorch's default generator")


def scalars(
    dropout_p: float, softmax_scale: float | None, softcap: float, return_softmax: bool = False
) -> None:
    if not 0.0 <= dropout_p < 1.0:  # true for NaN as well, like the tests below
        refuse("dropout_p (p_dropout) is out of range", f"{dropout_p=}", "0 <= dropout_p < 1")
    if softmax_scale is not None and not math.isfinite(softmax_scale):
        refuse("softmax_scale is not finite", f"{softmax_scale=}", "a finite number")
    if not 0.0 <= softcap < math.inf:
        refuse("softcap is out of range", f"{softcap=}", "finite and >= 0, where 0 means off")
    if softcap > 0.0 and dropout_p > 0.0:
        what = "Softcapping does not support dropout for now"
        refuse(what, f"{softcap=}, {dropout_p=}", "at most one of the two is above 0")
    if return_softmax and dropout_p == 0.0:
        what = "return_softmax is only supported when p_dropout > 0.0"
        refuse(what, f"{return_softmax=}, {dropout_p=}", "S_dmask exists only under dropout")


def splits(num_splits: int) -> None:
    not_negative("num_splits", num_splits)
    if num_splits > MAX_NUM_SPLITS:
        what = f"num_splits > {MAX_NUM_SPLITS} not supported"
        refuse(what, f"{num_splits=}", f"0 (automatic) to {MAX_NUM_SPLITS}")


# ---- One tensor ----------------------------------------------------------------------------------


def device(wanted: torch.device) -> None:
    """The one place that decides whether this installation can compute on a device."""
    if wanted.type == "cpu":
        return
    if wanted.type == "cuda" and torch.cuda.is_available():
        capability = torch.cuda.get_device_capability(wanted)
        if capability < (8, 0):
            what = "FlashAttention only supports Ampere GPUs or newer"
            refuse(what, f"{wanted} of capability {capability}", "capability 8.0 or above")
        if _native.cuda_archs():
            return
    what = f"this installation holds no {wanted.type.upper()} kernels"
    refuse(what, f"a tensor on {wanted}", "all tensors are on the CPU")


def dtype(wanted: torch.dtype, on: torch.device) -> None:
    if wanted not in DTYPES or (wanted == torch.float32 and on.type != "cpu"):
        what = "FlashAttention only support fp16 and bf16 data type (on the CPU fp32 as well)"
        refuse(what, f"{wanted} on {on}", "float16, bfloat16, on the CPU float32")


def same_device(name: str, tensor: Tensor, q: Tensor) -> None:
    if tensor.device != q.device:
        received = f"q on {q.device}, {name} on {tensor.device}"
        refuse(f"{name} is not on the device of q", received, "one device for all tensors")


def shape(name: str, tensor: Tensor, letters: str, expected: Sequence[int | None]) -> None:
    """``letters`` spell the shape in the message; None stands for any size."""
    got = tensor.shape
    if got == expected or (
        len(got) == len(expected)
        and all(w in (None, g) for g, w in zip(got, expected, strict=True))
    ):
        return
    sizes = ", ".join("any" if size is None else str(size) for size in expected)
    received = f"{name} of shape {tuple(tensor.shape)}"
    refuse(f"{name} must have shape ({letters})", received, f"here that is ({sizes})")


def last_stride(what: str, name: str, tensor: Tensor) -> None:
    # With one element or none along a dimension, its stride is never used.
    if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
        what = f"{what} must have contiguous last dimension"
        refuse(what, f"{name} with strides {tensor.stride()}", "stride 1 along the last dimension")


def like_q(
    name: str, tensor: Tensor, q: Tensor, letters: str, expected: Sequence[int | None], pair: str
) -> None:
    """A tensor of the device and dtype of q (``pair`` names the two), with a shape of its own."""
    same_device(name, tensor, q)
    if tensor.dtype != q.dtype:
        received = f"q of {q.dtype}, {name} of {tensor.dtype}"
        refuse(f"{pair} must have the same dtype", received, "the dtype of q")
    shape(name, tensor, letters, expected)


def fp32(what: str, name: str, tensor: Tensor, q: Tensor) -> None:
    same_device(name, tensor, q)
    if tensor.dtype != torch.float32:
        refuse(f"{what} must have dtype fp32", f"{name} of {tensor.dtype}", "torch.float32")


def index(name: str, tensor: Tensor, q: Tensor, letters: str, *expected: int | None) -> None:
    """Metadata of an index tensor; its contents have rules of their own."""
    same_device(name, tensor, q)
    if tensor.dtype != torch.int32:
        refuse(f"{name} must have dtype int32", f"{name} of {tensor.dtype}", "torch.int32")
    shape(name, tensor, letters, expected)


# ---- The tensors of a call -----------------------------------------------------------------------


def packed(name: str, tensor: Tensor, count: int) -> None:
    """``kv`` holds 2 and ``qkv`` holds 3 tensors along dimension -3."""
    if tensor.dim() not in (4, 5) or tensor.shape[-3] != count:
        what = f"{name} must have shape (b, s, {count}, h, d) or (total, {count}, h, d)"
        received = f"{name} of shape {tuple(tensor.shape)}"
        refuse(what, received, f"4 or 5 dimensions, and size {count} in dimension -3")


def qkv(
    q: Tensor, k: Tensor, v: Tensor, q_letters: str, k_letters: str, *, suffix: str = ""
) -> None:
    """Queries, keys and values; ``suffix`` is "_cache" where k and v are the caches."""
    device(q.device)
    dtype(q.dtype, q.device)
    shape("q", q, q_letters, (None,) * (q_letters.count(",") + 1))
    k_shape = (None,) * k_letters.count(",") + (q.shape[-1],)
    like_q(f"k{suffix}", k, q, k_letters, k_shape, "query and key")
    like_q(f"v{suffix}", v, q, k_letters, k.shape, "query and value")
    if suffix:  # other inputs are copied when their last stride is not 1; a cache is written to
        what = "Input tensor must have contiguous last dimension"
        last_stride(f"{what}: k_cache", "k_cache", k)
        last_stride(f"{what}: v_cache", "v_cache", v)


def sizes(b: int, q: Tensor, k: Tensor, phase: str, low_level: bool) -> None:
    h_q, h_kv, d = q.shape[-2], k.shape[-2], q.shape[-1]
    if b < 1:
        refuse("batch size must be positive", f"{b=}", "b >= 1")
    if d > MAX_HEAD_DIM:
        what = f"FlashAttention {phase} only supports head dimension at most {MAX_HEAD_DIM}"
        refuse(what, f"{d=}", f"1 <= d <= {MAX_HEAD_DIM}")
    if d < 1:
        refuse("head dimension must be positive", f"{d=}", f"1 <= d <= {MAX_HEAD_DIM}")
    if low_level and d % 8 != 0:
        what = "query, key, value, and out_ must have a head_size that is a multiple of 8"
        if phase == "backward":
            what = "head_size should be a multiple of 8"
        refuse(what, f"{d=}", "d % 8 == 0 in the low-level ops; the public functions take any d")
    if h_q < 1 or h_kv < 1 or h_q % h_kv != 0:
        what = "Number of heads in key/value must divide number of heads in query"
        refuse(what, f"{h_q=}, {h_kv=}", "both are at least 1 and h_q % h_kv == 0")


def alibi(alibi_slopes: Tensor | None, q: Tensor, b: int) -> None:
    if alibi_slopes is None:
        return
    h_q = q.shape[-2]
    fp32("ALiBi slopes", "alibi_slopes", alibi_slopes, q)
    if alibi_slopes.shape not in ((h_q,), (b, h_q)):
        received = f"alibi_slopes of shape {tuple(alibi_slopes.shape)}"
        rule = f"here that is {(h_q,)} or {(b, h_q)}"
        refuse("alibi_slopes must have shape (h_q) or (b, h_q)", received, rule)
    last_stride("ALiBi slopes tensor", "alibi_slopes", alibi_slopes)


def block_table(table: Tensor, q: Tensor, b: int, page_size: int, leftpad: Tensor | None) -> int:
    """Metadata of a paged cache; returns the number of keys that one row of the table can hold."""
    if leftpad is not None:
        what = "We don't support Paged KV and leftpad_k running at the same time yet"
        refuse(what, "block_table and left padding", "at most one of the two")
    index("block_table", table, q, "b, max_blocks", b, None)
    page(page_size, q.device)
    return table.shape[1] * page_size


def page(size: int, on: torch.device) -> None:
    # The CPU family looks each key up in the table, the GPU families as many as a copy takes along.
    # flash-attn asks for 256.
    step = 16 if on.type == "cuda" else 1
    if size < 1 or size % step != 0:
        what = "Paged KV cache block size must be divisible by 16 (on the CPU: at least 1)"
        refuse(what, f"page size {size} on {on}", f"a positive multiple of {step} here")


def cache_rows(cache_batch_idx: Tensor | None, k_cache: Tensor, b: int, paged: bool) -> None:
    if cache_batch_idx is not None and paged:
        what = "Paged KVcache does not support cache_batch_idx"
        refuse(what, "block_table and cache_batch_idx", "at most one of the two")
    if cache_batch_idx is None and not paged and k_cache.shape[0] < b:
        what = "k_cache must have shape (b_cache, s_cache, h_kv, d) with a row for each sequence"
        received = f"k_cache of shape {tuple(k_cache.shape)} and q with {b=}"
        refuse(what, received, "b_cache >= b, or cache_batch_idx")


def new_keys(
    q: Tensor, k: Tensor | None, v: Tensor | None, h_kv: int, seqlens: object, capacity: int
) -> int:
    """Keys and values to append; returns how many each sequence gets."""
    if k is None:
        if v is not None:
            what = "If value is supplied, key must also be passed in"
            refuse(what, "v without k", "both or neither")
        return 0
    if v is None:
        refuse("If key is supplied, value must also be passed in", "k without v", "both or neither")
    if seqlens is None:
        what = "If key is supplied, seqlens_k must also be passed in"
        refuse(what, "k without cache_seqlens", "cache_seqlens says where the new keys go")
    # flash-attn has this among its errors, although s_q > capacity would be well defined. Kept, for
    # a program that runs there cannot run into it, and one that expects the refusal finds it.
    if q.shape[1] > capacity:
        what = "If key is supplied, seqlen_q must be <= seqlen_k, the seqlen of the KV cache"
        refuse(what, f"s_q={q.shape[1]}, {capacity=}", "s_q <= capacity in a call that appends")
    k_shape = (q.shape[0], None, h_kv, q.shape[3])
    like_q("k", k, q, "b, s_new, h_kv, d", k_shape, "query and key")
    like_q("v", v, q, "b, s_new, h_kv, d", k.shape, "query and value")
    return k.shape[1]


def rotary(
    q: Tensor, k: Tensor | None, cos: Tensor | None, sin: Tensor | None, capacity: int
) -> None:
    if cos is None and sin is None:
        return
    if cos is None or sin is None:
        what = "If rotary cos is provided, rotary sin must also be provided"
        refuse(what, f"rotary_{'sin' if cos is None else 'cos'} alone", "both or neither")
    if k is None:
        what = (
            "If rotary cos/sin are provided, new key / value to be appended to KV cache must also"
        )
        refuse(f"{what} be provided", "rotary_cos and rotary_sin without k", "rotary needs k and v")
    for name, table in (("rotary_cos", cos), ("rotary_sin", sin)):
        expected = (None, None) if table is cos else cos.shape
        like_q(name, table, q, "s_rotary, rotary_dim / 2", expected, f"query and {name}")
        if not table.is_contiguous():
            refuse(f"{name} must be contiguous", f"strides {table.stride()}", "a contiguous table")
    rotary_dim, d = 2 * cos.shape[1], q.shape[3]
    if rotary_dim > d:
        refuse("rotary_dim must be <= headdim", f"{rotary_dim=}, {d=}", "rotary_dim <= d")
    if rotary_dim % 16 != 0:
        what = "Only rotary dimensions divisible by 16 are currently supported"
        refuse(what, f"{rotary_dim=}", "rotary_dim % 16 == 0")
    if cos.shape[0] < capacity:
        what = "cos/sin seqlen must be at least the seqlen of KV cache"
        refuse(what, f"{cos.shape[0]} rows, {capacity=}", "one row for each row of the cache")


def saved_for_backward(
    q: Tensor, out: Tensor, softmax_lse: Tensor, rng_state: Tensor | None, dropout_p: float
) -> None:
    """What the forward returned. The dense lse is (b, h_q, s_q), the varlen one (h_q, total_q)."""
    like_q("out", out, q, "the shape of q", q.shape, "query and out")
    *b, s_q, h_q, _ = q.shape
    fp32("softmax_lse", "softmax_lse", softmax_lse, q)
    letters = "b, h_q, s_q" if b else "h_q, total_q"
    shape("softmax_lse", softmax_lse, letters, (*b, h_q, s_q))
    if rng_state is not None:
        same_device("rng_state", rng_state, q)
        if rng_state.dtype != torch.int64:
            refuse("rng_state must have dtype int64", f"{rng_state.dtype}", "torch.int64")
        shape("rng_state", rng_state, "2", (2,))
    elif dropout_p > 0.0:
        what = "rng_state must be passed to a backward with dropout"
        refuse(what, f"rng_state=None, {dropout_p=}", "the rng_state that the forward returned")


def gradient(name: str, tensor: Tensor | None, of: Tensor, q: Tensor) -> None:
    """dout, or a buffer for dq, dk or dv where the caller passes one."""
    if tensor is not None:
        shape_of = "out" if name == "dout" else name[1:]
        like_q(name, tensor, q, f"the shape of {shape_of}", of.shape, f"query and {name}")


def gradient_refused(option: str) -> NoReturn:
    refuse(
        "the backward pass does not support this forward pass",
        f"{option} in the forward pass",
        "gradients need dense or packed keys: no block_table, leftpad_k or seqused_k",
    )


def forward_mode_refused(name: str) -> NoReturn:
    what = "forward-mode derivatives (jvp, jacfwd, linearize, dual tensors) are not supported"
    refuse(what, f"a tangent of {name}", "reverse mode: backward, autograd.grad, func.grad, jacrev")


def second_derivative_refused() -> NoReturn:
    what = "second derivatives (double backward, hessian) are not supported"
    refuse(what, "a backward pass through the gradients of attention", "differentiate it once")


def cache_gradient_refused() -> NoReturn:
    what = "flash_attn_with_kvcache has no gradient"
    rule = "gradients need flash_attn_func or flash_attn_varlen_func"
    refuse(what, "a backward pass through its result", rule)


def transform_refused(function: str) -> NoReturn:
    rule = "a call outside, or apply_rotary_emb_torch, which is plain PyTorch and rounds otherwise"
    refuse(f"{function} does not run inside torch.func", "a call inside a transform", rule)


def vmap_refused(names: str) -> NoReturn:
    what = "vmap is not supported where a call writes into its arguments"
    refuse(what, f"vmap over {names}", "one call for each, or the batch dimension of the call")


def partials(out: Tensor, max_log2: Tensor, sum: Tensor, reduced: torch.dtype) -> None:
    dtype(reduced, out.device)
    for name, tensor in (("out", out), ("max_log2", max_log2), ("sum", sum)):
        fp32(f"partials.{name}", name, tensor, out)
    if out.dim() not in (4, 5):
        what = "partials.out must have shape (n, b, s_q, h_q, d) or (n, total_q, h_q, d)"
        refuse(what, f"out of shape {tuple(out.shape)}", "segments, then as q")
    *leading, s_q, h_q, _ = out.shape
    letters = "n, b, h_q, s_q" if len(leading) == 2 else "n, h_q, total_q"
    shape("partials.max_log2", max_log2, letters, (*leading, h_q, s_q))
    shape("partials.sum", sum, letters, (*leading, h_q, s_q))


# ---- Contents of index tensors -------------------------------------------------------------------
# Called for tensors in the CPU's memory, and for others when FLASH_ATTN_CHECK=1: reading those
# makes the call wait for the GPU. Without it the kernels bound what they read, and refuse nothing.


def reads_contents(of: torch.device) -> bool:
    return of.type == "cpu" or os.environ.get("FLASH_ATTN_CHECK", "0") == "1"


def extremes(values: Tensor | int) -> tuple[int, int]:
    if isinstance(values, int):
        return values, values
    smallest, largest = torch.aminmax(values)
    return int(smallest), int(largest)


def in_range(name: str, values: Tensor, limit: int, what: str, rule: str) -> None:
    """0 <= value <= limit for every sequence."""
    smallest, largest = extremes(values)
    if smallest < 0 or largest > limit:
        i = int(((values < 0) | (values > limit)).nonzero()[0])
        refuse(what, f"{name}[{i}] = {int(values[i])}", rule)


def at_most(name: str, values: Tensor, limits: Tensor | int, rule: str) -> None:
    """0 <= values[i] <= limits[i] for every sequence i."""
    bad = (values < 0) | (values > limits)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        limit = int(torch.as_tensor(limits, device="cpu").expand(values.shape)[i])
        received = f"{name}[{i}] = {int(values[i])} where sequence {i} has {limit} keys"
        refuse(f"{name} is out of range", received, rule)


def offsets(name: str, cu_seqlens: Tensor, total: int | None, max_name: str, limit: int) -> Tensor:
    """Offsets into a pack of ``total`` rows (None: only the lengths count); returns the lengths."""
    lengths = cu_seqlens.to(torch.int64).diff()  # differences of int32 could overflow
    smallest, largest = extremes(lengths)
    if smallest < 0:
        i = int((lengths < 0).nonzero()[0])
        received = f"{name}[{i}:{i + 2}] = {cu_seqlens[i : i + 2].tolist()}"
        refuse(f"{name} must not decrease", received, "no offset is below the one before it")
    if total is not None:
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0:
            refuse(f"{name} must start at 0", f"{name}[0] = {first}", "the first offset is 0")
        if last > total:
            i = int((cu_seqlens > total).nonzero()[0])
            received = f"{name}[{i}] = {int(cu_seqlens[i])} for a pack of {total} rows"
            refuse(f"{name} points outside its pack", received, f"offsets are at most {total}")
    if largest > limit:
        i = int((lengths > limit).nonzero()[0])
        received = f"length {int(lengths[i])} of sequence {i}, {max_name}={limit}"
        refuse(f"a sequence of {name} exceeds {max_name}", received, f"length <= {max_name}")
    return lengths


def cache_lengths(cache_seqlens: Tensor | int, s_new: int, capacity: int, home: str) -> int:
    """The keys of each sequence, and those it appends, fit the cache; returns the longest."""
    smallest, longest = extremes(cache_seqlens)
    if smallest >= 0 and longest + s_new <= capacity:
        return longest
    values = torch.as_tensor(cache_seqlens, device="cpu").reshape(-1)
    i = int(((values < 0) | (values > capacity - s_new)).nonzero()[0])
    what = f"cache_seqlens exceeds the capacity of {home}"
    if int(values[i]) < 0:
        what = "cache_seqlens must not be negative"
    elif s_new:
        what = f"the append of {s_new} key(s) at cache_seqlens runs past the end of {home}"
    received = f"cache_seqlens[{i}] = {int(values[i])}, {s_new=}, {capacity=}"
    refuse(what, received, "0 <= cache_seqlens and cache_seqlens + s_new <= capacity")


def pages(table: Tensor, num_blocks: int, page_size: int, keys: Tensor | int) -> None:
    """Each page that holds a key exists; entries behind a sequence's last page may be anything."""
    if table.numel() == 0:
        return
    smallest, largest = extremes(table)
    if smallest >= 0 and largest < num_blocks:
        return
    keys = torch.as_tensor(keys, device="cpu")
    used_blocks = (keys.reshape(-1, 1) + (page_size - 1)) // page_size
    used = torch.arange(table.shape[1], device="cpu") < used_blocks  # (b or 1, max_blocks)
    bad = used & ((table < 0) | (table >= num_blocks))
    if bool(bad.any()):
        i, j = bad.nonzero()[0].tolist()
        received = f"block_table[{i}, {j}] = {int(table[i, j])}"
        rule = f"0 <= page < {num_blocks} in every entry that a sequence uses"
        refuse("block_table names a page outside the cache", received, rule)


def append_places(name: str, places: Tensor) -> None:
    """No two sequences append to one place: the bytes would depend on which of them comes last."""
    values, counts = torch.unique(places, return_counts=True)
    if int(counts.max()) > 1:
        received = f"row {int(values[counts > 1][0])} of the cache {int(counts.max())} times"
        what = f"{name} makes sequences append to one place, and no rule says which of them wins"
        refuse(what, received, "in deterministic mode each appended key has a place of its own")


def rotary_reach(cos: Tensor, last_position: int) -> None:
    """Queries are rotated too, and without as many new keys their positions may pass the cache."""
    if last_position >= cos.shape[0]:
        received = f"{cos.shape[0]} rows and a query at position {last_position}"
        refuse("cos/sin seqlen must reach the last query", received, "one row for each position")


def packed_only(**options: Tensor | None) -> None:
    for name, tensor in options.items():
        if tensor is not None:
            received = f"{name} of shape {tuple(tensor.shape)}"
            refuse(
                f"{name} needs a packed batch", received, "cu_seqlens_q and cu_seqlens_k as well"
            )
