"""Bitwise comparison and input generators, for this project's tests and for yours.

Two tensors are the same here when every byte is: -0.0 differs from 0.0, and two NaNs differ when
their payloads do. A comparison that fails names the first coordinate, both values and both bit
patterns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mismatch:
    """The first element, in row-major order, whose bytes differ, and how many there are."""

    label: str
    coordinate: tuple[int, ...]
    actual: str
    expected: str
    differing: int
    total: int

    def __str__(self) -> str:
        where = f" at {self.coordinate}" if self.coordinate else ""
        share = f" ({self.differing} of {self.total} elements differ)" if self.total else ""
        return f"{self.label}{where}: {self.actual} instead of {self.expected}{share}"


def bytes_of(tensor: Tensor) -> Tensor:
    """The raw bytes, as a (numel, itemsize) uint8 tensor on the same device."""
    flat = tensor.detach().contiguous().reshape(-1)
    return flat.view(torch.uint8).reshape(flat.numel(), tensor.element_size())


def first_mismatch(actual: Tensor, expected: Tensor, label: str = "tensor") -> Mismatch | None:
    """Compare byte for byte. Returns None when equal, else where and how they first differ."""
    for what, left, right in (
        ("shape", tuple(actual.shape), tuple(expected.shape)),
        ("dtype", actual.dtype, expected.dtype),
    ):
        if left != right:
            return Mismatch(f"{what} of {label}", (), str(left), str(right), 0, 0)
    left_bytes, right_bytes = bytes_of(actual), bytes_of(expected.to(actual.device))
    if torch.equal(left_bytes, right_bytes):
        return None
    differs = (left_bytes != right_bytes).any(dim=1)
    flat_index = int(differs.nonzero()[0])
    index = torch.tensor(flat_index, device="cpu")
    coordinate = tuple(int(i) for i in torch.unravel_index(index, actual.shape))
    return Mismatch(
        label=label,
        coordinate=coordinate,
        actual=_describe(actual, coordinate, left_bytes[flat_index]),
        expected=_describe(expected, coordinate, right_bytes[flat_index]),
        differing=int(differs.sum()),
        total=actual.numel(),
    )


def _describe(tensor: Tensor, coordinate: tuple[int, ...], raw: Tensor) -> str:
    bits = bytes(raw.cpu().tolist())[::-1].hex()  # little endian in memory, read big end first
    return f"{tensor[coordinate].item():.9g} (0x{bits})"


def bitwise_equal(actual: Tensor, expected: Tensor) -> bool:
    """True when shape, dtype and every byte agree."""
    return first_mismatch(actual, expected) is None


def assert_bitwise_equal(actual: Tensor, expected: Tensor, label: str = "tensor") -> None:
    """Raise AssertionError that names the first differing coordinate and both values."""
    mismatch = first_mismatch(actual, expected, label)
    if mismatch is not None:
        raise AssertionError(str(mismatch))


def random_normal(
    shape: Sequence[int],
    *,
    seed: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Standard normal values, drawn on the CPU: one seed gives the same bytes on every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
    return drawn.to(device=device, dtype=dtype)


def ragged_lengths(count: int, longest: int, *, seed: int, shortest: int = 1) -> tuple[int, ...]:
    """`count` lengths in [shortest, longest], shuffled; from two on, both ends occur."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(
        shortest, longest + 1, (count,), generator=generator, device="cpu"
    ).tolist()
    drawn[: min(count, 2)] = [longest, shortest][: min(count, 2)]
    order = torch.randperm(count, generator=generator, device="cpu").tolist()
    return tuple(int(drawn[i]) for i in order)


def cumulative_lengths(lengths: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
    """cu_seqlens: int32 (b + 1,), starting with 0."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32, device="cpu").cumsum(0)
    return ends.to(device=device, dtype=torch.int32)


def padded_rows(
    rows: Sequence[Tensor],  # each (s_i, h, d)
    capacity: int,
    *,
    fill: float = float("nan"),
    left: Sequence[int] | None = None,
) -> Tensor:
    """Stack to (b, capacity, h, d). Outside the rows is `fill`: NaN shows any stray read.

    `left` moves the rows of each sequence that far down, as a left-padded cache has them.
    """
    starts = [0] * len(rows) if left is None else list(left)
    stacked = rows[0].new_full((len(rows), capacity, *rows[0].shape[1:]), fill)
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        stacked[index, start : start + row.shape[0]] = row
    return stacked


def page_table(
    lengths: Sequence[int],
    page_size: int,
    *,
    seed: int,
    spare_pages: int = 3,
    device: torch.device | str = "cpu",
) -> tuple[Tensor, int]:
    """A random block_table int32 (b, max_blocks) and the number of pages it is drawn from.

    No page is shared. Entries past a sequence's last page name a spare page, as a serving engine's
    stale entries do.
    """
    pages_needed = [-(-length // page_size) for length in lengths]
    num_pages = sum(pages_needed) + max(spare_pages, 1)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(num_pages, generator=generator, device="cpu").tolist()
    spare = order.pop()
    shape = (len(lengths), max(1, *pages_needed))
    table = torch.full(shape, spare, dtype=torch.int32, device="cpu")
    for index, count in enumerate(pages_needed):
        pages = [order.pop() for _ in range(count)]
        table[index, :count] = torch.tensor(pages, dtype=torch.int32, device="cpu")
    return table.to(device), num_pages


def paged_rows(
    rows: Sequence[Tensor],  # each (s_i, h, d)
    block_table: Tensor,  # int32 (b, max_blocks)
    num_pages: int,
    page_size: int,
    *,
    fill: float = float("nan"),
) -> Tensor:
    """Scatter rows into (num_pages, page_size, h, d). Page tails and unused pages hold `fill`."""
    pages = rows[0].new_full((num_pages, page_size, *rows[0].shape[1:]), fill)
    for row, page_indices in zip(rows, block_table.tolist(), strict=True):
        for start in range(0, row.shape[0], page_size):
            part = row[start : start + page_size]
            pages[page_indices[start // page_size], : part.shape[0]] = part
    return pages


def poison_free_memory(device: torch.device | str = "cpu", megabytes: int = 16) -> None:
    """Leave NaN bytes in memory that the allocator hands out next.

    A kernel that reads scratch memory before it writes it then shows it, instead of finding zeros
    by luck. Sizes from a few KB upwards, because small and large requests come from different
    lists.
    """
    sizes = [1 << power for power in range(10, 20)] + [megabytes << 20]
    held = [
        torch.full((size // 4,), float("nan"), dtype=torch.float32, device=device) for size in sizes
    ]
    del held
