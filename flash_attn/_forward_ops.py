"""The forward ops ``torch.ops.flash_attn.*``: what PyTorch's compiler sees of a forward pass.

Each makes objects of its arguments (``_arguments.py``), checks them, reads the determinism mode
when it runs (so that nothing is baked into a compiled graph), and calls ``_native``.

Shapes: dense q (b, s_q, h_q, d), k and v (b, s_k, h_kv, d); packed q (t_q, h_q, d), k and v
(t_k, h_kv, d), or (num_blocks, page_size, h_kv, d) with a block table. softmax_lse is fp32, natural
log: (b, h_q, s_q) or (h_q, t_q).
"""

from typing import Any

import torch
from torch import Tensor

from flash_attn import _checks, _native
from flash_attn._arguments import (
    DENSE,
    NOTHING_NEW,
    Append,
    Cache,
    Inputs,
    Packing,
    Scoring,
)
from flash_attn._mode import is_deterministic
from flash_attn._schema import fake_of

# Two equal calls are not one: their masks differ. (``_attend`` is given its seed instead.)
_DRAWS_ITS_SEED = (torch.Tag.nondeterministic_seeded,)

_INT32_MAX = 2**31 - 1

Result = tuple[Tensor, Tensor, Tensor, Tensor]  # out, softmax_lse, S_dmask, rng_state


@torch.library.custom_op("flash_attn::_flash_attn_forward", mutates_args=(), tags=_DRAWS_ITS_SEED)
def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(q, k, v)
    scoring = Scoring(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p
    )
    _checks.check_dense(inputs, scoring, low_level_head_dim=True, return_softmax=return_softmax)
    return _native.forward(
        inputs,
        scoring,
        deterministic=is_deterministic(),
        seed=_native.draw_seed(q.device) if dropout_p > 0.0 else None,
        return_softmax=return_softmax,
    )


@torch.library.custom_op(
    "flash_attn::_flash_attn_varlen_forward", mutates_args=(), tags=_DRAWS_ITS_SEED
)
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,  # None is refused in this package's words
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = Inputs(q, k, v)
    scoring = Scoring(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p
    )
    packing = Packing(
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_k,
        leftpad_k,
        block_table=block_table,
    )
    _checks.check_varlen(
        inputs, packing, scoring, low_level_head_dim=True, return_softmax=return_softmax
    )
    # zero_tensors asks for defined values in rows that no sequence covers; they have them always.
    return _native.forward(
        inputs,
        scoring,
        packing,
        deterministic=is_deterministic(),
        seed=_native.draw_seed(q.device) if dropout_p > 0.0 else None,
        return_softmax=return_softmax,
    )


@torch.library.custom_op("flash_attn::_attend", mutates_args=())
def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
    block_table: Tensor | None,
    deterministic: bool,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the public functions call: dense or packed, any head dim, determinism per call."""
    inputs = Inputs(q, k, v)
    scoring = Scoring(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p
    )
    return_softmax = return_softmax and dropout_p > 0.0
    packing = DENSE
    if cu_seqlens_q is None and cu_seqlens_k is None:
        _checks.check_dense(
            inputs, scoring, low_level_head_dim=False, return_softmax=return_softmax
        )
    else:
        packing = Packing(
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table=block_table
        )
        _checks.check_varlen(
            inputs, packing, scoring, low_level_head_dim=False, return_softmax=return_softmax
        )
    return _native.forward(
        inputs,
        scoring,
        packing,
        deterministic=deterministic or is_deterministic(),
        seed=seed,
        return_softmax=return_softmax,
    )


def _fake_result(inputs: Inputs, packing: Packing, return_softmax: bool) -> Result:
    q, k, v = inputs.q, inputs.k, inputs.v
    _checks.check_same_device(q, k=k, v=v)
    dmask = _native.s_dmask_shape(q, k, packing) if return_softmax else (0,)
    return (
        q.new_empty(q.shape),
        q.new_empty(_native.lse_shape(q, packing), dtype=torch.float32),
        q.new_empty(dmask),
        q.new_empty((2,), dtype=torch.int64),
    )


@fake_of(_flash_attn_forward)
def _(*, q: Tensor, k: Tensor, v: Tensor, return_softmax: bool, **_others: Any) -> Result:
    return _fake_result(Inputs(q, k, v), DENSE, return_softmax)


@fake_of(_flash_attn_varlen_forward)
def _(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    return_softmax: bool,
    **_others: Any,
) -> Result:
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _fake_result(Inputs(q, k, v), packing, return_softmax)


@fake_of(_attend)
def _(
    *,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    return_softmax: bool,
    **_others: Any,
) -> Result:
    packing = DENSE
    if cu_seqlens_q is not None:
        packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _fake_result(Inputs(q, k, v), packing, return_softmax and dropout_p > 0.0)


def _cache_attention(
    q: Tensor, cache: Cache, new: Append, scoring: Scoring, num_splits: int
) -> tuple[Tensor, Tensor]:
    """(out, softmax_lse); the caches are written only when new keys are given."""
    _checks.check_kvcache(q, cache, new, scoring, num_splits)
    capacity, lengths = cache.capacity(), cache.seqlens
    if lengths is None:
        lengths = torch.full((q.shape[0],), capacity, dtype=torch.int32, device=q.device)
    if new.k is not None:
        # Where the mask goes by place, queries turn by their own positions, else all alike.
        by_position = scoring.depends_on_place(capacity)
        q = _native.append(q, cache, new, lengths, rotate_by_position=by_position)
        # Nobody has read the lengths on a GPU: the sum stays at the largest int32.
        s_new = new.k.shape[1]
        lengths = lengths.clamp(max=_INT32_MAX - s_new) + s_new
    out, softmax_lse, _, _ = _native.forward(
        Inputs(q, cache.k, cache.v),
        scoring,
        cache.packing(lengths),
        deterministic=is_deterministic(),
        num_splits=num_splits,
    )
    return out, softmax_lse


@torch.library.custom_op("flash_attn::_attend_cache", mutates_args=())
def _attend_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """Reads the caches only, so they may be shared, saved for a backward pass, or overlap."""
    cache = Cache(k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    scoring = Scoring(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
    )
    return _cache_attention(q, cache, NOTHING_NEW, scoring, num_splits)


@torch.library.custom_op(
    "flash_attn::_append_and_attend_cache", mutates_args=("k_cache", "v_cache")
)
def _append_and_attend_cache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    rotary_interleaved: bool,
    alibi_slopes: Tensor | None,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    """Writes k and v into the caches first; the rules say what must come with what."""
    cache = Cache(k_cache, v_cache, cache_seqlens, cache_batch_idx, cache_leftpad, block_table)
    new = Append(k, v, rotary_cos, rotary_sin, rotary_interleaved)
    scoring = Scoring(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
    )
    return _cache_attention(q, cache, new, scoring, num_splits)


@fake_of(_attend_cache, _append_and_attend_cache)
def _(*, q: Tensor, **_others: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(_native.lse_shape(q, DENSE), dtype=torch.float32)
    return q.new_empty(q.shape), lse
