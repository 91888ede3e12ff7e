"""The short way of an eager call that nobody traces or transforms.

An op of PyTorch's Python interface costs more than the kernels of a small call: its wrapper, the
autograd kernel, the rules one by one. So a plain call goes to one native op, which accepts,
allocates and runs. What that op does not accept comes back untouched, and the long way through
``flash_attn._ops`` runs it, or refuses it in words. Both ways run the same kernels.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from flash_attn import _check_rules, _native, _ops
from flash_attn._mode import is_deterministic

_library = torch.ops.flash_attn_native
_attend = _library.attend.default
_attend_cache = _library.attend_cache.default
_append_and_attend_cache = _library.append_and_attend_cache.default
_attend_backward = _library.attend_backward.default

# Lengths and windows that a schema's 64 bits hold with room to spare.
_MOST = 2**62

# Devices on which this installation can compute, by index; -1 is the CPU.
_accepted_devices = {-1}

Results = tuple[Tensor, Tensor]  # out, softmax_lse


def attend(
    q: Any,
    k: Any,
    v: Any,
    cu_seqlens_q: Any,
    cu_seqlens_k: Any,
    max_seqlen_q: Any,
    max_seqlen_k: Any,
    dropout_p: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    alibi_slopes: Any,
    block_table: Any,
    deterministic: Any,
    return_attn_probs: Any,
) -> Results | None:
    """out and softmax_lse of a dense or packed call, or None where it must go the long way."""
    # A subclass of Tensor, a number of NumPy: whatever is not just that is for the long way.
    if (
        torch.compiler.is_compiling()
        or not (type(q) is type(k) is type(v) is Tensor)
        or not (type(dropout_p) is type(softcap) is float)
        or dropout_p != 0.0
        or not (type(causal) is type(deterministic) is type(return_attn_probs) is bool)
        or not (type(max_seqlen_q) is type(max_seqlen_k) is int)
        or not (0 <= max_seqlen_q < _MOST and 0 <= max_seqlen_k < _MOST)
        or not (softmax_scale is None or type(softmax_scale) is float)
        or not _is_window(window_size)
        or not _is_tensor_or_none(cu_seqlens_q, cu_seqlens_k, alibi_slopes, block_table)
        or not _is_plain(q)
    ):
        return None
    arguments = (
        *(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale),
        *(causal, *window_size, softcap, alibi_slopes, block_table),
        deterministic or is_deterministic(),
    )
    try:
        if torch.is_grad_enabled() and _requires_gradient(q, k, v, alibi_slopes):
            if block_table is not None:
                return None
            return Attention.apply(*arguments)  # type: ignore[attr-defined]
        return tuple(_attend(*arguments)) or None
    except (NotImplementedError, _NotAccepted):  # the first: a layout or a device without kernels
        return None


class _NotAccepted(Exception):
    """The native op has handed a call back."""


class Attention(torch.autograd.function._SingleLevelFunction):
    """The arguments of the native op; out and softmax_lse, of which only out has a gradient.

    Of a single level: a plain call stands under no transform, and pays for none.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Results:
        results = _attend(*arguments)
        if not results:
            raise _NotAccepted
        out, softmax_lse = results
        q, k, v, cu_seqlens_q, cu_seqlens_k, *options, alibi_slopes, _, ctx.mode = arguments
        ctx.save_for_backward(q, k, v, out, softmax_lse, cu_seqlens_q, cu_seqlens_k, alibi_slopes)
        ctx.options = options
        ctx.other_arguments = len(arguments) - 3
        ctx.mark_non_differentiable(softmax_lse)
        ctx.set_materialize_grads(False)  # or softmax_lse gets zeros for a gradient, each time
        return out, softmax_lse

    @staticmethod
    def backward(ctx: Any, dout: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dout is None:  # nothing that has a gradient depends on out
            return (None,) * (3 + ctx.other_arguments)
        *tensors, alibi_slopes = ctx.saved_tensors
        plain = type(dout) is Tensor and _is_tensor_or_none(*tensors)
        # A batch of gradients (is_grads_batched) is a mode of its own, and no transform.
        plain = plain and not torch._C._dispatch_tls_is_dispatch_key_included("VmapMode")
        gradients = None
        if plain and not torch.is_grad_enabled() and _is_plain(dout):
            columns = dout if dout.stride(-1) == 1 else dout.contiguous()
            gradients = _attend_backward(columns, *tensors, *ctx.options, alibi_slopes)
        if not gradients:
            gradients = _backward_the_long_way(ctx, dout, tensors, alibi_slopes)
        return (*gradients, *[None] * ctx.other_arguments)


def _backward_the_long_way(
    ctx: Any, dout: Tensor, tensors: list[Tensor | None], alibi_slopes: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    q = tensors[0]
    assert q is not None
    max_seqlen_q, max_seqlen_k, softmax_scale, *rest = ctx.options
    scale = _native.softmax_scale_of(q, softmax_scale)
    mode = _native.DETERMINISTIC_BIT if ctx.mode else 0
    rng_state = torch.tensor([0, mode], dtype=torch.int64, device=q.device)
    gradients: tuple[Tensor, Tensor, Tensor] = _ops.attend_backward(
        *(dout, *tensors, max_seqlen_q, max_seqlen_k, 0.0, scale, *rest),
        *(alibi_slopes, ctx.mode, rng_state),
    )
    return gradients


def attend_cache(
    q: Any,
    k_cache: Any,
    v_cache: Any,
    k: Any,
    v: Any,
    rotary_cos: Any,
    rotary_sin: Any,
    cache_seqlens: Any,
    cache_batch_idx: Any,
    cache_leftpad: Any,
    block_table: Any,
    softmax_scale: Any,
    causal: Any,
    window_size: Any,
    softcap: Any,
    rotary_interleaved: Any,
    alibi_slopes: Any,
    num_splits: Any,
) -> Results | None:
    """out and softmax_lse of a call against a cache, or None where it must go the long way."""
    lengths, length = cache_seqlens, -1
    if type(cache_seqlens) is int:
        lengths, length = None, cache_seqlens
    if (
        torch.compiler.is_compiling()
        or not (type(q) is type(k_cache) is type(v_cache) is Tensor)
        or type(softcap) is not float
        or not (type(causal) is type(rotary_interleaved) is bool)
        or not (type(num_splits) is int and 0 <= num_splits < _MOST)
        or not (-1 <= length < _MOST)
        or (length < 0 and type(cache_seqlens) is int)
        or not (softmax_scale is None or type(softmax_scale) is float)
        or not _is_window(window_size)
        or not _is_tensor_or_none(lengths, cache_batch_idx, cache_leftpad, block_table)
        or not _is_tensor_or_none(k, v, rotary_cos, rotary_sin, alibi_slopes)
        or not _is_plain(q)
        or (torch.is_grad_enabled() and _requires_gradient(q, k_cache, v_cache, k, v, alibi_slopes))
    ):
        return None
    where = (lengths, length, cache_batch_idx, cache_leftpad, block_table, softmax_scale, causal)
    left, right = window_size
    mode = is_deterministic()
    try:
        if k is None and v is None and rotary_cos is None and rotary_sin is None:
            results = _attend_cache(
                *(q, k_cache, v_cache, *where, left, right, softcap, alibi_slopes),
                *(num_splits, mode),
            )
        elif k is None or v is None:
            return None
        else:
            results = _append_and_attend_cache(
                *(q, k_cache, v_cache, k, v, rotary_cos, rotary_sin, *where, left, right),
                *(softcap, rotary_interleaved, alibi_slopes, num_splits, mode),
            )
            if results:  # as for every op that writes into its arguments
                torch.autograd.graph.increment_version((k_cache, v_cache))
    except NotImplementedError:  # a layout or a device without kernels
        return None
    return tuple(results) or None


def _is_window(window: Any) -> bool:
    if type(window) is not tuple or len(window) != 2:
        return False
    left, right = window
    return type(left) is type(right) is int and -_MOST < left < _MOST and -_MOST < right < _MOST


def _is_tensor_or_none(*values: Any) -> bool:
    return all(x is None or type(x) is Tensor for x in values)


def _requires_gradient(*tensors: Tensor | None) -> bool:
    return any(x is not None and x.requires_grad for x in tensors)


def _has_default_device_alone() -> bool:
    """Whether ``torch.set_default_device`` or ``with torch.device(...)`` is the only mode."""
    mode = torch.overrides._get_current_function_mode()
    return torch._C._len_torch_function_stack() == 1 and type(mode) is DeviceContext


def _is_plain(q: Tensor) -> bool:
    """Whether no mode, transform or tracer stands between a call and its kernels."""
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or (torch._C._len_torch_function_stack() and not _has_default_device_alone())
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    ):
        return False
    index = q.get_device()
    if index not in _accepted_devices:
        _check_rules.device(q.device)
        _accepted_devices.add(index)
    return True
