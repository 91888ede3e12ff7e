"""Which rules hold for which operation: one entry point for each.

The ops call these before they allocate or write anything, so that a refused call leaves caches and
output buffers as they were. The rules themselves lie beside this file, by what they are about:
scalars, tensors (``_check_rules.py``), what index tensors hold, and memory that is written.
Entry points take the objects of ``_arguments.py``, and raise RuntimeError in upstream's names. The
short ones, from ``_check_scalars.py`` for the most part, are for the functions in front of the ops:
they settle types, and return what an op's schema takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn import _check_contents as contents
from flash_attn import _check_memory as memory
from flash_attn import _check_rules as rules
from flash_attn import _check_scalars as scalars
from flash_attn._arguments import Append, Cache, Gradients, Inputs, Outputs, Packing, Scoring
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
from flash_attn._native import softmax_scale_of

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
    "settle_scoring",
]

# Shapes by their letters, as the messages print them.
_Q, _K = "b, s_q, h_q, d", "b, s_k, h_kv, d"
_PACKED_Q, _PACKED_K = "total_q, h_q, d", "total_k, h_kv, d"
_CACHE, _PAGES = "b_cache, s_cache, h_kv, d", "num_blocks, page_size, h_kv, d"


def settle_scoring(
    q: Tensor,
    softmax_scale: Any,
    causal: Any,
    window_size: Sequence[int] | Tensor,
    softcap: Any,
    alibi_slopes: Tensor | None,
    dropout_p: Any = 0.0,
) -> Scoring:
    """The numbers and switches of a score, in whatever type they come."""
    left, right = check_window(window_size)
    dropout_p = check_number("dropout_p", dropout_p)
    softmax_scale = softmax_scale_of(q, check_optional_number("softmax_scale", softmax_scale))
    causal = check_flag("causal", causal)
    softcap = check_number("softcap", softcap)
    return Scoring(softmax_scale, causal, left, right, softcap, alibi_slopes, dropout_p)


def check_dense(
    inputs: Inputs, scoring: Scoring, *, low_level_head_dim: bool, return_softmax: bool
) -> None:
    scalars.scoring(scoring, return_softmax)
    _check_dense_inputs(inputs, "forward", low_level_head_dim)
    rules.alibi(scoring.alibi_slopes, inputs.q, inputs.q.shape[0])


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
    inputs: Inputs,
    outputs: Outputs,
    gradients: Gradients,
    scoring: Scoring,
    *,
    low_level_head_dim: bool = True,
) -> None:
    q = inputs.q
    scalars.scoring(scoring)
    _check_dense_inputs(inputs, "backward", low_level_head_dim)
    rules.alibi(scoring.alibi_slopes, q, q.shape[0])
    rules.saved_for_backward(q, outputs, scoring.dropout_p)
    _check_gradients(inputs, outputs, gradients)


def _check_dense_inputs(inputs: Inputs, phase: str, low_level: bool) -> None:
    q, k = inputs.q, inputs.k
    rules.qkv(inputs, _Q, _K)
    rules.sizes(q.shape[0], q, k, phase, low_level)
    rules.shape("k", k, _K, (q.shape[0], *k.shape[1:]))


def check_varlen(
    inputs: Inputs,
    packing: Packing,
    scoring: Scoring,
    *,
    low_level_head_dim: bool,
    return_softmax: bool,
) -> None:
    q, k = inputs.q, inputs.k
    scalars.scoring(scoring, return_softmax)
    rules.qkv(inputs, _PACKED_Q, _PACKED_K if packing.block_table is None else _PAGES)
    cu_seqlens_q, cu_seqlens_k = _check_cu_seqlens(q, packing)
    b = cu_seqlens_q.shape[0] - 1
    rules.sizes(b, q, k, "forward", low_level_head_dim)
    if return_softmax:
        scalars.s_dmask(b, q.shape[1], packing.max_seqlen_q, packing.max_seqlen_k)
    rules.alibi(scoring.alibi_slopes, q, b)
    room = k.shape[0]  # keys of the pack, or of one row of the table
    if packing.block_table is not None:
        room = rules.block_table(packing.block_table, q, b, k.shape[1], packing.leftpad_k)
    if packing.leftpad_k is not None:
        rules.index("leftpad_k", packing.leftpad_k, q, "b", b)
    if packing.seqused_k is not None:
        rules.index("seqused_k", packing.seqused_k, q, "b", b)
    if contents.reads_contents(q.device):
        offsets = cu_seqlens_q.cpu()
        contents.offsets("cu_seqlens_q", offsets, q.shape[0], "max_seqlen_q", packing.max_seqlen_q)
        _check_keys_in_use(k, cu_seqlens_k.cpu(), packing, room)


def _check_keys_in_use(k: Tensor, cu_seqlens_k: Tensor, packing: Packing, room: int) -> None:
    """What the index tensors for the keys hold; ``room`` keys are in the pack, or in a row of the
    block table.

    With seqused_k, cu_seqlens_k only says where a sequence starts and how many keys lie there; in a
    paged cache it then says nothing, and is not read.
    """
    most = packing.max_seqlen_k
    block_table, leftpad_k, seqused_k = _on_host(
        packing.block_table, packing.leftpad_k, packing.seqused_k
    )
    total_k = room if block_table is None else None
    if seqused_k is None:
        keys = contents.offsets("cu_seqlens_k", cu_seqlens_k, total_k, "max_seqlen_k", most)
    else:
        keys = seqused_k
        what, rule = "seqused_k is out of range", f"0 <= seqused_k <= max_seqlen_k={most}"
        contents.in_range("seqused_k", keys, most, what, rule)
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
    inputs: Inputs,
    outputs: Outputs,
    gradients: Gradients,
    packing: Packing,
    scoring: Scoring,
    *,
    low_level_head_dim: bool = True,
) -> None:
    q, k = inputs.q, inputs.k
    scalars.scoring(scoring)
    rules.qkv(inputs, _PACKED_Q, _PACKED_K)
    cu_seqlens_q, cu_seqlens_k = _check_cu_seqlens(q, packing)
    b = cu_seqlens_q.shape[0] - 1
    rules.sizes(b, q, k, "backward", low_level_head_dim)
    rules.alibi(scoring.alibi_slopes, q, b)
    rules.saved_for_backward(q, outputs, scoring.dropout_p)
    _check_gradients(inputs, outputs, gradients)
    if contents.reads_contents(q.device):
        most_q, most_k = packing.max_seqlen_q, packing.max_seqlen_k
        contents.offsets("cu_seqlens_q", cu_seqlens_q.cpu(), q.shape[0], "max_seqlen_q", most_q)
        contents.offsets("cu_seqlens_k", cu_seqlens_k.cpu(), k.shape[0], "max_seqlen_k", most_k)


def _check_gradients(inputs: Inputs, outputs: Outputs, gradients: Gradients) -> None:
    """dout, and the buffers for gradients that the caller passes."""
    q, k, v = inputs.q, inputs.k, inputs.v
    buffers = {}
    for name, tensor, of in (
        ("dq", gradients.dq, q),
        ("dk", gradients.dk, k),
        ("dv", gradients.dv, v),
    ):
        if tensor is not None:
            rules.gradient(name, tensor, of, q)
            buffers[name] = tensor
    dout, out, softmax_lse = outputs.dout, outputs.out, outputs.softmax_lse
    rules.gradient("dout", dout, q, q)
    read = {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": softmax_lse}
    memory.written(buffers, read)


def _check_cu_seqlens(q: Tensor, packing: Packing) -> tuple[Tensor, Tensor]:
    """Metadata of the offsets of a pack; returns them, since the low-level ops can get none."""
    scalars.not_negative("max_seqlen_q", packing.max_seqlen_q)
    scalars.not_negative("max_seqlen_k", packing.max_seqlen_k)
    offsets_q = rules.index("cu_seqlens_q", packing.cu_seqlens_q, q, "b + 1", None)
    entries = offsets_q.shape[0]
    return offsets_q, rules.index("cu_seqlens_k", packing.cu_seqlens_k, q, "b + 1", entries)


def check_cache_ranks(q: Tensor, k_cache: Tensor, block_table: Tensor | None) -> None:
    """What must hold before anyone asks for the batch of a call and the capacity of its cache."""
    if q.dim() != 4:
        rules.shape("q", q, _Q, (None,) * 4)
    if k_cache.dim() != 4:
        rules.shape("k_cache", k_cache, _CACHE if block_table is None else _PAGES, (None,) * 4)
    if block_table is not None and block_table.dim() != 2:
        rules.shape("block_table", block_table, "b, max_blocks", (None, None))


def check_kvcache(q: Tensor, cache: Cache, new: Append, scoring: Scoring, num_splits: int) -> None:
    scalars.scoring(scoring)
    check_num_splits(num_splits)
    letters = _CACHE if cache.block_table is None else _PAGES
    rules.qkv(Inputs(q, cache.k, cache.v), _Q, letters, suffix="_cache")
    b = q.shape[0]
    rules.sizes(b, q, cache.k, "forward", low_level=False)
    rules.alibi(scoring.alibi_slopes, q, b)
    rules.cache_rows(cache, b)
    capacity = cache.k.shape[1]
    if cache.block_table is not None:
        capacity = rules.block_table(cache.block_table, q, b, cache.k.shape[1], cache.leftpad)
    if cache.seqlens is not None:
        rules.index("cache_seqlens", cache.seqlens, q, "b", b)
    if cache.batch_idx is not None:
        rules.index("cache_batch_idx", cache.batch_idx, q, "b", b)
    if cache.leftpad is not None:
        rules.index("cache_leftpad", cache.leftpad, q, "b", b)
    s_new = rules.new_keys(q, cache, new, capacity)
    rules.rotary(q, new, capacity)
    if s_new:
        written = {"k_cache": cache.k, "v_cache": cache.v}
        memory.written(written, {"q": q, "k": new.k, "v": new.v})
    if contents.reads_contents(q.device):
        longest = _check_places(cache, s_new, capacity)
        if new.rotary_cos is not None:
            # Without a mask by position all queries turn as the first one does.
            turns = q.shape[1] if scoring.depends_on_place(capacity) else min(q.shape[1], 1)
            contents.rotary_reach(new.rotary_cos, longest + turns - 1)


def _check_places(cache: Cache, s_new: int, capacity: int) -> int:
    """What the index tensors of a cache hold; returns the longest of its sequences."""
    num_rows, page_size = cache.k.shape[:2]
    seqlens, batch_idx, leftpad, block_table = _on_host(
        cache.seqlens, cache.batch_idx, cache.leftpad, cache.block_table
    )
    home = "k_cache" if block_table is None else "block_table"
    starts = capacity if seqlens is None else seqlens  # where an append would go
    longest = contents.cache_lengths(starts, s_new, capacity, home)
    if batch_idx is not None:
        last = num_rows - 1
        what = "cache_batch_idx names a row outside the cache"
        contents.in_range("cache_batch_idx", batch_idx, last, what, f"0 <= row <= {last}")
    if leftpad is not None:
        rule = "0 <= cache_leftpad <= keys of the sequence, new ones included"
        contents.at_most("cache_leftpad", leftpad, starts + s_new, rule)
    if block_table is not None:
        keys = starts + s_new if s_new else starts
        contents.pages(block_table, num_rows, page_size, keys)
    if s_new and is_deterministic():
        if batch_idx is not None:
            contents.append_places("cache_batch_idx", batch_idx)
        elif block_table is not None:
            places = _append_places(block_table, starts, s_new, page_size)
            contents.append_places("block_table", places)
    return longest


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
