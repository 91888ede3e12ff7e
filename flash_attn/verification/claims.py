"""The claims by name, the problems they are tried on, and `verify`, which runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from . import relations
from .engines import ENGINES, Engine
from .problem import Problem, contract_steps
from .relations import Broken, Outcome, Subject
from .report import ClaimResult, Report

Relation = Callable[[Problem, Subject, Outcome], None]


@dataclass(frozen=True)
class Claim:
    """A relation, and what its row in the table says.

    `caught_in_standard`: standard mode is known to break it, so a control that does not is no
    control. `once`: the first problem is enough (it starts processes).
    """

    key: str
    title: str
    varied: str
    relation: Relation = field(repr=False)
    gradients: bool = False
    caught_in_standard: bool = False
    once: bool = False

    def applies(self, problem: Problem, engine: Engine) -> bool:
        if self.gradients and max(problem.seqlens_q) == 1:
            return False  # nobody trains through decoding
        if self.key == "num_splits" and not engine.has_num_splits:
            return False
        if self.key == "reduction" and not engine.has_partials:
            return False
        if self.key == "process" and engine.name != "deterministic":
            return False  # which process it is decides no control's bits
        if "threads" in self.key and torch.device(problem.device).type != "cpu":
            return False
        return engine.supports(problem)

    def run(self, problem: Problem, engine: Engine, outcome: Outcome | None = None) -> Outcome:
        """Run on one problem, adding to `outcome`; ends at the first mismatch."""
        outcome = Outcome() if outcome is None else outcome
        if self.applies(problem, engine):
            try:
                self.relation(problem, Subject(engine, self.gradients), outcome)
            except Broken:
                outcome.problem = str(problem)
        return outcome


def _claims() -> Iterator[Claim]:
    r = relations
    yield Claim("run", "run to run", "the same call again, poisoned scratch", r.run_to_run)
    yield Claim("process", "fresh process", "process, instruction set", r.fresh_process, once=True)
    yield Claim(
        "batch", "batch 8 = 4+4 = 1", "sequences per call", r.batch_size, caught_in_standard=True
    )
    yield Claim("position", "position in the batch", "reversed, rotated", r.position)
    yield Claim("neighbours", "neighbours", "their lengths and values, NaN too", r.neighbours)
    yield Claim("layout", "dense = varlen = kvcache = paged", "layout, shuffled pages", r.layouts)
    yield Claim("unused", "unused memory", "cache rows, page tails: 0, Inf, -3e4", r.unused_memory)
    yield Claim(
        "chunks", "chunked = whole prefill", "chunk size, append, packing", r.chunked_prefill
    )
    yield Claim(
        "decode",
        "decode row = prefill row",
        "rows per call, layout",
        r.decode,
        caught_in_standard=True,
    )
    yield Claim("speculative", "k draft tokens = prefill rows", "k = 2, 3, 5, 8", r.speculative)
    yield Claim("heads", "head sharding", "heads per call, groups kept", r.head_sharding)
    yield Claim("threads", "thread count", "1, 2, 3 and more threads", r.thread_count)
    yield Claim("num_splits", "num_splits is a hint", "1, 2, 3, 7, 128", r.num_splits)
    yield Claim("reduction", "fused = PyTorch-side fold", "who folds the segments", r.reduction)
    for key, relation in {
        "run": r.run_to_run,
        "batch": r.batch_size,
        "position": r.position,
        "neighbours": r.neighbours,
        "layout": r.layouts,
        "chunks": r.chunked_gradients,
        "heads": r.head_sharding,
        "threads": r.thread_count,
    }.items():
        title, varied = _GRADIENT_ROWS[key]
        yield Claim(f"grad_{key}", f"gradients: {title}", varied, relation, gradients=True)


_GRADIENT_ROWS = {
    "run": ("run to run", "the same call again, dropout too"),
    "batch": ("batch 8 = 4+4 = 1", "sequences per call"),
    "position": ("position", "reversed, rotated"),
    "neighbours": ("neighbours", "their lengths and values, NaN too"),
    "layout": ("varlen = dense", "layout"),
    "chunks": ("dQ of a chunk", "chunk size"),
    "heads": ("head sharding", "heads per call, groups kept"),
    "threads": ("thread count", "1, 2, 3 and more threads"),
}

CLAIMS: dict[str, Claim] = {claim.key: claim for claim in _claims()}


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
    # Whole segments, one block, and 13 keys of the next block: every kind of ragged end at once.
    medium, long = segment + block + 13, 2 * segment + block + 13
    quick = [
        Problem((medium,) * 3, (medium,) * 3, h_q=2, d=64, dtype=wide, name="prefill", **common),
        Problem(
            (1,) * 8,
            # Long and short neighbours; both sides of a segment and of a block; a single key.
            (4 * segment + 45, long, segment + 1, segment, block + 1, block, 700, 1),
            d=128,
            dtype=torch.float16,
            name="decode",
            **common,
        ),
        Problem(
            (1, 1),  # few rows: the more reason to split, and to split by the neighbour's length
            (4 * segment + 45, long),
            h_kv=1,
            dtype=torch.bfloat16,
            name="small decode",
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
            **common,
        ),
        Problem(
            (200, 129, 1, 64),  # new tokens behind a cached prefix, across a segment's end
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
            (long, segment - 1, 300),
            (long, segment + 1, 300),
            h_q=8,
            d=d,
            dtype=dtype,
            causal=causal,
            seed=d,
            name="sweep",
            **common,
        )
        for d in (32, 80, 128, 192, 256)
        for dtype in (wide, torch.float16)
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


def verify(
    problem: Problem | None = None,
    *,
    effort: str = "default",
    claims: Iterable[str] | None = None,
    controls: bool | None = None,
    device: str = "cpu",
    progress: Callable[[str, int, int], None] | None = None,
    **shapes: Any,
) -> Report:
    """Check the guarantee, byte for byte, and return a report to print.

    Args:
        problem: what to run; or give its fields as keywords (`seqlens_q=(1, 1), seqlens_k=(4000,
        70), h_q=32, ...`).
            Without either, the standard problems of `effort` run.
        effort: "quick", "default" or "full".
        claims: keys of `CLAIMS`; all of them when None.
        controls: also run the claims in standard mode and with PyTorch's attention, where some must
        break. Default:
            only for the standard problems, because a problem of your own may be too short to show
            anything.
        device: where the standard problems run.
        progress: called with (what runs, steps done, steps in all).

    Returns:
        A `Report`; `str(report)` is the table, `report.ok` the verdict.

    Example:
        >>> from flash_attn.determinism import verify
        >>> print(verify(seqlens_q=(1,) * 4, seqlens_k=(9000, 800, 77, 1), h_q=32, h_kv=8, d=128))
    """
    if shapes:
        if problem is not None:
            raise TypeError("give a problem or its fields as keywords, not both")
        problem = Problem(device=device, **shapes)
    problems = [problem] if problem is not None else standard_problems(effort, device)
    controls = problem is None if controls is None else controls
    chosen = [CLAIMS[key] for key in (CLAIMS if claims is None else claims)]
    engines = [e for e in ENGINES.values() if controls or e.name == "deterministic"]
    results = []
    with _enough_threads():
        for index, claim in enumerate(chosen):
            outcomes: dict[str, Outcome] = {}
            for engine in engines:
                if progress is not None:
                    step = index * len(engines) + len(outcomes)
                    progress(f"{claim.title} [{engine.title}]", step, len(chosen) * len(engines))
                outcomes[engine.name] = _over_problems(claim, problems, engine)
            results.append(
                ClaimResult(
                    claim.key, claim.title, claim.varied, claim.caught_in_standard, outcomes
                )
            )
    return Report(results, [str(p) for p in problems])


def _over_problems(claim: Claim, problems: list[Problem], engine: Engine) -> Outcome:
    outcome = Outcome()
    for problem in problems:
        claim.run(problem, engine, outcome)
        if outcome.mismatch is not None or (claim.once and outcome.cases):
            break
    return outcome


@contextmanager
def _enough_threads() -> Iterator[None]:
    """At least two threads: on one, standard mode has nothing to spread and could not be caught."""
    usual = torch.get_num_threads()
    torch.set_num_threads(max(2, usual))
    try:
        yield
    finally:
        torch.set_num_threads(usual)
