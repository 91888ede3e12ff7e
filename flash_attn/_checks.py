"""Which rules hold for which operation: one entry point for each.

The ops call these before they allocate or write anything, so that a refused call leaves caches and
output buffers as they were. The rules themselves lie beside this file, by what they are about:
scalars, tensors (``_check_rules.py``), what index tensors hold, and memory that is written.
Entry points take the arguments of their operation by upstream's names, and raise RuntimeError. The
short ones, from ``_check_scalars.py`` for the most part, are for the functions in front of the ops:
they settle types, and return what an op's schema takes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn import _check_contents as contents
from flash_attn import _check_memory as memory
from flash_attn import _check_rules as rules
from flash_attn import _check_scalars as scalars
from flash_attn._check_rules import cache_gradient_refused as refuse_cache_gradient
from flash_attn._check_rules import forward_mode_refused as refuse_forward_mode
from flash_attn._check_rules import gradient_refused as refuse_gradient
from flash_attn._check_rules import options as check_options
from flash_attn._check_rules import packed as check_packed
from flash_attn._check_rules import packed_only as check_packed_only
from flash_attn._check_rules import partials as check_partials
from flash_attn._check_rules import present as check_present
from flash_attn._check_rules import second_derivative_refused as refuse_second_derivative
from flash_attn._check_rules import tensors as check_tensors
from flash_attn._check_rules import transform_refused as refuse_transform
from flash_attn._check_rules import vmap_refused as refuse_vmap
from flash_attn._check_scalars import cache_length as check_cache_length
from flash_attn._check_scalars import flag as check_flag
from flash_attn._check_scalars import generator_is_none as check_generator_is_none
from flash_attn._check_scalars import integer as check_length
from flash_attn._check_scalars import number as check_number
from flash_attn._check_scalars import optional_number as check_optional_number
from flash_attn._check_scalars import splits as check_num_splits
from flash_attn._check_scalars import window as check_window
from flash_attn._mode import is_deterministic

__all__ = [
    "check_backward",
    "check_cache_length",
    "check_cache_ranks",
    "check_dense",
    "check_flag",
    "check_generator_is_none",
    "check_kvcache",
    "check_length",
    "check_num_splits",
    "check_number",
    "check_optional_number",
    "check_options",
    "check_packed",
    "check_packed_only",
    "check_partials",
    "check_present",
    "check_same_device",
    "check_sizes",
    "check_tensors",
    "check_varlen",
    "check_varlen_backward",
    "check_window",
    "refuse_cache_gradient",
    "refuse_forward_mode",
    "refuse_gradient",
    "refuse_second_derivative",
    "refuse_transform",
    "refuse_vmap",
]

# Shapes by their letters, as the messages print them.
_Q, _K = "b, s_q, h_q, d", "b, s_k, h_kv, d"
_PACKED_Q, _PACKED_K = "total_q, h_q, d", "total_k, h_kv, d"
_CACHE, _PAGES = "b_cache, s_cache, h_kv, d", "num_blocks, page_size, h_kv, d"


def check_dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    *,
    low_level_head_dim: bool,
    return_softmax: bool,
) -> None:
    scalars.scoring(dropout_p, softmax_scale, softcap, return_softmax)
    _check_dense_qkv(q, k, v, "forward", low_level_head_dim)
    rules.alibi(alibi_slopes, q, q.shape[0])


def check_sizes(
    b: int,
    s_q: int,
    s_k: int,
    h_q: int,
    h_kv: int,
    d: int,
    dtype: torch.dtype,
    device: torch.device,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """What a dense call of these sizes is refused for; returns its q and k, without memory."""
    check_num_splits(num_splits)
    rules.device(device)
    rules.dtype(dtype, device)
    sizes = {"b": b, "s_q": s_q, "s_k": s_k, "h_q": h_q, "h_kv": h_kv, "d": d}
    for name, size in sizes.items():  # no tensor has a negative one, so no other rule meets it
        scalars.not_negative(name, size)
    q = torch.empty((b, s_q, h_q, d), dtype=dtype, device="meta")
    k = torch.empty((b, s_k, h_kv, d), dtype=dtype, device="meta")
    rules.sizes(b, q, k, "forward", low_level=False)
    return q, k


def check_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    *,
    low_level_head_dim: bool = True,
) -> None:
    scalars.scoring(dropout_p, softmax_scale, softcap)
    _check_dense_qkv(q, k, v, "backward", low_level_head_dim)
    rules.alibi(alibi_slopes, q, q.shape[0])
    rules.saved_for_backward(q, out, softmax_lse, rng_state, dropout_p)
    _check_gradients(dout, q, k, v, out, softmax_lse, dq, dk, dv)


def _check_dense_qkv(q: Tensor, k: Tensor, v: Tensor, phase: str, low_level: bool) -> None:
    rules.qkv(q, k, v, _Q, _K)
    rules.sizes(q.shape[0], q, k, phase, low_level)
    rules.shape("k", k, _K, (q.shape[0], *k.shape[1:]))


def check_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    block_table: Tensor | None,
    leftpad_k: Tensor | None,
    seqused_k: Tensor | None,
    *,
    low_level_head_dim: bool,
    return_softmax: bool,
) -> None:
    paged = block_table is not None
    scalars.scoring(dropout_p, softmax_scale, softcap, return_softmax)
    rules.qkv(q, k, v, _PACKED_Q, _PAGES if paged else _PACKED_K)
    lengths = (max_seqlen_q, max_seqlen_k)
    cu_seqlens_q, cu_seqlens_k = _check_cu_seqlens(q, cu_seqlens_q, cu_seqlens_k, *lengths)
    b = cu_seqlens_q.shape[0] - 1
    rules.sizes(b, q, k, "forward", low_level_head_dim)
    if return_softmax:
        scalars.s_dmask(b, q.shape[1], max_seqlen_q, max_seqlen_k)
    rules.alibi(alibi_slopes, q, b)
    room = k.shape[0]  # keys of the pack, or of one row of the table
    if block_table is not None:
        room = rules.block_table(block_table, q, b, k.shape[1], leftpad_k)
    if leftpad_k is not None:
        rules.index("leftpad_k", leftpad_k, q, "b", b)
    if seqused_k is not None:
        rules.index("seqused_k", seqused_k, q, "b", b)
    if not contents.reads_contents(q.device):
        return

    cu_seqlens_q, cu_seqlens_k = cu_seqlens_q.cpu(), cu_seqlens_k.cpu()
    block_table, leftpad_k, seqused_k = _on_host(block_table, leftpad_k, seqused_k)
    contents.offsets("cu_seqlens_q", cu_seqlens_q, q.shape[0], "max_seqlen_q", max_seqlen_q)
    # Lengths of the keys. With seqused_k, cu_seqlens_k only says where a sequence starts and how
    # many keys lie there; in a paged cache it then says nothing, and is not read.
    keys: Tensor
    total_k = None if paged else room
    if seqused_k is None:
        keys = contents.offsets("cu_seqlens_k", cu_seqlens_k, total_k, "max_seqlen_k", max_seqlen_k)
    else:
        keys = seqused_k
        what, rule = "seqused_k is out of range", f"0 <= seqused_k <= {max_seqlen_k=}"
        contents.in_range("seqused_k", keys, max_seqlen_k, what, rule)
        if total_k is not None:
            in_pack = contents.offsets("cu_seqlens_k", cu_seqlens_k, total_k, "total_k", total_k)
            contents.at_most("seqused_k", keys, in_pack, "seqused_k <= keys of the sequence")
    if leftpad_k is not None:
        contents.at_most("leftpad_k", leftpad_k, keys, "0 <= leftpad_k <= keys of the sequence")
    if block_table is not None:
        what = "a sequence exceeds the capacity of block_table"
        rule = f"at most max_blocks * page_size = {room} keys"
        contents.in_range("keys", keys, room, what, rule)
        contents.pages(block_table, k.shape[0], k.shape[1], keys)


def check_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    rng_state: Tensor | None,
    *,
    low_level_head_dim: bool = True,
) -> None:
    scalars.scoring(dropout_p, softmax_scale, softcap)
    rules.qkv(q, k, v, _PACKED_Q, _PACKED_K)
    lengths = (max_seqlen_q, max_seqlen_k)
    cu_seqlens_q, cu_seqlens_k = _check_cu_seqlens(q, cu_seqlens_q, cu_seqlens_k, *lengths)
    b = cu_seqlens_q.shape[0] - 1
    rules.sizes(b, q, k, "backward", low_level_head_dim)
    rules.alibi(alibi_slopes, q, b)
    rules.saved_for_backward(q, out, softmax_lse, rng_state, dropout_p)
    _check_gradients(dout, q, k, v, out, softmax_lse, dq, dk, dv)
    if contents.reads_contents(q.device):
        contents.offsets(
            "cu_seqlens_q", cu_seqlens_q.cpu(), q.shape[0], "max_seqlen_q", max_seqlen_q
        )
        contents.offsets(
            "cu_seqlens_k", cu_seqlens_k.cpu(), k.shape[0], "max_seqlen_k", max_seqlen_k
        )


def _check_gradients(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
) -> None:
    """dout, and the buffers for gradients that the caller passes."""
    buffers = {}
    for name, tensor, of in (("dq", dq, q), ("dk", dk, k), ("dv", dv, v)):
        if tensor is not None:
            rules.gradient(name, tensor, of, q)
            buffers[name] = tensor
    rules.gradient("dout", dout, q, q)
    inputs = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": softmax_lse}
    memory.written(buffers, inputs)


def _check_cu_seqlens(
    q: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
) -> tuple[Tensor, Tensor]:
    """Metadata of the offsets of a pack; returns them, since the low-level ops can get none."""
    scalars.not_negative("max_seqlen_q", max_seqlen_q)
    scalars.not_negative("max_seqlen_k", max_seqlen_k)
    offsets_q = rules.index("cu_seqlens_q", cu_seqlens_q, q, "b + 1", None)
    offsets_k = rules.index("cu_seqlens_k", cu_seqlens_k, q, "b + 1", offsets_q.shape[0])
    return offsets_q, offsets_k


def check_cache_ranks(q: Tensor, k_cache: Tensor, block_table: Tensor | None) -> None:
    """What must hold before anyone asks for the batch of a call and the capacity of its cache."""
    if q.dim() != 4:
        rules.shape("q", q, _Q, (None,) * 4)
    if k_cache.dim() != 4:
        rules.shape("k_cache", k_cache, _CACHE if block_table is None else _PAGES, (None,) * 4)
    if block_table is not None and block_table.dim() != 2:
        rules.shape("block_table", block_table, "b, max_blocks", (None, None))


def check_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: Tensor | int | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float | None,
    softcap: float,
    alibi_slopes: Tensor | None,
    num_splits: int,
    *,
    rotate_q_rows: bool = True,
) -> None:
    """``rotate_q_rows``: query row i is rotated to position cache_seqlens + i (causal or local
    attention), instead of all rows to cache_seqlens."""
    scalars.scoring(0.0, softmax_scale, softcap)
    check_num_splits(num_splits)
    paged = block_table is not None
    rules.qkv(q, k_cache, v_cache, _Q, _PAGES if paged else _CACHE, suffix="_cache")
    b, s_q = q.shape[:2]
    rules.sizes(b, q, k_cache, "forward", low_level=False)
    rules.alibi(alibi_slopes, q, b)
    rules.cache_rows(cache_batch_idx, k_cache, b, paged)
    page_size = k_cache.shape[1]  # without a block_table a sequence has a single page, its row
    home, capacity = "k_cache", page_size
    if block_table is not None:
        home = "block_table"
        capacity = rules.block_table(block_table, q, b, page_size, cache_leftpad)
    if isinstance(cache_seqlens, Tensor):
        rules.index("cache_seqlens", cache_seqlens, q, "b", b)
    if cache_batch_idx is not None:
        rules.index("cache_batch_idx", cache_batch_idx, q, "b", b)
    if cache_leftpad is not None:
        rules.index("cache_leftpad", cache_leftpad, q, "b", b)
    s_new = rules.new_keys(q, k, v, k_cache.shape[2], cache_seqlens, capacity)
    rules.rotary(q, k, rotary_cos, rotary_sin, capacity)
    if s_new:
        memory.written({"k_cache": k_cache, "v_cache": v_cache}, {"q": q, "k": k, "v": v})
    if not contents.reads_contents(q.device):
        return

    cache_batch_idx, cache_leftpad, block_table = _on_host(
        cache_batch_idx, cache_leftpad, block_table
    )
    if isinstance(cache_seqlens, Tensor):
        cache_seqlens = cache_seqlens.cpu()
    starts = capacity if cache_seqlens is None else cache_seqlens  # where an append would go
    longest = contents.cache_lengths(starts, s_new, capacity, home)
    if cache_batch_idx is not None:
        last = k_cache.shape[0] - 1
        what = "cache_batch_idx names a row outside the cache"
        contents.in_range("cache_batch_idx", cache_batch_idx, last, what, f"0 <= row <= {last}")
    if cache_leftpad is not None:
        rule = "0 <= cache_leftpad <= keys of the sequence, new ones included"
        contents.at_most("cache_leftpad", cache_leftpad, starts + s_new, rule)
    if block_table is not None:
        keys = starts + s_new if s_new else starts
        contents.pages(block_table, k_cache.shape[0], page_size, keys)
    if s_new and is_deterministic():
        if cache_batch_idx is not None:
            contents.append_places("cache_batch_idx", cache_batch_idx)
        elif block_table is not None:
            places = _append_places(block_table, starts, s_new, page_size)
            contents.append_places("block_table", places)
    if rotary_cos is not None:
        rotated = s_q if rotate_q_rows else min(s_q, 1)
        contents.rotary_reach(rotary_cos, longest + rotated - 1)


def _on_host(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if x is None else x.cpu() for x in tensors]


def _append_places(block_table: Tensor, starts: Tensor | int, s_new: int, page_size: int) -> Tensor:
    """Cache rows, counted through all pages, that the new keys go to: (b * s_new,)."""
    first = torch.as_tensor(starts, dtype=torch.int64, device="cpu")
    positions = first.reshape(-1, 1) + torch.arange(s_new, device="cpu")
    positions = positions.expand(block_table.shape[0], s_new)
    pages = block_table.to(torch.int64).gather(1, positions // page_size)
    return (pages * page_size + positions % page_size).flatten()


def check_same_device(q: Tensor, **others: Tensor) -> None:
    """For the fakes, which a call with tensors of several devices may reach."""
    for name, tensor in others.items():
        rules.same_device(name, tensor, q)
