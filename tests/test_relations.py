"""The guarantee on random problems: every relation holds byte for byte, and can be seen to break.

hypothesis draws lengths that cluster around the ends of blocks and segments, and switches every
feature on and off. Each relation also has a control: all of them must catch an engine that is wrong
in one bit, and some must catch standard mode and PyTorch's attention.
"""

import pytest
import torch
from device import BLOCK, DEVICE, DTYPES, FINEST, ON_GPU, SEGMENT, page_size
from hypothesis import given
from hypothesis import strategies as st
from strategies import HEAD_DIMS, LENGTHS

from flash_attn import determinism, flash_attn_func
from flash_attn.testing import assert_bitwise_equal, bitwise_equal, first_mismatch, page_table
from flash_attn.verification import (
    CLAIMS,
    ENGINES,
    FlashAttention,
    Problem,
    child,
    standard_problems,
)
from flash_attn.verification.problem import contract_steps, telling_rows

BUDGET = 1 << 27  # multiply-adds of q.k in one forward pass: a few milliseconds

# These cut a sequence's rows into calls of their own, which only some masks allow.
ROW_CLAIMS = ("chunks", "decode", "speculative", "grad_chunks")
# fresh_process starts interpreters: once, below, is enough.
RELEVANT_CLAIMS = [claim for key, claim in CLAIMS.items() if not (ON_GPU and "threads" in key)]
RANDOM_CLAIMS = [claim for claim in RELEVANT_CLAIMS if claim.key != "process"]

# What each control is known to break. A GPU's standard mode counts a call's tiles and ignores the
# lengths of its sequences; PyTorch's kernel there ignores the batch while it is large.
BROKEN_BY_STANDARD_MODE = ["batch", "chunks", "decode", "heads", "num_splits"]
BROKEN_BY_PYTORCH = ["chunks", "decode"]
if not ON_GPU:
    BROKEN_BY_STANDARD_MODE += ["neighbours", "layout", "threads"]
    BROKEN_BY_PYTORCH += ["batch", "layout", "speculative"]

WINDOWS = st.one_of(
    st.just((-1, -1)),
    st.tuples(st.integers(-1, 700), st.integers(-1, 130)),
)


@st.composite
def problems(draw, rows: bool, gradients: bool):
    """`rows`: several query rows, and a mask under which they can be called on their own."""
    causal = rows or draw(st.booleans())
    d, group = draw(HEAD_DIMS), draw(st.sampled_from([1, 2, 3, 4]))
    h_kv = draw(st.integers(1, 4))
    per_pair = h_kv * group * d  # multiply-adds for one query and one key
    budget = BUDGET // 4 if gradients else BUDGET
    lengths = []
    for _ in range(draw(st.integers(2, 4))):
        s_k = draw(LENGTHS)
        kinds = ["self", "suffix"] if rows else ["self", "suffix", "cross", "decode"]
        kind = draw(st.sampled_from(kinds))
        s_q = {"self": s_k, "decode": 1}.get(kind) or draw(LENGTHS)
        s_q = max(1, min(s_q, s_k if kind == "suffix" else s_q, budget // (per_pair * s_k)))
        lengths.append((s_q, s_k))
        budget -= s_q * s_k * per_pair
        if budget <= 0:
            break
    if draw(st.booleans()):  # one length for all, so that a dense batch holds them all
        lengths = [lengths[0]] * len(lengths)
    return Problem(
        seqlens_q=tuple(s_q for s_q, _ in lengths),
        seqlens_k=tuple(s_k for _, s_k in lengths),
        h_q=h_kv * group,
        h_kv=h_kv,
        d=d,
        dtype=draw(st.sampled_from(DTYPES)),
        causal=causal,
        window_size=draw(WINDOWS),
        softcap=draw(st.sampled_from([0.0, 0.0, 15.0])),
        alibi=draw(st.booleans()),
        softmax_scale=draw(st.sampled_from([None, None, 0.3])),
        page_size=page_size(draw(st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 256])))),
        device=str(DEVICE),
        seed=draw(st.integers(0, 999)),
    )


@pytest.mark.parametrize("claim", RANDOM_CLAIMS, ids=lambda claim: claim.key)
@given(data=st.data())
def test_relation_holds(claim, data):
    """Deterministic mode gives the same bytes under every schedule that the claim varies."""
    problem = data.draw(problems(claim.key in ROW_CLAIMS, claim.gradients))
    outcome = claim.run(problem, ENGINES["deterministic"])
    assert outcome.mismatch is None, f"{outcome.problem}\n{outcome.mismatch}"


def test_fresh_processes_agree():
    """A new process gives the same bytes under every instruction set that this machine has."""
    outcome = CLAIMS["process"].run(
        standard_problems("quick", str(DEVICE))[0], ENGINES["deterministic"]
    )
    assert outcome.held, outcome.mismatch


def breaks(claim, engine):
    """Whether the claim finds a difference somewhere on the problems of --quick."""
    return any(
        claim.run(problem, engine).mismatch is not None
        for problem in standard_problems("quick", str(DEVICE))
    )


@pytest.mark.parametrize("key", BROKEN_BY_STANDARD_MODE)
def test_control_standard_mode_breaks(key):
    """Standard mode splits by batch and threads: what these claims forbid, they must see."""
    assert breaks(CLAIMS[key], ENGINES["standard"])


@pytest.mark.parametrize("key", BROKEN_BY_PYTORCH)
def test_control_pytorch_breaks(key):
    """The same harness catches PyTorch's own attention."""
    assert breaks(CLAIMS[key], ENGINES["pytorch"])


class OneBitOff(FlashAttention):
    """Deterministic mode, but after the first call one element of each result is off by a bit."""

    def __init__(self):
        super().__init__(deterministic=True)
        self.calls = 0

    def spoilt(self, results):
        self.calls += 1
        if self.calls > 1:
            for tensors in results:
                name = "dq" if "dq" in tensors else "out"
                tensors[name] = tensors[name].clone()
                tensors[name].view(torch.uint8)[0, 0, 0] ^= 1
        return results

    def forward(self, *arguments, **schedule):
        return self.spoilt(super().forward(*arguments, **schedule))

    def gradients(self, *arguments):
        return self.spoilt(super().gradients(*arguments))

    def from_partials(self, *arguments):
        return self.spoilt(super().from_partials(*arguments))


@pytest.mark.parametrize("claim", RELEVANT_CLAIMS, ids=lambda claim: claim.key)
def test_control_one_wrong_bit_is_found(claim, monkeypatch):
    """Every claim compares what it says: one bit off in one element breaks it, and is located."""
    right = FlashAttention(deterministic=True)
    monkeypatch.setattr(  # interpreters take seconds to start, and are not what is tried here
        child,
        "results_of_children",
        lambda engine, problems, sets: [child.results(right, problems) for _ in sets],
    )
    problem = Problem((150, 150), (150, 150), d=16, dtype=FINEST, device=str(DEVICE))
    assert claim.run(problem, right).held, "nothing was compared, or the claim does not hold"
    mismatch = claim.run(problem, OneBitOff()).mismatch
    assert mismatch is not None
    assert mismatch.coordinate == (0, 0, 0)
    assert mismatch.differing == 1


def test_control_another_fold_order_breaks():
    """The PyTorch-side fold repeats the kernel's bytes because of its order, not by luck."""
    q, k, v = torch.randn(3, 1, 2 * SEGMENT + 76, 2, 32).to(DEVICE, FINEST)  # three segments
    with determinism.deterministic():
        out = flash_attn_func(q, k, v)
        partials = determinism.forward_partials(q, k, v)
    backwards = determinism.Partials(
        partials.out.flip(0), partials.max_log2.flip(0), partials.sum.flip(0)
    )
    folded, lse = determinism.reduce_partials(partials, q.dtype)
    assert bitwise_equal(folded, out)
    other_folded, other_lse = determinism.reduce_partials(backwards, q.dtype)
    assert not (bitwise_equal(other_folded, out) and bitwise_equal(other_lse, lse))


def test_lengths_cross_real_boundaries():
    """The constants that the random lengths cluster around are the library's."""
    block, boundaries = contract_steps(Problem((1,), (2500,), dtype=FINEST, device=str(DEVICE)))
    assert (block, boundaries[1]) == (BLOCK, SEGMENT)
    s = SEGMENT + 188
    rows = telling_rows(Problem((s,), (s,), dtype=FINEST, device=str(DEVICE)), 0, limit=99)
    assert {0, 63, 64, SEGMENT - 1, SEGMENT, SEGMENT + 1, s - 1} <= set(rows)


def test_comparison_is_of_bytes():
    """-0.0 is not 0.0, one NaN is not another, and the first difference is located."""
    zeros = torch.zeros(2, 3)
    other = zeros.clone()
    other[1, 2] = -0.0
    mismatch = first_mismatch(other, zeros, "x")
    assert (mismatch.coordinate, mismatch.differing, mismatch.total) == ((1, 2), 1, 6)
    assert "0x80000000" in str(mismatch)

    quiet = torch.full((2,), float("nan"))
    payload = quiet.view(torch.int32).add(1).view(torch.float32)
    assert bitwise_equal(quiet, quiet.clone())
    assert not bitwise_equal(quiet, payload)
    assert not bitwise_equal(zeros, zeros.half())
    with pytest.raises(AssertionError, match=r"shape of y: \(3, 2\) instead of \(2, 3\)"):
        assert_bitwise_equal(zeros.T, zeros, "y")
    assert bitwise_equal(zeros.T.contiguous().T, zeros), "strides are not values"


def test_page_tables_share_no_page():
    """Each sequence gets pages of its own, in no order, with stale entries behind them."""
    table, num_pages = page_table((40, 7, 16), page_size=8, seed=1)
    used = [table[0, :5].tolist(), table[1, :1].tolist(), table[2, :2].tolist()]
    flat = [page for pages in used for page in pages]
    assert len(set(flat)) == len(flat) == 8
    assert max(flat) < num_pages
    assert used[0] != sorted(used[0])
    assert set(table[1, 1:].tolist()).isdisjoint(flat)
