"""What a call costs before its kernels start: microseconds of the host, SDPA beside it; and FA3,
where it is installed.

    python -m benchmarks.host_time                    on the CPU: the whole of a tiny call
    python -m benchmarks.host_time --device cuda      on a GPU: from the call to its return
    python -m benchmarks.host_time --render FILE      the table of a recorded run

Problems are so small that the kernels take a few microseconds at most: on a GPU they run beside the
host, on the CPU they are part of the time for both sides. A turn times every call; a time is the
median of the turns, and a ratio that of the ratios within a turn. Both sides get (b, s, h, d) and
give it back. Writes results/<machine>/host_time.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa
from tqdm.auto import tqdm

from benchmarks.gpu.attentions import import_fa3
from benchmarks.records import (
    cpu_provenance,
    gpu_provenance,
    origin,
    read_record,
    results_path,
    write_record,
)
from flash_attn import (
    determinism,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)

# The most that a call may take, of SDPA's time for a dense call of the same kind.
TARGETS = {
    "dense": 1.0,
    "varlen": 1.2,
    "kvcache": 1.3,
    "kvcache, paged": 1.3,
    "kvcache, append and rotary": 1.5,
    "forward and backward": 1.0,
}
TURNS, CALLS, WARM_UP = 15, 200, 50
Call = Callable[[], Any]


def calls(device: str, s: int) -> tuple[dict[str, Call], dict[str, Call]]:
    """Our calls by name; SDPA's, one without a gradient and one with, and FA3's by our names."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    options: dict[str, Any] = {"device": device, "dtype": dtype}
    page, pages, h, d = 16, 8, 4, 64
    q, k, v = (torch.randn(1, s, h, d, **options) for _ in "qkv")
    one, one_k, one_v = (torch.randn(1, 1, h, d, **options) for _ in "qkv")
    caches = [torch.randn(1, page * pages, h, d, **options) for _ in "kv"]
    paged = [torch.randn(pages, page, h, d, **options) for _ in "kv"]
    table = torch.arange(pages, dtype=torch.int32, device=device).view(1, pages)
    length = torch.full((1,), 100, dtype=torch.int32, device=device)
    cu = torch.tensor([0, s], dtype=torch.int32, device=device)
    rotary = [torch.randn(page * pages, d // 2, **options) for _ in range(2)]
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)

    def dense(*tensors: Any) -> Any:
        return flash_attn_func(*tensors, causal=True)

    def peer(*tensors: Any) -> Any:
        heads_first = (x.transpose(1, 2) for x in tensors)
        return sdpa(*heads_first, is_causal=True).transpose(1, 2)

    def step(attention: Callable[..., Any]) -> Call:
        return lambda: torch.autograd.grad(attention(*leaves), leaves, dout)

    ours = {
        "dense": lambda: dense(q, k, v),
        "varlen": lambda: flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, s, s, causal=True),
        "kvcache": lambda: flash_attn_with_kvcache(one, *caches, cache_seqlens=length, causal=True),
        "kvcache, paged": lambda: flash_attn_with_kvcache(
            one, *paged, cache_seqlens=length, block_table=table, causal=True
        ),
        "kvcache, append and rotary": lambda: flash_attn_with_kvcache(
            one, *caches, one_k, one_v, *rotary, cache_seqlens=length, causal=True
        ),
        "forward and backward": step(dense),
    }
    peers = {"sdpa, forward": lambda: peer(q, k, v), "sdpa, forward and backward": step(peer)}
    fa3 = import_fa3() if device == "cuda" else None
    if fa3 is not None:

        def dense_of_fa3(*tensors: Any) -> Any:
            found = fa3.flash_attn_func(*tensors, causal=True)
            return found[0] if isinstance(found, tuple) else found  # some releases return lse too

        packed, lengths = (q[0], k[0], v[0]), (cu, cu, s, s)
        peers |= {
            "fa3, dense": lambda: dense_of_fa3(q, k, v),
            "fa3, varlen": lambda: fa3.flash_attn_varlen_func(*packed, *lengths, causal=True),
            "fa3, kvcache": lambda: fa3.flash_attn_with_kvcache(
                one, *caches, cache_seqlens=length, causal=True
            ),
            "fa3, forward and backward": step(dense_of_fa3),
        }
    return ours, peers


def microseconds(call: Call, wait: Callable[[], Any], with_gradients: bool, repeats: int) -> float:
    """Of the host, a call; what it has launched is waited for after the clock has stopped."""
    with torch.set_grad_enabled(with_gradients):
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        end = time.perf_counter()
        wait()
    return (end - start) / repeats * 1e6


def measure(device: str, turns: int = TURNS, repeats: int = CALLS) -> list[dict[str, Any]]:
    """A row a call."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    ours, peers = calls(device, 64 if device == "cuda" else 1)
    everything = dict(peers)
    for mode in ("deterministic", "standard"):
        everything |= {f"{mode}, {name}": call for name, call in ours.items()}

    def once(name: str, repeats: int) -> float:
        with determinism.deterministic(name.startswith("deterministic")):
            return microseconds(everything[name], wait, "backward" in name, repeats)

    for name in everything:
        once(name, WARM_UP)
    found: list[dict[str, float]] = []
    for _ in tqdm(range(turns), unit="turn"):
        found.append({name: once(name, repeats) for name in everything})
    rows = []
    for name in ours:
        peer = "sdpa, forward and backward" if "backward" in name else "sdpa, forward"
        columns = {"deterministic": f"deterministic, {name}", "standard": f"standard, {name}"}
        columns["sdpa"] = peer
        if f"fa3, {name}" in peers:
            columns["fa3"] = f"fa3, {name}"
        us = {key: round(statistics.median(t[c] for t in found), 1) for key, c in columns.items()}
        ratio = statistics.median(t[columns["deterministic"]] / t[peer] for t in found)
        rows.append({"call": name, "us": us, "ratio": round(ratio, 3)})
    return rows


def render(record: dict[str, Any]) -> str:
    has_fa3 = any("fa3" in row["us"] for row in record["calls"])
    sides = {"deterministic": "deterministic", "standard": "standard", "sdpa": "SDPA"}
    sides |= {"fa3": "FA3"} if has_fa3 else {}
    heading = ["call", *sides.values(), "deterministic / SDPA (target)", "verdict"]
    rows = []
    for row in record["calls"]:
        target = TARGETS[row["call"]]
        times = [f"{row['us'][side]:g}" if side in row["us"] else "" for side in sides]
        verdict = "PASS" if row["ratio"] <= target else "above target"
        rows.append([row["call"], *times, f"{row['ratio']:.2f} ({target:g})", verdict])
    lines = [f"| {' | '.join(cells)} |" for cells in (heading, *rows)]
    lines.insert(1, f"|{'---|' * len(heading)}")
    return "\n".join([f"{origin(record)}. Microseconds of the host a call, medians.", "", *lines])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--render", type=Path, help="print the table of a recorded run and stop")
    options = parser.parse_args(arguments)
    if options.render:
        print(render(read_record(options.render)))
        return 0
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("needs a GPU; --render prints what was measured on one")
    if not on_gpu:
        torch.set_num_threads(1)  # the host's time, not that of waking other threads
    provenance = gpu_provenance if on_gpu else cpu_provenance
    record = provenance("python -m benchmarks.host_time")
    record["calls"] = measure(options.device)
    print(render(record))
    path = results_path(record, "host_time.json")
    write_record(path, record)
    print(f"\nrecorded in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
