"""The public functions, by upstream's names and parameters; the work is done in ``_calls``.

Letters: b batch, s_q queries, s_k keys, h_q query heads, h_kv key heads (h_q % h_kv == 0; query
head h reads key head h // (h_q / h_kv)), d head dim (1 to 256), t tokens of a packed batch.
dtypes: float16 and bfloat16, and float32 on the CPU. The last dimension is best contiguous; others
need not be.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import flash_attn_2_cuda as flash_attn_gpu  # noqa: F401  other packages look for this name here
from flash_attn import _calls, _checks
from flash_attn._calls import Attention, Window
from flash_attn._native import contiguous_columns
from flash_attn._native import round_up as round_multiple  # noqa: F401
from flash_attn._ops import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)

USE_TRITON_ROCM = False

_wrapped_flash_attn_forward = _flash_attn_forward
_wrapped_flash_attn_varlen_forward = _flash_attn_varlen_forward
_wrapped_flash_attn_backward = _flash_attn_backward
_wrapped_flash_attn_varlen_backward = _flash_attn_varlen_backward


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """``x`` with a contiguous last dimension: itself, or a copy."""
    return None if x is None else contiguous_columns(x)


def _get_block_size_n(device: Any, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Keys that share a reference in S_dmask: all, it is relative to the row's final maximum."""
    return sys.maxsize // 2


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """Attention of a dense batch: softmax(softmax_scale q k^T + mask) v, differentiable in q, k, v.

    Args:
        q: (b, s_q, h_q, d).
        k: (b, s_k, h_kv, d).
        v: (b, s_k, h_kv, d).
        dropout_p: probability to drop a weight, in [0, 1); 0 in evaluation.
        softmax_scale: factor on q k^T; None: d ** -0.5.
        causal: query i sees keys j <= i + s_k - s_q: the mask is aligned to the bottom right.
        window_size: (left, right); query i sees only keys i + s_k - s_q - left to
            i + s_k - s_q + right.
            Negative: unlimited. causal sets right to 0.
        softcap: > 0: scores become softcap * tanh(score / softcap). Not with dropout.
        alibi_slopes: fp32 (h_q,) or (b, h_q); adds -slope * |i + s_k - s_q - j| to the score.
        deterministic: True: the row contract for this call, forward and backward. False: as the
            mode in force says.
        return_attn_probs: also return softmax_lse and S_dmask (for tests).

    Returns:
        out (b, s_q, h_q, d); with return_attn_probs (out, softmax_lse, S_dmask):
        softmax_lse fp32 (b, h_q, s_q), natural log, +inf for a query that sees no key (its out is
        zero); S_dmask (b, h_q, s_q and s_k rounded up to 128) when dropout_p > 0, else empty:
        exp(score - the row's maximum), negative where dropped.

    Raises:
        RuntimeError: the message says what was wrong, what was received, and the rule.
    """
    return _calls.attend(
        q,
        k,
        v,
        None,
        None,
        0,
        0,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        None,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """``flash_attn_func`` with kv (b, s_k, 2, h_kv, d)."""
    _checks.check_packed("kv", kv, 2)
    k, v = kv.unbind(-3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_qkvpacked_func(
    qkv: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """``flash_attn_func`` with qkv (b, s, 3, h, d)."""
    _checks.check_packed("qkv", qkv, 3)
    q, k, v = qkv.unbind(-3)
    return flash_attn_func(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Attention:
    """Attention of sequences packed end to end; each sees its own keys only.

    Args:
        q: (t_q, h_q, d).
        k: (t_k, h_kv, d), or with block_table (num_blocks, page_size, h_kv, d).
        v: as k.
        cu_seqlens_q: int32 (b + 1,), 0, s_0, s_0 + s_1, ...: where each sequence's queries start.
        cu_seqlens_k: int32 (b + 1,), the same for keys; with block_table only the lengths count.
        max_seqlen_q: longest query length.
        max_seqlen_k: longest key length.
        block_table: int32 (b, max_blocks): the pages of each sequence, in order. Forward only.
        Other arguments as in ``flash_attn_func``; causal and window_size count per sequence.

    Returns:
        out (t_q, h_q, d); with return_attn_probs also softmax_lse fp32 (h_q, t_q) and S_dmask.
    """
    _checks.check_present(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    return _calls.attend(
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


def flash_attn_varlen_kvpacked_func(
    q: Tensor,
    kv: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """``flash_attn_varlen_func`` with kv (t_k, 2, h_kv, d)."""
    _checks.check_present(cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    _checks.check_packed("kv", kv, 2)
    k, v = kv.unbind(-3)
    return _calls.attend(
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
        None,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_qkvpacked_func(
    qkv: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
) -> Attention:
    """``flash_attn_varlen_func`` with qkv (t, 3, h, d) and one cu_seqlens for all three."""
    _checks.check_tensors(cu_seqlens=cu_seqlens)
    max_seqlen = _checks.check_length("max_seqlen", max_seqlen)
    _checks.check_packed("qkv", qkv, 3)
    q, k, v = qkv.unbind(-3)
    return _calls.attend(
        q,
        k,
        v,
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        None,
        deterministic,
        return_attn_probs,
    )


def flash_attn_with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None = None,
    v: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Window = (-1, -1),
    softcap: float = 0.0,
    rotary_interleaved: bool = True,
    alibi_slopes: Tensor | None = None,
    num_splits: int = 0,
    return_softmax_lse: bool = False,
) -> Any:
    """Attention against a KV cache, after appending new keys and values to it. No gradient.

    Args:
        q: (b, s_q, h_q, d).
        k_cache: (b_cache, s_cache, h_kv, d), or with block_table (num_blocks, page_size, h_kv, d).
        v_cache: as k_cache.
        k, v: (b, s_new, h_kv, d), written into the cache at rows cache_seqlens ... (k after
            rotation), then attended to.
        rotary_cos, rotary_sin: (s_rotary, rotary_dim / 2) in q's dtype; rotate k by its cache row,
            and q by its own row (causal or window) or all of it by cache_seqlens. Needs k and v.
        cache_seqlens: rows in use before the append, int32 (b,) or one int for all; None: the whole
            cache.
        cache_batch_idx: int32 (b,), the cache's row for each sequence. Not with block_table.
        cache_leftpad: int32 (b,), rows to skip at the front; cache_seqlens counts them. Not with
            block_table.
        block_table: int32 (b, max_blocks), the pages of each sequence, in order.
        rotary_interleaved: pairs (0, 1), (2, 3), ... instead of (i, i + rotary_dim / 2).
        num_splits: into how many parts the keys are cut: 0 as the heuristic pleases, at most 128.
            In deterministic mode a hint to the schedule that never changes a bit.
        return_softmax_lse: also return softmax_lse.
        Other arguments as in ``flash_attn_func``.

    Returns:
        out (b, s_q, h_q, d); with return_softmax_lse (out, softmax_lse fp32 (b, h_q, s_q)).

    Raises:
        RuntimeError: before anything is written: a refused call leaves the cache as it was.
    """
    results = _calls.attend_cache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        softmax_scale,
        causal,
        window_size,
        softcap,
        rotary_interleaved,
        alibi_slopes,
        num_splits,
    )
    return results if return_softmax_lse else results[0]


def _apply_of(function: Callable[..., Attention], name: str) -> type:
    """A class with ``apply`` as upstream's autograd functions have it, for packages that import it.

    ``apply`` takes every argument of the function in its order, then whether to record a gradient.
    """
    names = [*inspect.signature(function).parameters, "is_grad_enabled"]
    names[names.index("return_attn_probs")] = "return_softmax"

    def apply(*arguments: Any) -> Attention:
        if len(arguments) != len(names):
            missing = ", ".join(names[len(arguments) :])
            received = f"{len(arguments)}" + (f", without {missing}" if missing else "")
            raise TypeError(
                f"flash_attn: {name}.apply takes {len(names)} arguments by position; "
                f"received {received}; rule: {', '.join(names)}"
            )
        *given, is_grad_enabled = arguments
        with torch.set_grad_enabled(torch.is_grad_enabled() and is_grad_enabled):
            return function(*given)

    return type(
        name,
        (),
        {"apply": staticmethod(apply), "__doc__": f"{name}.apply calls {function.__name__}."},
    )


FlashAttnFunc = _apply_of(flash_attn_func, "FlashAttnFunc")
FlashAttnKVPackedFunc = _apply_of(flash_attn_kvpacked_func, "FlashAttnKVPackedFunc")
FlashAttnQKVPackedFunc = _apply_of(flash_attn_qkvpacked_func, "FlashAttnQKVPackedFunc")
FlashAttnVarlenFunc = _apply_of(flash_attn_varlen_func, "FlashAttnVarlenFunc")
FlashAttnVarlenKVPackedFunc = _apply_of(
    flash_attn_varlen_kvpacked_func, "FlashAttnVarlenKVPackedFunc"
)
FlashAttnVarlenQKVPackedFunc = _apply_of(
    flash_attn_varlen_qkvpacked_func, "FlashAttnVarlenQKVPackedFunc"
)
