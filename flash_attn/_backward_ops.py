"""The backward ops ``torch.ops.flash_attn.*``; shapes as in ``_forward_ops``.

``rng_state`` carries the seed of dropout and the mode of the forward pass: a backward runs in the
mode of its forward, on whatever thread autograd uses.
"""

from typing import Any

import torch
from torch import Tensor

from flash_attn import _checks, _native
from flash_attn._arguments import DENSE, Gradients, Inputs, Outputs, Packing, Scoring
from flash_attn._schema import fake_of

_NO_BUFFERS = Gradients()


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
    inputs, outputs = Inputs(q, k, v), Outputs(dout, out, softmax_lse, rng_state)
    gradients = Gradients(dq, dk, dv)
    scoring = Scoring(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p
    )
    _checks.check_backward(inputs, outputs, gradients, scoring)
    return _native.backward(inputs, outputs, gradients.buffers(inputs), scoring)


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
    inputs, outputs = Inputs(q, k, v), Outputs(dout, out, softmax_lse, rng_state)
    gradients = Gradients(dq, dk, dv)
    scoring = Scoring(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p
    )
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    _checks.check_varlen_backward(inputs, outputs, gradients, packing, scoring)
    buffers = gradients.buffers(inputs)
    if zero_tensors:
        _zero(buffers)
    return _native.backward(inputs, outputs, buffers, scoring, packing)


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
    inputs, outputs = Inputs(q, k, v), Outputs(dout, out, softmax_lse, rng_state)
    scoring = Scoring(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p
    )
    packing = DENSE
    if cu_seqlens_q is None and cu_seqlens_k is None:
        _checks.check_backward(inputs, outputs, _NO_BUFFERS, scoring, low_level_head_dim=False)
    else:
        packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        _checks.check_varlen_backward(
            inputs, outputs, _NO_BUFFERS, packing, scoring, low_level_head_dim=False
        )
    gradients = _NO_BUFFERS.buffers(inputs)
    if packing is not DENSE:
        _zero(gradients)
    _native.backward(inputs, outputs, gradients, scoring, packing)
    return gradients


@fake_of(_attend_backward)
def _(*, q: Tensor, k: Tensor, v: Tensor, **_others: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


@fake_of(_flash_attn_backward)
def _(*, q: Tensor, **_others: Any) -> Tensor:
    return q.new_empty(_native.softmax_d_shape(q, DENSE), dtype=torch.float32)


@fake_of(_flash_attn_varlen_backward)
def _(*, q: Tensor, cu_seqlens_q: Tensor, **_others: Any) -> Tensor:
    shape = _native.softmax_d_shape(q, Packing(cu_seqlens_q))
    return q.new_empty(shape, dtype=torch.float32)
