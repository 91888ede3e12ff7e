"""Segments, their partials and their fold, in PyTorch as in the kernel; infinities and NaN."""

import ctypes
import ctypes.util
import itertools
import math

import pytest
import torch
from device import DEVICE, DTYPES, FINEST, LADDER, ON_GPU, WIDEST
from hypothesis import example, given
from hypothesis import strategies as st
from row_calls import assert_same, run
from strategies import (
    BLOCK,
    RICH_DENSE,
    RICH_PACKS,
    SEGMENT,
    Problem,
    dense_problems,
    varlen_problems,
    with_examples,
)

from flash_attn import determinism, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.determinism import deterministic, explain, forward_partials, reduce_partials

# Keys: two segments, a block and a bit; one block and a bit.
LONG, SHORT = 2 * SEGMENT + BLOCK + 12, BLOCK + 6


@pytest.fixture(autouse=True)
def deterministic_mode():
    with deterministic():
        yield


# ---- Segments and their reduction ----


@given(st.integers(1, 300_000), st.integers(1, 300_000))
def test_boundaries_are_a_property_of_the_position(short, long):
    """Ascending multiples of the block; a prefix's boundaries are a prefix of the whole's."""
    short, long = sorted((short, long))
    options = {"dtype": FINEST, "device": DEVICE, "deterministic": True}
    few = explain(1, short, 1, 1, 64, **options)
    many = explain(7, long, 4, 2, 64, b=3, **options)
    assert few.block == many.block == BLOCK
    begins = [x for x in many.boundaries if x < long]
    assert [x for x in few.boundaries if x < short] == [x for x in begins if x < short]
    assert begins[0] == 0 and all(x % BLOCK == 0 for x in begins)
    steps = [b - a for a, b in itertools.pairwise(begins)]
    assert steps == [LADDER[max(rung for rung in LADDER if rung <= x)] for x in begins[:-1]]


@with_examples(RICH_DENSE, 2, 0)
@given(dense_problems(1 << 22), st.sampled_from([0, 1, 2, 5]), st.integers(-4, 12))
def test_reduction_in_pytorch_is_the_fused_one(problem, num_splits, exponent):
    """forward_partials and reduce_partials give the bytes of the fused call, in both modes."""
    q, k, v = problem.dense()
    k = k * 2.0**exponent  # scores from nearly equal to one-hot, beyond the fold's cut-off
    with deterministic(problem.deterministic):
        partials = forward_partials(q, k, v, num_splits=num_splits, **problem.options())
        fused = flash_attn_with_kvcache(
            q, k, v, num_splits=num_splits, return_softmax_lse=True, **problem.options()
        )
    assert_same(reduce_partials(partials, problem.dtype), fused, "reduced in PyTorch")


@with_examples(RICH_PACKS)
@given(varlen_problems(1 << 21))
def test_reduction_of_a_pack(problem):
    """The same for packs; out (n, total_q, h_q, d), max_log2 and sum (n, h_q, total_q)."""
    q, k, v = problem.packed()
    cu_q, cu_k = problem.cu_seqlens()
    extents = (cu_q, cu_k, max(problem.seqlens_q), max(problem.seqlens_k))
    fused = flash_attn_varlen_func(q, k, v, *extents, return_attn_probs=True, **problem.options())
    partials = forward_partials(
        q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, max_seqlen_q=extents[2],
        max_seqlen_k=extents[3], **problem.options(),
    )  # fmt: skip
    assert partials.out.shape[1:] == q.shape and partials.sum.shape[1:] == fused[1].shape
    assert_same(reduce_partials(partials, problem.dtype), fused[:2], "reduced in PyTorch")


@pytest.mark.parametrize("apart", [1, 24, 125, 126, 127, 130, 131, 200, 1000])
@pytest.mark.parametrize("dominant", [0, SEGMENT])
def test_fold_of_distant_segments(apart, dominant):
    """Two maxima 2^apart apart; a segment whose reference lies 127 below counts as nothing."""
    on_device = {"dtype": WIDEST, "device": DEVICE}
    q, k, v = (torch.zeros(1, n, 1, 16, **on_device) for n in (1, 2 * SEGMENT, 2 * SEGMENT))
    q[..., 0] = 1.0
    k[:, dominant, :, 0] = apart
    other = SEGMENT - dominant
    v[:, other] = 1e37  # visible even under a weight of 2^-126
    with_ln2 = {"softmax_scale": math.log(2.0)}
    out, lse = run(q, k, v, **with_ln2)
    assert_same(reduce_partials(forward_partials(q, k, v, **with_ln2), WIDEST), (out, lse))
    others = 2 * SEGMENT - 1  # keys of weight 2^-apart beside the dominant one
    weight = 2.0**-apart / (1.0 + others * 2.0**-apart)
    most = 126 + (4 if ON_GPU else 0)  # a flat block's reference lies 4 above its scores there
    expected = 1e37 * weight if apart <= most else 0.0
    rtol = max(1e-5, torch.finfo(WIDEST).eps)
    torch.testing.assert_close(out, torch.full_like(out, expected), rtol=rtol, atol=0.0)


FLOATS = st.floats(width=32)  # subnormal, infinite and NaN among them


@given(FLOATS, st.integers(-126, 8), FLOATS)
@example(1.0, -24, 1.0).via("a tie")
@example(1.0 + 2.0**-23, -24, 1.0).via("just above a tie")
@example(2.0**-149, -126, 2.0**-126).via("far below the smallest number")
@example(3 * 2.0**-149, -1, 2.0**-149).via(
    "a product that underflows: 2.5 rounds to 2, 1.5 + 1 to 3"
)
def test_multiply_add_in_pytorch_rounds_once(x, exponent, y):
    """As fmaf of the C library."""
    fmaf = ctypes.CDLL(ctypes.util.find_library("m")).fmaf
    fmaf.restype, fmaf.argtypes = ctypes.c_float, [ctypes.c_float] * 3
    tensors = (torch.tensor(value, device=DEVICE) for value in (x, 2.0**exponent, y))
    actual = determinism._multiply_add(*tensors).cpu()
    expected = torch.tensor(fmaf(x, 2.0**exponent, y))
    torch.testing.assert_close(actual, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.cpu_only  # 16 bits hold no values as small
def test_a_fold_rounds_once_where_its_product_underflows():
    """In units of 2^-149, 1 + 3 / 2 = 2.5 is 2, but 3 with the product rounded first; l is 1.5."""
    q, k, v = (torch.zeros(1, n, 1, 16) for n in (1, 2 * SEGMENT, 2 * SEGMENT))
    q[..., 0] = 1.0
    k[..., 0] = -300.0  # weighs nothing, but for the first key of each segment
    k[:, 0, :, 0], k[:, SEGMENT, :, 0] = 0.0, -1.0
    v[:, 0], v[:, SEGMENT] = 2.0**-149, 3 * 2.0**-149
    with_ln2 = {"softmax_scale": math.log(2.0)}
    out, lse = run(q, k, v, **with_ln2)
    assert_same(reduce_partials(forward_partials(q, k, v, **with_ln2), torch.float32), (out, lse))
    once, twice = (torch.tensor(n * 2.0**-149) / 1.5 for n in (2, 3))
    assert once != twice
    torch.testing.assert_close(out, once.expand_as(out), rtol=0.0, atol=0.0)


@pytest.mark.parametrize(("apart", "stays"), [(-9, True), (8, True), (9, False)])
def test_fold_moves_its_reference_when_a_segment_lies_well_above(apart, stays):
    """By more than 8. Powers of two hide it, but for values so large that 2^8 times a sum of them
    is infinite."""
    q, k, v = (torch.zeros(1, n, 1, 16, dtype=WIDEST, device=DEVICE) for n in (1, LONG, LONG))
    q[..., 0] = 1.0
    k[:, SEGMENT:, :, 0] = apart
    above = 4 if ON_GPU else 0  # a flat block's reference lies as much above its scores
    v[:] = 2.0 ** (112 + above)
    with_ln2 = {"softmax_scale": math.log(2.0)}
    partials = forward_partials(q, k, v, **with_ln2)
    assert partials.max_log2.flatten().tolist() == [above, apart + above, apart + above]
    out, lse = run(q, k, v, **with_ln2)
    assert out.isinf().all() if stays and apart > 0 else out.isfinite().all()
    assert_same(reduce_partials(partials, WIDEST), (out, lse))


def test_partials_say_what_each_segment_saw():
    """A segment that a row does not see has max_log2 = -inf, sum = 0, out = 0."""
    q, k, v = Problem((10,), (LONG,), 2, 1, 16, FINEST).dense()
    partials = forward_partials(q, k, v, window_size=(70, 0))  # some rows see two segments
    assert partials.out.shape == (3, 1, 10, 2, 16) and partials.out.dtype == torch.float32
    assert partials.max_log2.shape == partials.sum.shape == (3, 1, 2, 10)
    assert partials.max_log2[0].isneginf().all() and partials.max_log2[2].isfinite().all()
    assert torch.count_nonzero(partials.sum[0]) == torch.count_nonzero(partials.out[0]) == 0
    several = partials.max_log2.isfinite().sum(0) > 1
    assert several.any() and not several.all()
    references = partials.max_log2[:, several]
    assert torch.equal(references, references.round()), "rows with several segments are closed"
    if not ON_GPU:  # where flat blocks have integers at once
        alone = partials.max_log2[:, ~several].nan_to_num(neginf=0.0)
        assert not torch.equal(alone, alone.round()), "and others are left as they are"


# ---- Infinities and NaN ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("at", [0, 3, 15, 16, 63, 64, 600])
@pytest.mark.parametrize("which", ["k", "v"])
def test_nan_reaches_the_rows_that_see_it(which, at, dtype):
    """A NaN in a visible key or value makes NaN of every row that sees it, and of no other lse."""
    q, k, v = Problem((640,), (640,), 2, 2, 24, dtype).dense()
    (k if which == "k" else v)[0, at, 1, 7] = math.nan
    for window in ((-1, 0), (0, 0)):
        out, lse = run(q, k, v, window_size=window)
        seeing = slice(at, None) if window[0] < 0 else slice(at, at + 1)
        columns = slice(None) if which == "k" else slice(7, 8)
        assert out[0, seeing, 1, columns].isnan().all(), window
        assert out[0, :, 0].isfinite().all(), "the other head"
        not_seeing = torch.ones(640, dtype=torch.bool)
        not_seeing[seeing] = False
        # A matrix instruction multiplies hidden values of a block by zero, and keeps their NaN.
        if which == "k" or not ON_GPU:
            assert out[0, not_seeing].isfinite().all(), "nothing behind the mask arrives"
        if which == "k":
            assert lse[0, 1, seeing].isnan().all(), window
        else:
            not_seeing[:] = True  # a value does not enter lse
        assert lse[0, 1, not_seeing].isfinite().all() and lse[0, 0].isfinite().all()
        partials = forward_partials(q, k, v, window_size=window)
        assert_same(reduce_partials(partials, dtype), (out, lse), f"reduced, {window}")


def test_infinite_values():
    """An infinity in a visible value is an infinity of that sign; both signs make NaN."""
    q, k, v = Problem((3,), (SEGMENT + SHORT,), 2, 2, 16, WIDEST).dense()
    v[0, 5, :, 0], v[0, 550, :, 1] = math.inf, -math.inf
    v[0, 6, :, 2], v[0, 560, :, 2] = math.inf, -math.inf
    out, lse = run(q, k, v)
    assert out[..., 0].isposinf().all() and out[..., 1].isneginf().all()
    assert out[..., 2].isnan().all() and out[..., 3:].isfinite().all() and lse.isfinite().all()
    assert_same(reduce_partials(forward_partials(q, k, v), WIDEST), (out, lse))
