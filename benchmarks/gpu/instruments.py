"""What is read of a GPU: the time of a call, and the memory that it takes.

Knows PyTorch alone: either_package.py measures another package of this one's name with it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARMUP_MS, SAMPLE_MS = 100, 50


def do_bench(call: Callable[[], Any]) -> float:
    """Median milliseconds of a call."""
    from triton import testing  # only where there is a GPU

    median: float = testing.do_bench(call, warmup=WARMUP_MS, rep=SAMPLE_MS, return_mode="median")
    return median


def as_graph(call: Callable[[], Any]) -> Callable[[], Any]:
    """A call that has run before, without its host side."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()

    def replay(_kept: Any = call) -> None:  # the graph reads the call's tensors, and owns none
        graph.replay()

    return replay


def beyond_results(call: Callable[[], tuple[Tensor, ...]]) -> float:
    """Mebibytes at the peak of a call, less what was there before and what it returns."""
    call()  # what a library allocates once and keeps is not this call's
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = call()
    peak = torch.cuda.max_memory_allocated()
    returned = sum(x.numel() * x.element_size() for x in results)
    return round((peak - before - returned) / 2**20, 2)
