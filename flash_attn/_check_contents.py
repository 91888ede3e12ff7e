"""The rules for what index tensors hold: offsets, lengths, rows of a cache, pages.

They are asked for tensors in the CPU's memory, and for others when FLASH_ATTN_CHECK=1: reading
those makes the call wait for the GPU. Without it the kernels bound what they read, and refuse
nothing. A rule that accepts runs one vectorised test; the first offending index is looked for once
that test has failed.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from flash_attn._refusal import refuse


def reads_contents(of: torch.device) -> bool:
    if of.type == "cpu":
        return True
    if os.environ.get("FLASH_ATTN_CHECK", "0") != "1":
        return False
    # Said before anything is read: reading would spoil the graph, and the error would be CUDA's.
    if of.type == "cuda" and torch.cuda.is_current_stream_capturing():
        what = "index tensors cannot be checked while a CUDA graph is captured"
        rule = "unset FLASH_ATTN_CHECK for the capture; check in a call before it"
        refuse(what, "FLASH_ATTN_CHECK=1 in a capture", rule)
    return True


def extremes(values: Tensor | int) -> tuple[int, int]:
    if isinstance(values, int):
        return values, values
    smallest, largest = torch.aminmax(values)
    return int(smallest), int(largest)


def in_range(name: str, values: Tensor, limit: int, what: str, rule: str) -> None:
    """0 <= value <= limit for every sequence."""
    smallest, largest = extremes(values)
    if smallest < 0 or largest > limit:
        i = int(((values < 0) | (values > limit)).nonzero()[0])
        refuse(what, f"{name}[{i}] = {int(values[i])}", rule)


def at_most(name: str, values: Tensor, limits: Tensor | int, rule: str) -> None:
    """0 <= values[i] <= limits[i] for every sequence i."""
    bad = (values < 0) | (values > limits)
    if bool(bad.any()):
        i = int(bad.nonzero()[0])
        limit = int(torch.as_tensor(limits, device="cpu").expand(values.shape)[i])
        received = f"{name}[{i}] = {int(values[i])} where sequence {i} has {limit} keys"
        refuse(f"{name} is out of range", received, rule)


def offsets(name: str, cu_seqlens: Tensor, total: int | None, max_name: str, limit: int) -> Tensor:
    """Offsets into a pack of ``total`` rows (None: only the lengths count); returns the lengths."""
    lengths = cu_seqlens.to(torch.int64).diff()  # differences of int32 could overflow
    smallest, largest = extremes(lengths)
    if smallest < 0:
        i = int((lengths < 0).nonzero()[0])
        received = f"{name}[{i}:{i + 2}] = {cu_seqlens[i : i + 2].tolist()}"
        refuse(f"{name} must not decrease", received, "no offset is below the one before it")
    if total is not None:
        first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
        if first != 0:
            refuse(f"{name} must start at 0", f"{name}[0] = {first}", "the first offset is 0")
        if last > total:
            i = int((cu_seqlens > total).nonzero()[0])
            received = f"{name}[{i}] = {int(cu_seqlens[i])} for a pack of {total} rows"
            refuse(f"{name} points outside its pack", received, f"offsets are at most {total}")
    if largest > limit:
        i = int((lengths > limit).nonzero()[0])
        received = f"length {int(lengths[i])} of sequence {i}, {max_name}={limit}"
        refuse(f"a sequence of {name} exceeds {max_name}", received, f"length <= {max_name}")
    return lengths


def cache_lengths(cache_seqlens: Tensor | int, s_new: int, capacity: int, home: str) -> int:
    """The keys of each sequence, and those it appends, fit the cache; returns the longest."""
    smallest, longest = extremes(cache_seqlens)
    if smallest >= 0 and longest + s_new <= capacity:
        return longest
    values = torch.as_tensor(cache_seqlens, device="cpu").reshape(-1)
    i = int(((values < 0) | (values > capacity - s_new)).nonzero()[0])
    what = f"cache_seqlens exceeds the capacity of {home}"
    if int(values[i]) < 0:
        what = "cache_seqlens must not be negative"
    elif s_new:
        what = f"the append of {s_new} key(s) at cache_seqlens runs past the end of {home}"
    received = f"cache_seqlens[{i}] = {int(values[i])}, {s_new=}, {capacity=}"
    refuse(what, received, "0 <= cache_seqlens and cache_seqlens + s_new <= capacity")


def pages(table: Tensor, num_blocks: int, page_size: int, keys: Tensor | int) -> None:
    """Each page that holds a key exists; entries behind a sequence's last page may be anything."""
    if table.numel() == 0:
        return
    smallest, largest = extremes(table)
    if smallest >= 0 and largest < num_blocks:
        return
    held = torch.as_tensor(keys, dtype=torch.int64, device="cpu")  # a sum of int32 could overflow
    used_blocks = (held.reshape(-1, 1) + (page_size - 1)) // page_size
    used = torch.arange(table.shape[1], device="cpu") < used_blocks  # (b or 1, max_blocks)
    bad = used & ((table < 0) | (table >= num_blocks))
    if bool(bad.any()):
        i, j = bad.nonzero()[0].tolist()
        received = f"block_table[{i}, {j}] = {int(table[i, j])}"
        rule = f"0 <= page < {num_blocks} in every entry that a sequence uses"
        refuse("block_table names a page outside the cache", received, rule)


def append_places(name: str, places: Tensor) -> None:
    """No two sequences append to one place: the bytes would depend on which of them comes last."""
    values, counts = torch.unique(places, return_counts=True)
    if int(counts.max()) > 1:
        received = f"row {int(values[counts > 1][0])} of the cache {int(counts.max())} times"
        what = f"{name} makes sequences append to one place, and no rule says which of them wins"
        refuse(what, received, "in deterministic mode each appended key has a place of its own")


def rotary_reach(cos: Tensor, last_position: int) -> None:
    """Queries are rotated too, and without as many new keys their positions may pass the cache."""
    if last_position >= cos.shape[0]:
        received = f"{cos.shape[0]} rows and a query at position {last_position}"
        refuse("cos/sin seqlen must reach the last query", received, "one row for each position")
