"""A call as the public functions make it: the short way where that is open, else the long one.

The long way settles of which type every argument is, in this package's words, and hands them to an
op, whose schema would refuse them in words of its own. Sizes are looked at inside the op.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flash_attn import _checks, _fast_path, _ops
from flash_attn._autograd import without_gradients
from flash_attn._native import draw_seed

Window = Sequence[int] | Tensor
Attention = Any  # out, or (out, softmax_lse, S_dmask) when those are asked for


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    alibi_slopes: Tensor | None,
    block_table: Tensor | None,
    deterministic: bool,
    return_attn_probs: bool,
) -> Attention:
    """A dense call, or a packed one: then with ``cu_seqlens`` and ``max_seqlen``."""
    results = _fast_path.attend(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        block_table,
        deterministic,
        return_attn_probs,
    )
    if results is not None:
        out, softmax_lse = results
        return (out, softmax_lse, q.new_empty(0)) if return_attn_probs else out
    _checks.check_tensors(q=q, k=k, v=v)
    _checks.check_options(
        q,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        alibi_slopes=alibi_slopes,
        block_table=block_table,
    )
    scoring = _checks.settle_scoring(
        q, softmax_scale, causal, window_size, softcap, alibi_slopes, dropout_p
    )
    return_attn_probs = _checks.check_flag("return_attn_probs", return_attn_probs)
    out, softmax_lse, s_dmask, _ = _ops.attend(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        _checks.check_length("max_seqlen_q", max_seqlen_q),
        _checks.check_length("max_seqlen_k", max_seqlen_k),
        scoring.dropout_p,
        scoring.softmax_scale,
        scoring.causal,
        scoring.window_left,
        scoring.window_right,
        scoring.softcap,
        alibi_slopes,
        return_attn_probs,
        block_table,
        _checks.check_flag("deterministic", deterministic),
        # Drawn outside the op, where a compiler knows that two draws differ.
        draw_seed(q.device) if scoring.dropout_p > 0.0 else None,
    )
    return (out, softmax_lse, s_dmask) if return_attn_probs else out


def attend_cache(*arguments: Any) -> tuple[Tensor, Tensor]:
    """out and softmax_lse; the arguments are those of ``_attend_cache_the_long_way``."""
    return _fast_path.attend_cache(*arguments) or _attend_cache_the_long_way(*arguments)


@without_gradients
def _attend_cache_the_long_way(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_seqlens: int | Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    softmax_scale: float | None,
    causal: bool,
    window_size: Window,
    softcap: float,
    rotary_interleaved: bool,
    alibi_slopes: Tensor | None,
    num_splits: int,
) -> tuple[Tensor, Tensor]:
    _checks.check_tensors(q=q, k_cache=k_cache, v_cache=v_cache)
    lengths = cache_seqlens if isinstance(cache_seqlens, Tensor) else None
    _checks.check_options(
        q,
        k=k,
        v=v,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        cache_seqlens=lengths,
        cache_batch_idx=cache_batch_idx,
        cache_leftpad=cache_leftpad,
        block_table=block_table,
        alibi_slopes=alibi_slopes,
    )
    _checks.check_cache_ranks(q, k_cache, block_table)
    settled = _checks.settle_scoring(q, softmax_scale, causal, window_size, softcap, alibi_slopes)
    if cache_seqlens is not None and lengths is None:
        used = _checks.check_cache_length(cache_seqlens)
        lengths = torch.full((q.shape[0],), used, dtype=torch.int32, device=q.device)
    where = (lengths, cache_batch_idx, cache_leftpad, block_table)
    window = (settled.window_left, settled.window_right)
    scoring = (settled.softmax_scale, settled.causal, *window, settled.softcap)
    rotary_interleaved = _checks.check_flag("rotary_interleaved", rotary_interleaved)
    num_splits = _checks.check_length("num_splits", num_splits)
    if k is None and v is None and rotary_cos is None and rotary_sin is None:
        out, softmax_lse = _ops.attend_cache(
            q, k_cache, v_cache, *where, *scoring, alibi_slopes, num_splits
        )
    else:
        new = (k, v, rotary_cos, rotary_sin)
        out, softmax_lse = _ops.append_and_attend_cache(
            q,
            k_cache,
            v_cache,
            *new,
            *where,
            *scoring,
            rotary_interleaved,
            alibi_slopes,
            num_splits,
        )
    return out, softmax_lse
