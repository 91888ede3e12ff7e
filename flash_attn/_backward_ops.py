"""The backward ops ``torch.ops.flash_attn.*``; shapes as in ``_forward_ops``.

``rng_state`` carries the seed of dropout and the mode of the forward pass: a backward runs in the
mode of its forward, on whatever thread autograd uses.
"""

from typing import Any

import torch
from torch import Tensor

from flash_attn import _checks, _native
from flash_attn._native import Packing, Scoring


def _gradient_buffers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The buffers given, or throw-away ones where a caller does not want a gradient."""
    return (
        torch.empty_like(q) if dq is None else dq,
        torch.empty_like(k) if dk is None else dk,
        torch.empty_like(v) if dv is None else dv,
    )


def _zero(gradients: tuple[Tensor, ...]) -> None:
    """Tokens that no sequence of a pack covers have no gradient, and no kernel writes them."""
    for gradient in gradients:
        gradient.zero_()


@torch.library.custom_op("flash_attn::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_backward(
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
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
) -> Tensor:
    _checks.check_backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        dropout_p,
        softmax_scale,
        softcap,
        alibi_slopes,
        rng_state,
    )
    scoring = Scoring(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p
    )
    gradients = _gradient_buffers(q, k, v, dq, dk, dv)
    return _native.backward(
        dout, q, k, v, out, softmax_lse, *gradients, scoring, _native.DENSE, rng_state
    )


@torch.library.custom_op("flash_attn::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor | None,  # None is refused in this package's words
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
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
) -> Tensor:
    _checks.check_varlen_backward(
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
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        softcap,
        alibi_slopes,
        rng_state,
    )
    scoring = Scoring(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p
    )
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    gradients = _gradient_buffers(q, k, v, dq, dk, dv)
    if zero_tensors:
        _zero(gradients)
    return _native.backward(
        dout, q, k, v, out, softmax_lse, *gradients, scoring, packing, rng_state
    )


@torch.library.custom_op("flash_attn::_attend_backward", mutates_args=())
def _attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
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
    deterministic: bool,
    rng_state: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The backward of ``_attend``: (dq, dk, dv) in new tensors; any head dim."""
    scoring = Scoring(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p
    )
    gradients = _gradient_buffers(q, k, v, None, None, None)
    inputs = (dout, q, k, v, out, softmax_lse, *gradients)
    shared = (dropout_p, softmax_scale, softcap, alibi_slopes, rng_state)
    packing = _native.DENSE
    if cu_seqlens_q is None and cu_seqlens_k is None:
        _checks.check_backward(*inputs, *shared, low_level_head_dim=False)
    else:
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        arguments = (*inputs, *lengths, *shared)
        _checks.check_varlen_backward(*arguments, low_level_head_dim=False)
        packing = Packing(*lengths)
        _zero(gradients)
    _native.backward(*inputs, scoring, packing, rng_state)
    return gradients


@_attend_backward.register_fake
def _(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@_flash_attn_backward.register_fake
def _(dout: Tensor, q: Tensor, *rest: Any, **named: Any) -> Tensor:
    return q.new_empty(_native.softmax_d_shape(q, _native.DENSE), dtype=torch.float32)


@_flash_attn_varlen_backward.register_fake
def _(dout: Tensor, q: Tensor, *rest: Any, **named: Any) -> Tensor:
    cu_seqlens_q = named["cu_seqlens_q"] if "cu_seqlens_q" in named else rest[7]
    packing = Packing(cu_seqlens_q, cu_seqlens_q, 0, 0)
    return q.new_empty(_native.softmax_d_shape(q, packing), dtype=torch.float32)
