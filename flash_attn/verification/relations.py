"""The guarantee as relations between calls, one function per claim.

Each relation runs the same rows twice under two schedules (another batch, layout, chunking, thread
count, ...) and compares bytes. It needs no reference values: only that nothing but the row itself
may decide a row's bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from ..testing import Mismatch, first_mismatch, poison_free_memory
from . import child
from .engines import Engine, FlashAttention
from .layouts import APPEND_LAYOUTS, Results
from .problem import Problem, Sequence, contract_steps, telling_rows

Piece = tuple[int, int, int]  # query rows [start, stop) of a sequence: (sequence, start, stop)

FORWARD_LAYOUTS = ("dense", "varlen", "kvcache", "paged")
GRADIENT_LAYOUTS = ("dense", "varlen")


class Broken(Exception):
    """Raised by `Outcome.compare` at the first mismatch; `Claim.run` ends the relation with it."""


@dataclass
class Outcome:
    """What one claim compared, and the first difference that it met (it stops there)."""

    cases: int = 0
    bytes_compared: int = 0
    mismatch: Mismatch | None = None
    problem: str = ""  # the one that the mismatch was found in

    @property
    def held(self) -> bool:
        return self.cases > 0 and self.mismatch is None

    def compare(self, label: str, actual: Results, expected: Results) -> None:
        self.cases += 1
        for name, tensor in actual.items():
            self.bytes_compared += tensor.numel() * tensor.element_size()
            self.mismatch = first_mismatch(tensor, expected[name], f"{name}, {label}")
            if self.mismatch is not None:
                raise Broken(str(self.mismatch))

    def compare_all(self, label: str, actual: Seq[Results], expected: Seq[Results]) -> None:
        for index, (left, right) in enumerate(zip(actual, expected, strict=True)):
            self.compare(f"{label}, sequence {index}", left, right)


@dataclass(frozen=True)
class Subject:
    """An engine, and what is asked of it: forward (out, lse) or gradients (dq, dk, dv)."""

    engine: Engine
    gradients: bool

    @property
    def layouts(self) -> tuple[str, ...]:
        wanted = GRADIENT_LAYOUTS if self.gradients else FORWARD_LAYOUTS
        return tuple(layout for layout in wanted if layout in self.engine.layouts)

    def run(
        self, problem: Problem, sequences: Seq[Sequence], layout: str, **schedule: float
    ) -> list[Results]:
        call = self.engine.gradients if self.gradients else self.engine.forward
        return call(problem, list(sequences), layout, **schedule)

    def layouts_for(self, sequences: Seq[Sequence]) -> tuple[str, ...]:
        """Every layout that can take these sequences; appending needs as many keys as queries."""
        if self.gradients:
            return self.layouts
        appendable = all(s.s_k >= s.s_q for s in sequences)
        return tuple(
            name for name in self.engine.layouts if appendable or name not in APPEND_LAYOUTS
        )


def run_to_run(problem: Problem, subject: Subject, outcome: Outcome) -> None:
    """The same call again, with NaN left in the memory that the kernel may get as scratch."""
    problems = [problem]
    if isinstance(subject.engine, FlashAttention) and not problem.softcap:
        problems.append(problem.replace(dropout_p=0.17))  # one seed: the mask is drawn again, alike
    for variant in problems:
        sequences = variant.sequences()
        for layout in subject.layouts:
            if variant.dropout_p and layout not in GRADIENT_LAYOUTS:
                continue  # caches have no dropout
            expected = subject.run(variant, sequences, layout)
            for repeat in range(2):
                poison_free_memory(variant.device)
                actual = subject.run(variant, sequences, layout)
                dropout = ", dropout" if variant.dropout_p else ""
                outcome.compare_all(f"{layout}{dropout}, repeat {repeat}", actual, expected)


def batch_size(problem: Problem, subject: Subject, outcome: Outcome) -> None:
    """The whole batch in one call, in two halves, and one sequence at a time."""
    sequences = problem.sequences()
    for layout in subject.layouts:
        whole = subject.run(problem, sequences, layout)
        for size in sorted({-(-problem.batch // 2), 1} - {problem.batch}):
            parts: list[Results] = []
            for start in range(0, problem.batch, size):
                parts += subject.run(problem, sequences[start : start + size], layout)
            outcome.compare_all(f"{layout}, {size} a call instead of {problem.batch}", parts, whole)


def position(problem: Problem, subject: Subject, outcome: Outcome) -> None:
    """The batch reversed, and rotated by one."""
    sequences = problem.sequences()
    forward = list(range(problem.batch))
    for layout in subject.layouts:
        expected = subject.run(problem, sequences, layout)
        for order in (forward[::-1], forward[1:] + forward[:1]):
            if order == forward:
                continue
            moved = subject.run(problem, [sequences[i] for i in order], layout)
            for place, index in enumerate(order):
                label = f"{layout}, sequence {index} moved to place {place}"
                outcome.compare(label, moved[place], expected[index])


def neighbours(problem: Problem, subject: Subject, outcome: Outcome) -> None:
    """One sequence kept, its neighbours made short, long, empty of keys, and filled with NaN."""
    if problem.batch == 1:
        return
    _, boundaries = contract_steps(problem)
    segment = boundaries[1] if len(boundaries) > 1 else max(problem.seqlens_k)
    kept = max(range(problem.batch), key=lambda i: problem.seqlens_k[i])
    s_q, s_k = problem.seqlens_q[kept], problem.seqlens_k[kept]
    sizes = {"short": (1, 1), "long": (s_q + 9, s_k + segment + 9), "keyless": (s_q, 0)}
    for layout in subject.layouts:
        expected = subject.run(problem, problem.sequences(), layout)[kept]
        companies = {"NaN": [_filled_with_nan(s) for s in problem.sequences()]}
        if layout != "dense":  # a dense batch has one length
            for name, (queries, keys) in sizes.items():
                queries = queries if layout == "varlen" else s_q  # a cache call has one s_q
                companies[name] = [problem.sequence(i, queries, keys) for i in range(problem.batch)]
        for name, company in companies.items():
            company[kept] = problem.sequence(kept)
            actual = subject.run(problem, company, layout)[kept]
            outcome.compare(f"{layout}, {name} neighbours of sequence {kept}", actual, expected)


def layouts(problem: Problem, subject: Subject, outcome: Outcome) -> None:
    """Dense, packed, cached, in shuffled pages; NaN in every byte that is no sequence's."""
    sequences = problem.sequences()
    expected = subject.run(problem, sequences, "dense")
    for layout in subject.layouts_for(sequences):
        if layout == "dense":
            continue
        for page_seed in (1, 2) if "page" in layout else (1,):
            schedule = {} if subject.gradients else {"page_seed": page_seed}
            actual = subject.run(problem, sequences, layout, **schedule)
            outcome.compare_all(f"{layout} instead of dense", actual, expected)


def unused_memory(problem: Problem, subject: Subject, outcome: Outcome) -> None:
    """Zeros, Inf and large numbers instead of NaN in cache rows, page tails and gaps."""
    sequences = problem.sequences()
    for layout in ("seqused", "varlen_paged", "kvcache", "paged"):
        if layout not in subject.engine.layouts:
            continue
        expected = subject.run(problem, sequences, layout)
        for fill in (0.0, float("inf"), -3e4):
            actual = subject.run(problem, sequences, layout, fill=fill)
            outcome.compare_all(f"{layout}, {fill} in unused memory", actual, expected)


def chunked_prefill(problem: Problem, subject: Subject, outcome: Outcome) -> None:
    """The queries cut into chunks, each called with the keys up to its end."""
    if not problem.rows_keep_their_keys or max(problem.seqlens_q) == 1:
        return
    sequences = problem.sequences()
    whole = subject.run(problem, sequences, "dense")
    block, boundaries = contract_steps(problem)
    # One block exactly; an odd size above it; most of a segment, so that chunks straddle its ends.
    for size, layout in (
        (block, "append"),
        (block + 13, "append_paged"),
        (block + 13, "dense"),
        (boundaries[-1] // 2 - 37 if len(boundaries) > 2 else block + 1, "varlen"),
    ):
        if layout not in subject.layouts_for(sequences):
            continue
        for pieces in _chunks(problem, size, grow=11 if layout == "varlen" else 0):
            _compare_pieces(problem, subject, outcome, sequences, whole, pieces, layout)


def _chunks(problem: Problem, size: int, grow: int) -> Iterator[list[Piece]]:
    """Chunk after chunk of every sequence that has one left, as a serving engine would batch them.

    `grow` makes the chunks of each sequence that much longer than those of the one before it.
    """
    starts = [0] * problem.batch
    while any(start < s_q for start, s_q in zip(starts, problem.seqlens_q, strict=True)):
        stops = [
            min(s_q, start + size + grow * index)
            for index, (start, s_q) in enumerate(zip(starts, problem.seqlens_q, strict=True))
        ]
        spans = zip(range(problem.batch), starts, stops, strict=True)
        yield [(index, start, stop) for index, start, stop in spans if start < stop]
        starts = stops


def decode(problem: Problem, subject: Subject, outcome: Outcome) -> None:
    """Single rows of a prefill, each as the newest token of a decode call."""
    _some_rows(problem, subject, outcome, count=1, rows_in_all=12)


def speculative(problem: Problem, subject: Subject, outcome: Outcome) -> None:
    """Runs of 2, 3, 5 and 8 rows of a prefill, as draft tokens to be verified in one call."""
    for count in (2, 3, 5, 8):
        _some_rows(problem, subject, outcome, count, rows_in_all=4)


def _some_rows(
    problem: Problem, subject: Subject, outcome: Outcome, count: int, rows_in_all: int
) -> None:
    if not problem.rows_keep_their_keys or max(problem.seqlens_q) <= count:
        return
    sequences = problem.sequences()
    whole = subject.run(problem, sequences, "dense")
    pieces = [
        (index, row, row + count)
        for index, s_q in enumerate(problem.seqlens_q)
        for row in telling_rows(problem, index, max(2, rows_in_all // problem.batch))
        if row + count <= s_q
    ]
    for layout in subject.layouts_for(_cut(problem, sequences, pieces)):
        _compare_pieces(problem, subject, outcome, sequences, whole, pieces, layout)


def _compare_pieces(
    problem: Problem,
    subject: Subject,
    outcome: Outcome,
    sequences: list[Sequence],
    whole: list[Results],
    pieces: list[Piece],
    layout: str,
) -> None:
    """Runs of rows, in one call (dense: in one call each), against the same rows of `whole`."""
    cut = _cut(problem, sequences, pieces)
    calls = [[piece] for piece in cut] if layout == "dense" else [cut]
    results = [result for call in calls for result in subject.run(problem, call, layout)]
    for (index, start, stop), result in zip(pieces, results, strict=True):
        label = f"{layout}, rows {start}:{stop} of sequence {index}"
        compared = {name: result[name] for name in whole[index]}
        outcome.compare(label, compared, _rows(whole[index], start, stop))


def _cut(problem: Problem, sequences: Seq[Sequence], pieces: Seq[Piece]) -> list[Sequence]:
    """Each piece with the keys up to its end."""
    return [
        sequences[i].query_rows(start, stop, problem.keys_for(i, stop)) for i, start, stop in pieces
    ]


def head_sharding(problem: Problem, subject: Subject, outcome: Outcome) -> None:
    """The heads split over several calls, GQA groups kept whole, as tensor parallelism does."""
    sequences = problem.sequences()
    divisors = [w for w in range(1, problem.h_kv) if problem.h_kv % w == 0]
    widths = sorted({*divisors[:1], *divisors[-1:]})  # one head a call, and the fewest calls
    group = problem.h_q // problem.h_kv
    for layout in subject.layouts:
        whole = subject.run(problem, sequences, layout)
        for width in widths:
            shard = problem.replace(h_q=width * group, h_kv=width)
            for start in range(0, problem.h_kv, width):
                parts = [s.kv_heads(start, start + width) for s in sequences]
                results = subject.run(shard, parts, layout)
                expected = [_heads(r, start, start + width, group) for r in whole]
                heads = f"kv heads {start}:{start + width} of {problem.h_kv}"
                outcome.compare_all(f"{layout}, {heads}", results, expected)


def chunked_gradients(problem: Problem, subject: Subject, outcome: Outcome) -> None:
    """dQ of a chunk of the queries, in a call of its own with the keys up to its end."""
    if not problem.rows_keep_their_keys:
        return
    sequences = problem.sequences()
    whole = [{"dq": result["dq"]} for result in subject.run(problem, sequences, "dense")]
    block, _ = contract_steps(problem)
    # Two thirds into each sequence: not at its end, and not on a boundary.
    stops = [-(-2 * s_q // 3) for s_q in problem.seqlens_q]
    pieces = [(i, max(0, stop - block - 13), stop) for i, stop in enumerate(stops)]
    for layout in subject.layouts:
        _compare_pieces(problem, subject, outcome, sequences, whole, pieces, layout)


def thread_count(problem: Problem, subject: Subject, outcome: Outcome) -> None:
    """1, 2, 3 and twice the usual number of threads."""
    sequences = problem.sequences()
    usual = torch.get_num_threads()
    for layout in subject.layouts:
        expected = subject.run(problem, sequences, layout)
        try:
            for count in sorted({1, 2, 3, 2 * usual} - {usual}):
                torch.set_num_threads(count)
                actual = subject.run(problem, sequences, layout)
                outcome.compare_all(f"{layout}, {count} threads, not {usual}", actual, expected)
        finally:
            torch.set_num_threads(usual)


def num_splits(problem: Problem, subject: Subject, outcome: Outcome) -> None:
    """The hint num_splits of flash_attn_with_kvcache: none, a few, more than there are blocks."""
    sequences = problem.sequences()
    for layout in ("kvcache", "paged"):
        expected = subject.run(problem, sequences, layout)
        for hint in (1, 2, 3, 7, 128):
            actual = subject.run(problem, sequences, layout, num_splits=hint)
            outcome.compare_all(f"{layout}, num_splits={hint}", actual, expected)


def reduction(problem: Problem, subject: Subject, outcome: Outcome) -> None:
    """The call's segments folded by plain PyTorch instead of by the kernel."""
    sequences = problem.sequences()
    for layout in ("dense", "varlen", "varlen_paged"):
        fused = subject.run(problem, sequences, layout)
        folded = subject.engine.from_partials(problem, sequences, layout)
        outcome.compare_all(f"{layout}, folded by PyTorch", folded, fused)


def fresh_process(problem: Problem, subject: Subject, outcome: Outcome) -> None:
    """Forward and backward in new processes, one for each instruction set of this machine."""
    block, boundaries = contract_steps(problem)
    cap = (
        (boundaries[1] if len(boundaries) > 1 else 0) + block + 13
    )  # small: one variant is scalar code
    small = problem.replace(
        seqlens_q=tuple(min(s, cap) for s in problem.seqlens_q[:2]),
        seqlens_k=tuple(min(s, cap) for s in problem.seqlens_k[:2]),
    )
    every_feature = small.replace(
        dtype=torch.bfloat16, d=40, softcap=20.0, alibi=True, window_size=(3 * block + 5, 0), seed=1
    )
    problems = [small, every_feature, every_feature.replace(dtype=torch.float16, causal=False)]
    expected = child.results(subject.engine, problems)
    variants = child.instruction_sets(problem.device)
    results = child.results_of_children(subject.engine, problems, variants)
    for variant, actual in zip(variants, results, strict=True):
        where = f"{variant or 'usual'} instructions, fresh process"
        for left, right in zip(actual, expected, strict=True):
            outcome.compare_all(where, left, right)


def _filled_with_nan(sequence: Sequence) -> Sequence:
    q, k, v, dout = (
        torch.full_like(tensor, float("nan"))
        for tensor in (sequence.q, sequence.k, sequence.v, sequence.dout)
    )
    return Sequence(q, k, v, dout, sequence.slopes)


def _rows(result: Results, start: int, stop: int) -> Results:
    return {n: t[:, start:stop] if n == "lse" else t[start:stop] for n, t in result.items()}


def _heads(result: Results, start: int, stop: int, group: int) -> Results:
    sharded = {}
    for name, tensor in result.items():
        factor = 1 if name in ("dk", "dv") else group
        heads = slice(start * factor, stop * factor)
        sharded[name] = tensor[heads] if name == "lse" else tensor[:, heads]
    return sharded
