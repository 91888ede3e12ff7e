"""The autograd kernels of the ops: which derivatives exist, and who refuses the others.

PyTorch generates such a kernel for every custom op. The generated one drops the tangents of forward
mode without a word, does not run inside ``torch.func.grad``, and refuses a derivative by the name
of a private op. The kernels here take its place for the devices below.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from flash_attn import _checks
from flash_attn._schema import Schema

# A kernel for one of these goes before the generated one, which is for all devices.
_KEYS = ("AutogradCPU", "AutogradCUDA", "AutogradMeta")
_library = torch.library.Library("flash_attn", "FRAGMENT")

Gradients = tuple[Tensor | None, ...]
Function = TypeVar("Function", bound=Callable[..., Any])


def without_gradients(function: Function) -> Function:
    """Like ``torch.no_grad``. Inside ``torch.func`` the op itself refuses: a result without a
    graph would there have the gradient zero, and nobody would hear of it."""

    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        transformed = torch._C._are_functorch_transforms_active()
        with torch.set_grad_enabled(transformed and torch.is_grad_enabled()):
            return function(*arguments, **named)

    return call  # type: ignore[return-value]


def _refuse_second_derivative(ctx: Any, *_ignored: Any) -> NoReturn:
    _checks.refuse_second_derivative()


def _save_nothing(ctx: Any, given: dict[str, Any], results: Any) -> None:
    """A backward pass that only refuses needs nothing of the forward one."""


class Kernel:
    """The autograd kernel of one op.

    ``backward(ctx, *gradients)`` returns a gradient for each argument, or refuses, as it does for
    an op that itself belongs to a backward pass. ``save(ctx, arguments by name, results)`` keeps
    for it what it reads.
    """

    def __init__(
        self,
        op: Any,
        backward: Callable[..., Gradients] = _refuse_second_derivative,
        save: Callable[[Any, dict[str, Any], Any], None] = _save_nothing,
    ) -> None:
        self.overload = op._opoverload
        self.backward = backward
        self.save = save
        self.schema = Schema(op)
        for key in _KEYS:
            _library.impl(self.overload, self, key, with_keyset=True)
        if self.overload._schema.is_mutable:  # PyTorch runs any other op once for each slice
            _library.impl(self.overload, self._refuse_vmap, "FuncTorchBatched")

    def __call__(self, keyset: Any, *arguments: Any) -> Any:
        transformed = torch._C._are_functorch_transforms_active()
        # A decode step comes by once a layer and token: who differentiates nothing pays two looks.
        if transformed or forward_ad._current_level >= 0:
            self._refuse_tangents(arguments)
        if not torch.is_grad_enabled() or not any(
            isinstance(x, Tensor) and x.requires_grad for x in arguments
        ):
            return self.below(keyset, arguments)
        with enable_single_level_autograd_function() if transformed else nullcontext():
            return _Node.apply(self, keyset, *arguments)  # type: ignore[attr-defined]

    def below(self, keyset: Any, arguments: tuple[Any, ...]) -> Any:
        """The op itself, or under a functional transform what the next one makes of it."""
        with torch._C._AutoDispatchBelowAutograd():
            return self.overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    def _refuse_vmap(self, *arguments: Any) -> NoReturn:
        given = self.schema.by_name(arguments)
        batched = (n for n, x in given.items() if isinstance(x, Tensor) and is_batchedtensor(x))
        _checks.refuse_vmap(", ".join(batched))

    def _refuse_tangents(self, arguments: tuple[Any, ...]) -> None:
        for name, x in zip(self.schema.defaults, arguments, strict=False):
            # There is one level of dual numbers; torch.func keeps its own in wrappers of theirs.
            if isinstance(x, Tensor) and torch._VF._unpack_dual(x, level=0)[1] is not None:
                _checks.refuse_forward_mode(name)


class _Node(torch.autograd.function._SingleLevelFunction):
    """One op in the graph that reverse mode walks.

    Of a single level, since the dispatcher calls a kernel once for each level of ``torch.func``.
    """

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, keyset: Any, *arguments: Any) -> Any:
        # PyTorch switches both modes off here, for the transforms further out as well.
        transformed = torch._C._are_functorch_transforms_active()
        with torch.set_grad_enabled(transformed), forward_ad._set_fwd_grad_enabled(True):
            results = kernel.below(keyset, arguments)
        ctx.kernel = kernel
        kernel.save(ctx, kernel.schema.by_name(arguments), results)
        return results

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Gradients:
        return None, None, *ctx.kernel.backward(ctx, *gradients)
