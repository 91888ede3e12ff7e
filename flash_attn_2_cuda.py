"""The five entry points of upstream's compiled module, with its argument order, over this package.

Libraries import them directly (`from flash_attn_2_cuda import varlen_bwd`).  As there, arguments
are positional, results come as a list, no entry takes part in autograd, and a buffer that the
caller passes for a result is filled and returned.  The name is upstream's; the device is whatever
the tensors are on.
"""

import torch
from torch import Tensor

from flash_attn import _calls, _check_rules, _ops
from flash_attn._autograd import without_gradients
from flash_attn._checks import (
    check_flag,
    check_generator_is_none,
    check_length,
    check_number,
    check_options,
    check_tensors,
    check_window,
)


def _check_out(out: Tensor | None, q: Tensor) -> None:
    if out is not None:
        _check_rules.like_q("out", out, q, "the shape of q", q.shape, "query and out")


def _score(
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
) -> tuple[float, float, bool, int, int, float]:
    """What a score is made of, each of the type that the ops ask for."""
    left, right = check_window((window_size_left, window_size_right))
    dropout_p, scale = (
        check_number("p_dropout", p_dropout),
        check_number("softmax_scale", softmax_scale),
    )
    return (
        dropout_p,
        scale,
        check_flag("is_causal", is_causal),
        left,
        right,
        check_number("softcap", softcap),
    )


def _filled(buffer: Tensor | None, result: Tensor) -> Tensor:
    return result if buffer is None else buffer.copy_(result)


@without_gradients
def fwd(
    q: Tensor,  # (b, s_q, h_q, d)
    k: Tensor,  # (b, s_k, h_kv, d)
    v: Tensor,  # (b, s_k, h_kv, d)
    out: Tensor | None,
    alibi_slopes: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen: None = None,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state] of a dense batch."""
    check_generator_is_none(gen)
    check_tensors(q=q, k=k, v=v)
    check_options(q, out=out, alibi_slopes=alibi_slopes)
    _check_out(out, q)
    score = _score(
        p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap
    )
    result, softmax_lse, s_dmask, rng_state = _ops._flash_attn_forward(
        q,
        k,
        v,
        *score,
        alibi_slopes,
        check_flag("return_softmax", return_softmax),
    )
    return [_filled(out, result), softmax_lse, s_dmask, rng_state]


@without_gradients
def varlen_fwd(
    q: Tensor,  # (total_q, h_q, d)
    k: Tensor,  # (total_k, h_kv, d), or (num_blocks, page_size, h_kv, d) with block_table
    v: Tensor,
    out: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    gen: None = None,
) -> list[Tensor]:
    """[out, softmax_lse, S_dmask, rng_state] of a packed batch."""
    check_generator_is_none(gen)
    check_tensors(q=q, k=k, v=v, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_options(
        q,
        out=out,
        seqused_k=seqused_k,
        leftpad_k=leftpad_k,
        block_table=block_table,
        alibi_slopes=alibi_slopes,
    )
    _check_out(out, q)
    score = _score(
        p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap
    )
    result, softmax_lse, s_dmask, rng_state = _ops._flash_attn_varlen_forward(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        check_length("max_seqlen_q", max_seqlen_q),
        check_length("max_seqlen_k", max_seqlen_k),
        *score,
        alibi_slopes,
        check_flag("return_softmax", return_softmax),
        block_table,
        leftpad_k,
        seqused_k,
        check_flag("zero_tensors", zero_tensors),
    )
    return [_filled(out, result), softmax_lse, s_dmask, rng_state]


@without_gradients
def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    alibi_slopes: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen: None = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d] of a dense batch."""
    check_generator_is_none(gen)
    check_tensors(q=q, k=k, v=v, dout=dout, out=out, softmax_lse=softmax_lse)
    check_options(q, dq=dq, dk=dk, dv=dv, alibi_slopes=alibi_slopes, rng_state=rng_state)
    score = _score(
        p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap
    )
    dq = torch.empty_like(q) if dq is None else dq
    dk = torch.empty_like(k) if dk is None else dk
    dv = torch.empty_like(v) if dv is None else dv
    softmax_d = _ops._flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        *score,
        alibi_slopes,
        check_flag("deterministic", deterministic),
        rng_state,
    )
    return [dq, dk, dv, softmax_d]


@without_gradients
def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    gen: None = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """[dq, dk, dv, softmax_d] of a packed batch."""
    check_generator_is_none(gen)
    check_tensors(q=q, k=k, v=v, dout=dout, out=out, softmax_lse=softmax_lse)
    check_tensors(q=q, cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k)
    check_options(q, dq=dq, dk=dk, dv=dv, alibi_slopes=alibi_slopes, rng_state=rng_state)
    score = _score(
        p_dropout, softmax_scale, is_causal, window_size_left, window_size_right, softcap
    )
    # Zeros: a token of the pack that no sequence covers is not written to.
    dq = torch.zeros_like(q) if dq is None else dq
    dk = torch.zeros_like(k) if dk is None else dk
    dv = torch.zeros_like(v) if dv is None else dv
    softmax_d = _ops._flash_attn_varlen_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        check_length("max_seqlen_q", max_seqlen_q),
        check_length("max_seqlen_k", max_seqlen_k),
        *score,
        alibi_slopes,
        check_flag("deterministic", deterministic),
        rng_state,
        check_flag("zero_tensors", zero_tensors),
    )
    return [dq, dk, dv, softmax_d]


@without_gradients
def fwd_kvcache(
    q: Tensor,  # (b, s_q, h_q, d)
    kcache: Tensor,  # (b_cache, s_cache, h_kv, d), or (num_blocks, page_size, h_kv, d)
    vcache: Tensor,
    k: Tensor | None,  # (b, s_new, h_kv, d)
    v: Tensor | None,
    seqlens_k: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor | None,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    is_rotary_interleaved: bool,
    num_splits: int,
) -> list[Tensor]:
    """[out, softmax_lse] of attention over a cache, after k and v were appended to it."""
    check_tensors(q=q)
    check_options(q, out=out)
    _check_out(out, q)
    result, softmax_lse = _calls.attend_cache(
        q,
        kcache,
        vcache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        seqlens_k,
        cache_batch_idx,
        leftpad_k,
        block_table,
        softmax_scale,
        is_causal,
        (window_size_left, window_size_right),
        softcap,
        is_rotary_interleaved,
        alibi_slopes,
        num_splits,
    )
    return [_filled(out, result), softmax_lse]
