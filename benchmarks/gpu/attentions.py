"""Who is measured on a GPU: ours in both modes, and the peers that are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention as sdpa

from flash_attn import (
    determinism,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

OURS = ("deterministic", "standard")
T = TypeVar("T")


@dataclass(frozen=True)
class Attention:
    """One implementation, on tensors (b, s, h, d): as projections leave them, and as the flash
    kernels of all of them like them best."""

    name: str
    context: Callable[[], AbstractContextManager[Any]]
    dense: Callable[..., Tensor]  # q, k, v, causal
    decode: Callable[..., Tensor]  # q, k, v, int32 cache_seqlens
    packed: Callable[..., Tensor] | None  # q, k, v, cu_seqlens, the longest length

    def attempt(self, action: Callable[[], T]) -> tuple[T | None, str]:
        """The result in this implementation's context, or None and the reason why there is none.

        Ours may refuse what it cannot do yet; a peer may fail in any way. A GPU that has failed
        answers nothing after that, so it ends the run.
        """
        try:
            with self.context():
                return action(), ""
        except torch.AcceleratorError:
            raise
        except Exception as error:
            if self.name in OURS and not isinstance(error, RuntimeError):
                raise
            return None, str(error).strip().split("\n")[0][:160]


def ours(deterministic: bool) -> Attention:
    return Attention(
        "deterministic" if deterministic else "standard",
        lambda: determinism.deterministic(deterministic),
        lambda q, k, v, causal: flash_attn_func(q, k, v, causal=causal),
        lambda q, k, v, lengths: flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, causal=True
        ),
        lambda q, k, v, cu, longest: flash_attn_varlen_func(
            q, k, v, cu, cu, longest, longest, causal=True
        ),
    )


def sdpa_on(name: str, backend: SDPBackend) -> Attention:
    def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        gqa = q.shape[2] != k.shape[2]
        heads_first = (x.transpose(1, 2) for x in (q, k, v))  # views: nothing is copied
        return sdpa(*heads_first, is_causal=causal, enable_gqa=gqa).transpose(1, 2)

    return Attention(
        name,
        lambda: sdpa_kernel(backend),
        dense,
        lambda q, k, v, lengths: dense(q, k, v, False),
        None,
    )


def import_fa3() -> Any:
    """FlashAttention-3 where it is installed, whole or its forward kernels alone; else None."""
    for module in ("flash_attn_interface", "fa3_fwd_interface"):
        try:
            return importlib.import_module(module)
        except (ImportError, OSError):
            continue
    return None


def _fa3(fa3: Any) -> Attention:
    def first(found: Any) -> Tensor:  # some releases return the log-sum-exp too
        out: Tensor = found[0] if isinstance(found, tuple) else found
        return out

    return Attention(
        "fa3",
        nullcontext,
        lambda q, k, v, causal: first(fa3.flash_attn_func(q, k, v, causal=causal)),
        lambda q, k, v, lengths: first(
            fa3.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, causal=True)
        ),
        lambda q, k, v, cu, longest: first(
            fa3.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)
        ),
    )


def attentions() -> list[Attention]:
    """The peers first: ours is compared with the first of them that answers."""
    fa3 = import_fa3()
    return [
        sdpa_on("sdpa_flash", SDPBackend.FLASH_ATTENTION),
        sdpa_on("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
        *([] if fa3 is None else [_fa3(fa3)]),
        ours(True),
        ours(False),
    ]
