"""Connects the forward ops to their backward, and names them all in one place."""

from typing import Any

import torch
from torch import Tensor

from flash_attn import _checks
from flash_attn._backward_ops import _flash_attn_backward, _flash_attn_varlen_backward
from flash_attn._forward_ops import (
    Result,
    _attend,
    _flash_attn_forward,
    _flash_attn_varlen_forward,
)

__all__ = [
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
]

# Options that a forward op and its backward share.
_OPTIONS = [
    "dropout_p",
    "softmax_scale",
    "causal",
    "window_size_left",
    "window_size_right",
    "softcap",
]


class _Differentiable:
    """Gives a forward op its backward. Only out has a gradient: lse and S_dmask carry none."""

    def __init__(self, op: Any, names: tuple[str, ...]) -> None:
        self.names = names
        op.register_autograd(self.backward, setup_context=self.setup_context)

    def setup_context(self, ctx: Any, inputs: tuple[Any, ...], output: Result) -> None:
        given = dict(zip(self.names, inputs, strict=True))
        out, softmax_lse, s_dmask, rng_state = output
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

    def backward(self, ctx: Any, dout: Tensor, *_ignored: Any) -> tuple[Tensor | None, ...]:
        if ctx.no_gradient is not None:
            _checks.refuse_gradient(ctx.no_gradient)
        q, k, v, out, lse, rng_state, alibi_slopes, cu_seqlens_q, cu_seqlens_k = ctx.saved_tensors
        gradients = torch.ops.flash_attn._attend_backward(
            *(dout, q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, *ctx.lengths, *ctx.options),
            *(alibi_slopes, ctx.deterministic, rng_state),
        )
        return (*gradients, *(None for _ in self.names[3:]))


def _parameters(op: Any) -> tuple[str, ...]:
    return tuple(argument.name for argument in op._opoverload._schema.arguments)


for _differentiable in (_flash_attn_forward, _flash_attn_varlen_forward, _attend):
    _Differentiable(_differentiable, _parameters(_differentiable))
