"""A small call of every kind of GPU kernel, for compute-sanitizer to watch: see sanitize.py.

    python -m benchmarks.sanitized_calls

Inputs are made on the host and copied, since a tool that looks at our kernels alone does not see
what PyTorch's wrote. KEYS cross a segment's boundary; all lengths are ragged, and everything is
as small as that allows: under racecheck a kernel takes a thousand times as long. A call that is
refused is printed with its reason; a result that is not finite fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flash_attn import (
    _native,
    determinism,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn._arguments import Inputs, Scoring

DEVICE = "cuda"

# Every bucket of kernels, two head dims that need padding, and one that lies on no 16 bytes.
HEAD_DIMS = (64, 96, 128, 192, 256, 40, 33)
GROUP = 2  # query heads that read one key head
SEGMENT = _native.segment_begin(1, torch.device(DEVICE))  # keys
MANY, FEW, KEYS = 150, 1, SEGMENT + 88


def normal(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape).to(dtype).to(DEVICE)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32).to(DEVICE)


def qkv(
    s_q: int,
    d: int,
    b: int = 1,
    s_k: int = KEYS,
    h_kv: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[Tensor, Tensor, Tensor]:
    q = normal(b, s_q, GROUP * h_kv, d, dtype=dtype)
    k, v = (normal(b, s_k, h_kv, d, dtype=dtype) for _ in "kv")
    return q, k, v


def forward(d: int, s_q: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Tensor:
    out: Tensor = flash_attn_func(*qkv(s_q, d, dtype=dtype), causal=True, **options)
    return out


def alibi() -> Tensor:
    return forward(64, MANY, alibi_slopes=normal(GROUP, dtype=torch.float32))


def splits(d: int, deterministic: bool) -> Tensor:
    """Segments that run side by side and are folded by another kernel."""
    s_k = 2 * SEGMENT + 76
    q, k, v = qkv(2, d, b=2, s_k=s_k, h_kv=2)
    with determinism.deterministic(deterministic):
        out: Tensor = flash_attn_with_kvcache(
            q, k, v, cache_seqlens=ints(s_k, s_k - 323), causal=True, num_splits=3
        )
    return out


def pack() -> Tensor:
    """Lengths 130, 0, 1 and 300, and two rows that belong to no sequence."""
    q, k, v = (x[0] for x in qkv(433, 64, s_k=433, h_kv=2))
    cu_seqlens = ints(0, 130, 130, 131, 431)
    out: Tensor = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 300, 300, causal=True)
    return out


def loose_pack(d: int) -> list[Tensor]:
    """3,000 sequences of a token or two under a bound from which no grid is made."""
    lengths = torch.arange(3000) % 2 + 1
    cu_seqlens = ints(0, *lengths.cumsum(0).tolist())
    q, k, v = (x[0].requires_grad_() for x in qkv(4500, d, s_k=4500, h_kv=2))
    longest = 1 << 20
    out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, longest, longest, causal=True)
    return [out, *torch.autograd.grad(out, (q, k, v), normal(*out.shape))]


def pages(s_q: int) -> Tensor:
    q, _, _ = qkv(s_q, 128, b=2, h_kv=2)
    k, v = (normal(10, 64, 2, 128) for _ in "kv")
    out: Tensor = flash_attn_with_kvcache(
        *(q, k, v),
        cache_seqlens=ints(300, 257),
        block_table=ints(7, 2, 9, 0, 4, 1, 8, 3, 5, 6).view(2, 5),
        causal=True,
    )
    return out


def append(interleaved: bool) -> Tensor:
    """New keys with rotary embedding, into chosen rows of a cache; one sequence is padded."""
    q, k, v = qkv(3, 64, b=2, s_k=3, h_kv=2)
    k_cache, v_cache = (normal(3, 130, 2, 64) for _ in "kv")
    out: Tensor = flash_attn_with_kvcache(
        *(q, k_cache, v_cache, k, v, normal(140, 16), normal(140, 16)),
        cache_seqlens=ints(70, 127),
        cache_batch_idx=ints(2, 0),
        cache_leftpad=ints(5, 0),
        causal=True,
        rotary_interleaved=interleaved,
    )
    return out


def dropout(s_q: int) -> Tensor:
    """By the native call: the public one draws its seed with a kernel of PyTorch's."""
    scoring = Scoring(0.125, causal=True, dropout_p=0.3)
    seed = torch.tensor([1234, 5678]).to(DEVICE)
    out, *_ = _native.forward(Inputs(*qkv(s_q, 64)), scoring, deterministic=True, seed=seed)
    return out


def backward(d: int, dtype: torch.dtype = torch.bfloat16, **options: Any) -> list[Tensor]:
    q, k, v = (x.requires_grad_() for x in qkv(MANY, d, s_k=200, dtype=dtype))
    out = flash_attn_func(q, k, v, causal=True, **options)
    return list(torch.autograd.grad(out, (q, k, v), normal(*out.shape, dtype=dtype)))


def backward_of_a_pack() -> list[Tensor]:
    q, k, v = (x[0].requires_grad_() for x in qkv(283, 64, s_k=283, h_kv=2))
    cu_seqlens = ints(0, 130, 130, 131, 281)
    out = flash_attn_varlen_func(q, k, v, cu_seqlens, cu_seqlens, 150, 150, causal=True)
    return list(torch.autograd.grad(out, (q, k, v), normal(*out.shape)))


def calls() -> Iterator[tuple[str, Callable[[], Any]]]:
    """Every problem by its name."""
    for d, s_q in itertools.product(HEAD_DIMS, (FEW, MANY)):
        yield f"forward d={d} s_q={s_q}", partial(forward, d, s_q)
    for s_q in (FEW, MANY):
        yield f"forward fp16 s_q={s_q}", partial(forward, 64, s_q, torch.float16)
        yield f"window s_q={s_q}", partial(forward, 64, s_q, window_size=(100, 0))
        yield f"softcap s_q={s_q}", partial(forward, 64, s_q, softcap=5.0)
        yield f"dropout s_q={s_q}", partial(dropout, s_q)
        yield f"pages s_q={s_q}", partial(pages, s_q)
    yield "alibi", alibi
    for d, deterministic in itertools.product((64, 128), (True, False)):
        yield f"splits d={d} deterministic={deterministic}", partial(splits, d, deterministic)
    yield "pack", pack
    for d in (64, 192):
        yield f"loose pack d={d}", partial(loose_pack, d)
    for interleaved in (False, True):
        yield f"append interleaved={interleaved}", partial(append, interleaved)
    for d in HEAD_DIMS:
        yield f"backward d={d}", partial(backward, d)
    yield "backward fp16", partial(backward, 64, torch.float16)
    yield "backward softcap", partial(backward, 64, softcap=5.0)
    yield "backward window", partial(backward, 64, window_size=(40, 0))
    yield "backward of a pack", backward_of_a_pack


def main() -> None:
    torch.manual_seed(0)
    determinism.set_deterministic(True)  # the modes differ in the plan alone: see splits
    for name, call in calls():
        try:
            results = call()
        except torch.AcceleratorError:
            raise
        except RuntimeError as error:
            print(f"left out: {name}: {str(error).splitlines()[0]}", flush=True)
            continue
        for result in results if isinstance(results, list) else [results]:
            assert result.cpu().isfinite().all(), f"{name}: not finite"
    print("all calls returned", flush=True)


if __name__ == "__main__":
    main()
