"""The problems that the claims are tried on when nobody brings their own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .problem import Problem, contract_steps


@dataclass(frozen=True)
class _Steps:
    """What the problems of a device derive from; lengths are in keys."""

    device: str
    block: int
    segment: int  # the first one

    @property
    def gpu(self) -> bool:
        return torch.device(self.device).type == "cuda"

    @property
    def wide(self) -> torch.dtype:
        """The dtype of the widest range that the device computes in."""
        return torch.bfloat16 if self.gpu else torch.float32

    @property
    def page_size(self) -> int:
        return 256 if self.gpu else 16

    @property
    def reach(self) -> int:
        """A cache that standard mode splits for a lone row, and otherwise for more rows.

        A GPU has room to cut a lone row into its blocks, which is as good a plan for twice as many
        rows while the blocks are few: a control has to be longer there to be caught.
        """
        return (20 if self.gpu else 4) * self.segment + 45

    @property
    def medium(self) -> int:
        """A segment, a block, and 13 keys of the next block: every kind of ragged end at once."""
        return self.segment + self.block + 13

    @property
    def long(self) -> int:
        """As ``medium``, with a second segment."""
        return 2 * self.segment + self.block + 13

    def problem(self, s_q: tuple[int, ...], s_k: tuple[int, ...], **options: Any) -> Problem:
        """A problem on the device, in ``wide`` unless ``options`` say otherwise."""
        usual: dict[str, Any] = {
            "device": self.device,
            "page_size": self.page_size,
            "dtype": self.wide,
        }
        return Problem(s_q, s_k, **usual | options)


def standard_problems(effort: str = "default", device: str = "cpu") -> list[Problem]:
    """Problems whose lengths cross blocks and segments raggedly; `effort` as in `verify`.

    Lengths derive from the block and segment sizes that the library states for the device, so a
    contract with longer segments gets longer problems.
    """
    block, boundaries = contract_steps(_Steps(device, 0, 0).problem((1,), (16384,)))
    steps = _Steps(device, block, boundaries[1])
    problems = _quick(steps)
    if effort != "quick":
        problems += _default(steps)
    if effort not in ("quick", "default"):
        problems += _full(steps)
    return problems


def _quick(steps: _Steps) -> list[Problem]:
    """Every layout and every feature once."""
    block, segment = steps.block, steps.segment
    reach, medium, long = steps.reach, steps.medium, steps.long
    return [
        steps.problem((medium,) * 3, (medium,) * 3, h_q=2, d=64, name="prefill"),
        steps.problem(
            (1,) * 8,
            # Long and short neighbours; both sides of a segment and of a block; a single key.
            (reach, long, segment + 1, segment, block + 1, block, 700, 1),
            d=128,
            dtype=torch.float16,
            name="decode",
        ),
        # So few rows that standard mode splits a batch by its longest member ...
        steps.problem((1, 1), (reach, long), name="small batch"),
        # ... and so few that it splits a shard of the heads otherwise than all of them.
        steps.problem(
            (1, 1), (reach if steps.gpu else long, 700), h_q=16, h_kv=16, name="many heads"
        ),
        steps.problem(
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
            h_q=32 if steps.gpu else 4,
            h_kv=16 if steps.gpu else 2,
        ),
        steps.problem(
            (130, 90, 1, 64),  # new tokens behind a cached prefix, across a segment's end
            (4 * segment + 45, long, segment + 1, 64),
            d=96,
            dtype=torch.bfloat16,
            name="cached prefix",
            page_size=steps.page_size if steps.gpu else 7,
        ),
    ]


def _default(steps: _Steps) -> list[Problem]:
    """Longer ones, and queries that are not as many as the keys."""
    segment, long = steps.segment, steps.long
    return [
        steps.problem((long,) * 2, (long,) * 2, d=128, dtype=torch.float16, name="longer prefill"),
        steps.problem(
            (long, 300, 45),
            (segment + 77, 300, long),  # more queries than keys, as many, fewer
            h_q=2,
            h_kv=1,
            d=33,
            causal=False,
            name="cross attention",
        ),
        steps.problem(
            (1,) * 3,
            (20000, 16384, 5 * segment - 1),  # past 16384 keys, where segments may grow
            h_q=6,
            dtype=torch.bfloat16,
            name="long decode",
        ),
    ]


def _full(steps: _Steps) -> list[Problem]:
    """Head dims and dtypes, with a mask and without; the longest cache."""
    segment, medium, wide = steps.segment, steps.medium, steps.wide
    dtypes = {
        32: torch.float16,
        80: wide,
        128: torch.bfloat16,
        192: torch.float16,
        256: wide,
    }
    sweep = [
        steps.problem(
            (medium, segment - 1, 300),
            (medium, segment + 1, 300),
            d=d,
            dtype=dtype,
            causal=causal,
            seed=d,
            name="sweep",
        )
        for d, dtype in dtypes.items()
        for causal in (True, False)
    ]
    far = steps.problem(
        (300, 1),
        (70001, 66000),  # past 65536 keys, where segments may grow again
        h_kv=1,
        d=128,
        dtype=torch.bfloat16,
        name="very long cache",
    )
    return [*sweep, far]
