"""The claims by name, and `verify`, which runs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from . import relations as r
from .engines import ENGINES, Engine
from .problem import Problem
from .relations import Broken, Outcome, Subject
from .report import ClaimResult, Report
from .suite import standard_problems

Relation = Callable[[Problem, Subject, Outcome], None]


@dataclass(frozen=True)
class Claim:
    """A relation, and what its row in the table says.

    `control`: standard mode is known to break it; when it does not, nothing was proven.
    `once`: the first problem is enough (it starts processes).
    """

    key: str
    title: str
    varied: str
    relation: Relation = field(repr=False)
    gradients: bool = False
    control: bool = False
    once: bool = False

    def applies(self, problem: Problem, engine: Engine) -> bool:
        if self.gradients and max(problem.seqlens_q) == 1:
            return False  # nobody trains through decoding
        if problem.dropout_p and self.relation is not r.run_to_run:
            return False  # which keys are dropped depends on batch index and head by definition
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


_ALL_CLAIMS = (
    # key, title, what is varied, relation
    Claim("run", "run to run", "the same call again, poisoned scratch", r.run_to_run),
    Claim("process", "fresh process", "process, instruction set", r.fresh_process, once=True),
    Claim("batch", "batch 8 = 4+4 = 1", "sequences per call", r.batch_size, control=True),
    Claim("position", "position in the batch", "reversed, rotated", r.position),
    Claim("neighbours", "neighbours", "their lengths and values, NaN too", r.neighbours),
    Claim("layout", "dense = varlen = kvcache = paged", "layout, shuffled pages", r.layouts),
    Claim("unused", "unused memory", "cache rows, page tails: 0, Inf, -3e4", r.unused_memory),
    Claim("chunks", "chunked = whole prefill", "chunk size, append, packing", r.chunked_prefill),
    Claim("decode", "decode row = prefill row", "rows per call, layout", r.decode, control=True),
    Claim("speculative", "k draft tokens = prefill rows", "k = 2, 3, 5, 8", r.speculative),
    Claim("heads", "head sharding", "heads per call, groups kept", r.head_sharding),
    Claim("threads", "thread count", "1, 2, 3 and more threads", r.thread_count, control=True),
    Claim("num_splits", "num_splits is a hint", "1, 2, 3, 7, 128", r.num_splits, control=True),
    Claim("reduction", "fused = PyTorch-side fold", "who folds the segments", r.reduction),
    *(
        Claim(f"grad_{key}", f"gradients: {title}", varied, relation, gradients=True)
        for key, title, varied, relation in (
            ("run", "run to run", "the same call again, dropout too", r.run_to_run),
            ("batch", "batch 8 = 4+4 = 1", "sequences per call", r.batch_size),
            ("position", "position", "reversed, rotated", r.position),
            ("neighbours", "neighbours", "their lengths and values, NaN too", r.neighbours),
            ("layout", "varlen = dense", "layout", r.layouts),
            ("chunks", "dQ of a chunk", "chunk size", r.chunked_gradients),
            ("heads", "head sharding", "heads per call, groups kept", r.head_sharding),
            ("threads", "thread count", "1, 2, 3 and more threads", r.thread_count),
        )
    ),
)

CLAIMS: dict[str, Claim] = {claim.key: claim for claim in _ALL_CLAIMS}


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
                ClaimResult(claim.key, claim.title, claim.varied, claim.control, outcomes)
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
