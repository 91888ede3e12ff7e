"""What is measured on a GPU: times, and memory where it could grow out of proportion."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.cases import Case

# Prefill as in the papers of the field: 16k tokens of width 2048 in batches of equal lengths.
TOKENS, WIDTH = 16384, 2048  # b * s, h * d
LENGTHS = (1024, 4096, 16384)


def _self_attention(
    kind: str, b: int, s: int, h: int, d: int, causal: bool, dtype: torch.dtype = torch.bfloat16
) -> Case:
    return Case(kind, b, s, s, h, h, d, dtype, causal)


def _papers(kind: str, head_dims: tuple[int, ...]) -> list[Case]:
    return [
        _self_attention(kind, TOKENS // s, s, WIDTH // d, d, causal)
        for d in head_dims
        for causal in (False, True)
        for s in LENGTHS
    ]


def _reference_time(kind: str) -> Case:
    """The point at which earlier deterministic attention paid 10 to 30 % of time."""
    return _self_attention(kind, 8, 4096, 32, 64, True, torch.float16)


# One new token a sequence against its cache; four query heads read one key head.
DECODE_LENGTHS = ((1, 1024), (1, 8192), (1, 32768), (1, 131072), (8, 8192), (64, 8192), (128, 2048))

TIMED = {
    "prefill": [*_papers("prefill", (64, 128, 256)), _reference_time("prefill")],
    "backward": [*_papers("backward", (64, 128)), _reference_time("backward")],
    "decode": [
        Case("decode", b, 1, s_k, 32, 8, 128, torch.bfloat16, causal=False)
        for b, s_k in DECODE_LENGTHS
    ],
}


@dataclass(frozen=True)
class MemoryCase:
    """A problem whose scratch memory is measured, and why."""

    why: str
    backward: bool
    shape: Case
    lengths: tuple[int, ...] = ()  # of a packed batch's sequences; its shape is the longest one's


# The point at which earlier deterministic attention paid 3 to 4 times the memory.
_REFERENCE = _self_attention("memory", 4, 2048, 32, 64, True, torch.float16)
_ONE_LONG = _self_attention("memory", 1, 65536, 1, 128, True)
_SKEWED = (65536, *[16] * 1023)  # scratch for 1024 sequences of the longest length: 64k times 1024


def _rows(b: int, s_q: int, s_k: int, h_q: int, h_kv: int, d: int = 128) -> Case:
    return Case("memory", b, s_q, s_k, h_q, h_kv, d, torch.bfloat16, causal=False)


MEMORY = [
    MemoryCase("reference", False, _REFERENCE),
    MemoryCase("one query, a million keys", False, _rows(1, 1, 1 << 20, 32, 2)),
    MemoryCase("a large batch of single queries", False, _rows(1024, 1, 2048, 32, 8)),
    MemoryCase("eight draft tokens", False, _rows(64, 8, 8192, 32, 8)),
    MemoryCase("a chunk behind a long cache", False, _rows(1, 512, 131072, 32, 8)),
    MemoryCase("one head, many segments", False, _ONE_LONG),
    MemoryCase("two wide heads", False, _self_attention("memory", 1, 16384, 2, 256, True)),
    MemoryCase("a skewed pack", False, _self_attention("memory", 1, 65536, 4, 64, True), _SKEWED),
    MemoryCase("reference", True, _REFERENCE),
    MemoryCase("one head, many segments", True, _ONE_LONG),
    MemoryCase("one key head for sixteen", True, _rows(1, 8192, 8192, 32, 2)),
    MemoryCase("a skewed pack", True, _self_attention("memory", 1, 65536, 4, 64, True), _SKEWED),
]
