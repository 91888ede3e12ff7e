"""Connects the ops to their derivatives, and names them all in one place."""

from typing import Any, NoReturn

import torch
from torch import Tensor

from flash_attn import _checks
from flash_attn._autograd import Kernel
from flash_attn._backward_ops import (
    _attend_backward,
    _flash_attn_backward,
    _flash_attn_varlen_backward,
)
from flash_attn._forward_ops import (
    _append_and_attend_cache,
    _attend,
    _attend_cache,
    _flash_attn_forward,
    _flash_attn_varlen_forward,
)

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "append_and_attend_cache",
    "attend",
    "attend_backward",
    "attend_cache",
]

# What the public functions and their gradients call: resolved once, not by name at each call.
attend = torch.ops.flash_attn._attend.default
attend_backward = torch.ops.flash_attn._attend_backward.default
attend_cache = torch.ops.flash_attn._attend_cache.default
append_and_attend_cache = torch.ops.flash_attn._append_and_attend_cache.default

# Options that a forward op and its backward share.
_OPTIONS = [
    "dropout_p",
    "softmax_scale",
    "causal",
    "window_size_left",
    "window_size_right",
    "softcap",
]


def _save(ctx: Any, given: dict[str, Any], results: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """Only out has a gradient: lse and S_dmask carry none."""
    out, softmax_lse, s_dmask, rng_state = results
    ctx.mark_non_differentiable(softmax_lse, s_dmask, rng_state)
    ctx.save_for_backward(
        given["q"],
        given["k"],
        given["v"],
        out,
        softmax_lse,
        rng_state,
        given["alibi_slopes"],
        given.get("cu_seqlens_q"),
        given.get("cu_seqlens_k"),
    )
    ctx.lengths = (given.get("max_seqlen_q", 0), given.get("max_seqlen_k", 0))
    ctx.options = tuple(given[name] for name in _OPTIONS)
    ctx.deterministic = given.get("deterministic", False)
    forward_only = ("block_table", "leftpad_k", "seqused_k")
    ctx.no_gradient = next((n for n in forward_only if given.get(n) is not None), None)
    ctx.other_arguments = len(given) - 3


def _backward(ctx: Any, dout: Tensor, *_ignored: Any) -> tuple[Tensor | None, ...]:
    if ctx.no_gradient is not None:
        _checks.refuse_gradient(ctx.no_gradient)
    q, k, v, out, lse, rng_state, alibi_slopes, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
    gradients = attend_backward(
        *(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.lengths, *ctx.options),
        *(alibi_slopes, ctx.deterministic, rng_state),
    )
    return (*gradients, *[None] * ctx.other_arguments)


def _no_cache_gradient(ctx: Any, *_ignored: Any) -> NoReturn:
    _checks.refuse_cache_gradient()


for _forward in (_flash_attn_forward, _flash_attn_varlen_forward, _attend):
    Kernel(_forward, _backward, _save)
for _gradient in (_flash_attn_backward, _flash_attn_varlen_backward, _attend_backward):
    Kernel(_gradient)
for _cached in (_attend_cache, _append_and_attend_cache):
    Kernel(_cached, _no_cache_gradient)
