"""What the rule that moves the exponents' reference costs in accuracy, simulated.

    python -m benchmarks.reference_rules

Rows of 2,048 keys; values and results have 16 bits (bfloat16), and so have the probabilities that
meet V; all else is float64. What is printed is the root mean square error of a rule's output over
that of the exact output rounded to 16 bits: 1.00 is the best that there is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

BLOCK, KEYS, ROWS, D = 64, 2048, 64, 64
LATE = 3.0  # how far above, where a reference moves late
SLACK, NEAR = 4.0, 4.0  # of GpuOrder in csrc/core/contract.h

# FlashAttention-2's, which moves to every higher score; to the next integer or to the score itself,
# when it lies more than LATE above; and that of the GPU contract.
RULES = ("running maximum", "ceiling, late", "maximum, late", "ours")
PEAKED = ("one key", "a sink", "two keys", "two keys apart", "three keys", "two in a block")
KINDS = (*PEAKED, "normal")
DEVIATIONS = (0.5, 1.0, 3.0, 8.0)


def scores_of(kind: str, deviation: float, heads: int) -> Tensor:
    """(heads, rows, keys) in log2 units, of eighths: normal numbers, but for a few keys."""
    generator = torch.Generator().manual_seed(KINDS.index(kind) * 100 + int(10 * deviation))
    x = torch.randn((heads, ROWS, KEYS), generator=generator, dtype=torch.float64) * deviation
    top = x.amax(-1)

    def place(least: float, at: Tensor | None = None) -> None:
        if at is None:
            at = torch.randint(0, KEYS, top.shape, generator=generator)
        height = top + least + torch.rand(top.shape, generator=generator, dtype=torch.float64)
        x.scatter_(-1, at[..., None], height[..., None])

    if kind == "a sink":
        place(3, torch.zeros(top.shape, dtype=torch.int64))
    elif kind == "two in a block":
        block = torch.randint(0, KEYS // BLOCK, top.shape, generator=generator) * BLOCK
        place(6, block + 3)
        place(6, block + 40)
    elif kind != "normal":
        place(6)
        if kind in ("two keys", "three keys"):
            place(6)
        if kind == "three keys":
            place(6)
        if kind == "two keys apart":
            place(9)
    return (x * 8).round() / 8


def values(heads: int) -> Tensor:
    """(heads, keys, d), float64 that bfloat16 holds."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn((heads, KEYS, D), generator=generator).bfloat16().double()


def exact(x: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(x * math.log(2.0), -1) @ v


def _moved(rule: str, m: Tensor, block: Tensor) -> Tensor:
    """The reference after a block of scores (..., keys), before it m (...)."""
    top = block.amax(-1)
    if rule == "running maximum":
        return torch.maximum(m, top)
    if rule == "ceiling, late":
        return torch.where(top - m > LATE, top.ceil(), m)
    if rule == "maximum, late":
        return torch.where(top - m > LATE, top, m)
    classes = block.unflatten(-1, (-1, 4, 2)).amax((-3, -1))  # key % 8 / 2
    flat = (classes > top[..., None] - NEAR).all(-1)
    return torch.where(top > m, torch.where(flat, top.ceil() + SLACK, top), m)


def by_rule(rule: str, x: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """out (heads, rows, d), exact but for probabilities that are rounded as a rule has them."""
    m = torch.full(x.shape[:-1], -1e30, dtype=torch.float64)
    total, out = torch.zeros_like(m), torch.zeros((*m.shape, v.shape[-1]), dtype=torch.float64)
    for block, of_values in zip(x.split(BLOCK, -1), v.split(BLOCK, -2), strict=True):
        moved = _moved(rule, m, block)
        p, weight = torch.exp2(block - moved[..., None]), torch.exp2(m - moved)
        total = total * weight + p.sum(-1)
        out = out * weight[..., None] + p.to(dtype).double() @ of_values
        m = moved
    return out / total[..., None]


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def main() -> None:
    dtype, heads = torch.bfloat16, 2
    v = values(heads)
    shown = " ".join(f"{deviation:g}" for deviation in DEVIATIONS)
    print(f"| rows; scores of deviation {shown} | {' | '.join(RULES)} |")
    print("|---" * (len(RULES) + 1) + "|")
    for kind in KINDS:
        found: dict[str, list[str]] = {rule: [] for rule in RULES}
        for deviation in DEVIATIONS:
            x = scores_of(kind, deviation, heads)
            truth = exact(x, v)
            floor = rms(truth.to(dtype).double() - truth)
            for rule, column in found.items():
                error = rms(by_rule(rule, x, v, dtype).to(dtype).double() - truth)
                column.append(f"{error / floor:.2f}")
        print(f"| {kind} | {' | '.join(' '.join(column) for column in found.values())} |")


if __name__ == "__main__":
    main()
