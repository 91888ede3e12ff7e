"""The problems that the claims are tried on when nobody brings their own."""

from __future__ import annotations

from typing import Any

import torch

from .problem import Problem, contract_steps


def standard_problems(effort: str = "default", device: str = "cpu") -> list[Problem]:
    """Problems whose lengths cross blocks and segments raggedly; `effort` as in `verify`.

    Lengths derive from the block and segment sizes that the library states for the device, so a
    family with longer segments gets longer problems.
    """
    gpu = torch.device(device).type == "cuda"
    common: dict[str, Any] = {"device": device, "page_size": 256 if gpu else 16}
    wide = torch.bfloat16 if gpu else torch.float32
    probe = Problem((1,), (16384,), dtype=wide, **common)
    block, boundaries = contract_steps(probe)
    segment = boundaries[1]
    # A GPU has room to cut a lone row into its blocks, which is as good a plan for twice as many
    # rows while the blocks are few: a control has to be longer there to be caught.
    reach = (20 if gpu else 4) * segment + 45
    # Whole segments, one block, and 13 keys of the next block: every kind of ragged end at once.
    medium, long = segment + block + 13, 2 * segment + block + 13
    quick = [
        Problem((medium,) * 3, (medium,) * 3, h_q=2, d=64, dtype=wide, name="prefill", **common),
        Problem(
            (1,) * 8,
            # Long and short neighbours; both sides of a segment and of a block; a single key.
            (reach, long, segment + 1, segment, block + 1, block, 700, 1),
            d=128,
            dtype=torch.float16,
            name="decode",
            **common,
        ),
        # So few rows that standard mode splits a batch by its longest member ...
        Problem(
            (1, 1),
            (reach, long),
            dtype=wide,
            name="small batch",
            **common,
        ),
        # ... and so few that it splits a shard of the heads otherwise than all of them.
        Problem(
            (1, 1),
            (reach if gpu else long, 700),
            h_q=16,
            h_kv=16,
            dtype=wide,
            name="many heads",
            **common,
        ),
        Problem(
            (medium, 1, 2 * block + 2, 77),
            (medium, segment + 3, 2 * block + 2, 77),
            d=40,  # not a power of two, not a multiple of 16
            dtype=torch.bfloat16,
            window_size=(block * 3 + 5, -1),
            alibi=True,
            softcap=20.0,
            name="every feature",
            # So many heads that standard mode does not cut this prefill's keys on a GPU, while it
            # cuts those of a lone row.
            h_q=32 if gpu else 4,
            h_kv=16 if gpu else 2,
            **common,
        ),
        Problem(
            (130, 90, 1, 64),  # new tokens behind a cached prefix, across a segment's end
            (4 * segment + 45, long, segment + 1, 64),
            d=96,
            dtype=torch.bfloat16,
            name="cached prefix",
            **{**common, "page_size": common["page_size"] if gpu else 7},
        ),
    ]
    if effort == "quick":
        return quick
    default = [
        *quick,
        Problem(
            (long,) * 2, (long,) * 2, d=128, dtype=torch.float16, name="longer prefill", **common
        ),
        Problem(
            (long, 300, 45),
            (segment + 77, 300, long),  # more queries than keys, as many, fewer
            h_q=2,
            h_kv=1,
            d=33,
            dtype=wide,
            causal=False,
            name="cross attention",
            **common,
        ),
        Problem(
            (1,) * 3,
            (20000, 16384, 5 * segment - 1),  # past 16384 keys, where segments may grow
            h_q=6,
            dtype=torch.bfloat16,
            name="long decode",
            **common,
        ),
    ]
    if effort == "default":
        return default
    sweep = [
        Problem(
            (medium, segment - 1, 300),
            (medium, segment + 1, 300),
            d=d,
            dtype=dtype,
            causal=causal,
            seed=d,
            name="sweep",
            **common,
        )
        for d, dtype in zip(
            (32, 80, 128, 192, 256),
            (torch.float16, wide, torch.bfloat16, torch.float16, wide),
            strict=True,
        )
        for causal in (True, False)
    ]
    far = Problem(
        (300, 1),
        (70001, 66000),  # past 65536 keys, where segments may grow again
        h_kv=1,
        d=128,
        dtype=torch.bfloat16,
        name="very long cache",
        **common,
    )
    return [*default, *sweep, far]
