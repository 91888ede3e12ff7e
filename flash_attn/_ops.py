"""The custom ops ``torch.ops.flash_attn.*``: what PyTorch's compiler and autograd see of this package.

Each op checks its arguments, reads the determinism mode when it runs (so nothing is baked into a compiled graph),
and calls ``_native``. A forward pass writes its mode into ``rng_state``, and the backward pass reads it there:
it runs in the mode of its forward on whatever thread autograd uses.

Shapes: dense q (b, s_q, h_q, d), k and v (b, s_k, h_kv, d); packed q (t_q, h_q, d), k and v (t_k, h_kv, d), or
(num_blocks, page_size, h_kv, d) with a block table. softmax_lse is fp32, natural log: (b, h_q, s_q) or (h_q, t_q).
"""

from typing import Any

import torch
from torch import Tensor

from flash_attn import _checks, _native, determinism
from flash_attn._native import Packing, Scoring

Result = tuple[Tensor, Tensor, Tensor, Tensor]


def _op(name: str, mutates: tuple[str, ...] = ()) -> Any:
    return torch.library.custom_op(f"flash_attn::{name}", mutates_args=mutates)


# --- forward ----------------------------------------------------------------------------------------------------


@_op("_flash_attn_forward")
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
    _checks.check_dense(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        softcap,
        alibi_slopes,
        low_level_head_dim=True,
        return_softmax=return_softmax,
    )
    scoring = Scoring(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p
    )
    return _native.forward(
        q,
        k,
        v,
        scoring,
        deterministic=determinism.is_deterministic(),
        return_softmax=return_softmax,
    )


@_op("_flash_attn_varlen_forward")
def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
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
    _checks.check_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        softcap,
        alibi_slopes,
        block_table,
        leftpad_k,
        seqused_k,
        low_level_head_dim=True,
        return_softmax=return_softmax,
    )
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
    # zero_tensors asks for defined values in rows that no sequence covers; they are zeroed always.
    return _native.forward(
        q,
        k,
        v,
        scoring,
        packing,
        deterministic=determinism.is_deterministic(),
        return_softmax=return_softmax,
    )


@_op("_attend")
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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What the public functions call: dense without cu_seqlens, packed with; determinism per call; any head dim."""
    scoring = Scoring(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, dropout_p
    )
    shared = (dropout_p, softmax_scale, softcap, alibi_slopes)
    packing = _native.DENSE
    if cu_seqlens_q is None or cu_seqlens_k is None:
        _checks.check_dense(q, k, v, *shared, low_level_head_dim=False, return_softmax=False)
    else:
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        _checks.check_varlen(
            *(q, k, v, *lengths, *shared, block_table, None, None),
            low_level_head_dim=False,
            return_softmax=False,
        )
        packing = Packing(*lengths, block_table=block_table)
    return _native.forward(
        q,
        k,
        v,
        scoring,
        packing,
        deterministic=deterministic or determinism.is_deterministic(),
        return_softmax=return_softmax and dropout_p > 0.0,
    )


def _fake_result(q: Tensor, k: Tensor, packing: Packing, return_softmax: bool) -> Result:
    dmask = _native.s_dmask_shape(q, k, packing) if return_softmax else (0,)
    return (
        q.new_empty(q.shape),
        q.new_empty(_native.lse_shape(q, packing), dtype=torch.float32),
        q.new_empty(dmask),
        q.new_empty((2,), dtype=torch.int64),
    )


@_flash_attn_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *options: Any) -> Result:
    return _fake_result(q, k, _native.DENSE, return_softmax=options[-1])


@_flash_attn_varlen_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
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
    *rest: Any,
    **named: Any,
) -> Result:
    packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _fake_result(q, k, packing, return_softmax)


@_attend.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    *options: Any,
) -> Result:
    packing = _native.DENSE
    if cu_seqlens_q is not None:
        packing = Packing(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return_softmax = options[6] and dropout_p > 0.0
    return _fake_result(q, k, packing, return_softmax)


# --- backward ---------------------------------------------------------------------------------------------------


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


@_op("_flash_attn_backward", ("dq", "dk", "dv"))
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


@_op("_flash_attn_varlen_backward", ("dq", "dk", "dv"))
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
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
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
    return _native.backward(
        dout, q, k, v, out, softmax_lse, *gradients, scoring, packing, rng_state
    )


@_op("_attend_backward")
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
    # Zeros: tokens that no sequence of a pack covers have no gradient.
    gradients = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
    inputs = (dout, q, k, v, out, softmax_lse, *gradients)
    shared = (dropout_p, softmax_scale, softcap, alibi_slopes, rng_state)
    packing = _native.DENSE
    if cu_seqlens_q is None or cu_seqlens_k is None:
        _checks.check_backward(*inputs, *shared, low_level_head_dim=False)
    else:
        lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
        _checks.check_varlen_backward(*inputs, *lengths, *shared, low_level_head_dim=False)
        packing = Packing(*lengths)
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


# --- autograd ---------------------------------------------------------------------------------------------------

# Options that a forward op and its backward op share, by position in the forward op's inputs.
_DENSE_OPTIONS = ("dropout_p", "softmax_scale", "causal", "window_size_left", "window_size_right")


class _Differentiable:
    """Connects a forward op to the backward ops. Only out has a gradient: lse and S_dmask carry none."""

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
        ctx.options = (*(given[name] for name in _DENSE_OPTIONS), given["softcap"])
        ctx.deterministic = given.get("deterministic", False)
        for name in ("block_table", "leftpad_k", "seqused_k"):
            if given.get(name) is not None:
                ctx.no_gradient = name

    def backward(self, ctx: Any, dout: Tensor, *_ignored: Any) -> tuple[Tensor | None, ...]:
        if hasattr(ctx, "no_gradient"):
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


# --- KV cache ---------------------------------------------------------------------------------------------------


@_op("_flash_attn_with_kvcache", ("k_cache", "v_cache"))
def _flash_attn_with_kvcache(
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
    """(out, softmax_lse); the caches are written only when new keys are given."""
    is_local = window_size_left >= 0 or window_size_right >= 0
    _checks.check_kvcache(
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
        softcap,
        alibi_slopes,
        num_splits,
        rotate_q_rows=causal or is_local,
    )
    packing = Packing(cache_batch_idx=cache_batch_idx, block_table=block_table)
    lengths = cache_seqlens
    if lengths is None:
        capacity = packing.lengths(q, k_cache)[1]
        lengths = torch.full((q.shape[0],), capacity, dtype=torch.int32, device=q.device)
    if k is not None and v is not None:
        q = _native.append(
            q,
            k,
            v,
            k_cache,
            v_cache,
            lengths,
            packing,
            rotary_cos,
            rotary_sin,
            interleaved=rotary_interleaved,
            rotate_by_position=causal or is_local,
        )
        lengths = lengths + k.shape[1]
    packing = Packing(
        seqused_k=lengths,
        leftpad_k=cache_leftpad,
        cache_batch_idx=cache_batch_idx,
        block_table=block_table,
    )
    scoring = Scoring(
        softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes
    )
    out, softmax_lse, _, _ = _native.forward(
        q,
        k_cache,
        v_cache,
        scoring,
        packing,
        deterministic=determinism.is_deterministic(),
        num_splits=num_splits,
    )
    return out, softmax_lse


@_flash_attn_with_kvcache.register_fake
def _(q: Tensor, *rest: Any, **named: Any) -> tuple[Tensor, Tensor]:
    lse = q.new_empty(_native.lse_shape(q, _native.DENSE), dtype=torch.float32)
    return q.new_empty(q.shape), lse
