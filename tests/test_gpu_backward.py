"""The backward pass on a GPU: against float64, and against itself, byte for byte."""

import dataclasses

import pytest
import torch
from device import DEVICE, DTYPES
from gradient_calls import check_dense, check_dense_under_dropout, check_pack
from row_calls import assert_same
from strategies import Problem, autograd

from flash_attn import determinism, flash_attn_func, flash_attn_varlen_func
from flash_attn.testing import (
    assert_bitwise_equal,
    bitwise_equal,
    cumulative_lengths,
    poison_free_memory,
)

pytestmark = pytest.mark.gpu

# Whole and ragged eights and sixteens, and both sides of every bucket of head dims.
HEAD_DIMS = (8, 17, 32, 33, 40, 64, 72, 96, 97, 127, 128, 129, 160, 192, 200, 255, 256)


@pytest.fixture(autouse=True)
def deterministic_mode():
    determinism.set_deterministic(True)


# ---- Against float64 ----

# s_q, s_k, h_q, h_kv and options; 130 and 300 cross blocks of queries and keys raggedly.
PROBLEMS = {
    "plain": (130, 300, 2, 2, {}),
    "causal": (200, 200, 4, 2, {"causal": True}),
    "window": (130, 300, 2, 1, {"window_size": (70, 20)}),
    "causal_window": (200, 260, 2, 1, {"causal": True, "window_size": (90, -1)}),
    "softcap": (64, 300, 4, 2, {"softcap": 2.0, "causal": True}),
    "alibi": (129, 300, 4, 1, {"alibi": "heads", "causal": True}),
    "alibi_batch": (70, 130, 2, 2, {"alibi": "batch", "window_size": (-1, 50)}),
    "mqa": (100, 200, 8, 1, {"causal": True}),
    "more_queries": (300, 77, 2, 1, {"causal": True}),  # 223 rows see nothing
    "more_queries_all_see": (300, 77, 3, 3, {}),
    "one_key": (90, 1, 2, 1, {}),
    "one_query": (1, 300, 4, 2, {"causal": True}),
    "negative_scale": (65, 130, 2, 2, {"softmax_scale": -0.3}),
    "gaps": (65, 130, 4, 2, {"layout": "gapped", "causal": True}),
    "transposed": (65, 130, 4, 2, {"layout": "heads_first", "causal": True}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_accuracy(problem, d, dtype):
    s_q, s_k, h_q, h_kv, options = PROBLEMS[problem]
    check_dense(Problem((s_q,) * 2, (s_k,) * 2, h_q, h_kv, d, dtype, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("options", [{}, {"causal": True, "alibi": "batch"}], ids=str)
def test_accuracy_of_a_pack(options, d, dtype):
    """Sequences without queries, without keys, without either, with more queries than keys."""
    check_pack(Problem((70, 0, 3, 0, 130), (300, 64, 0, 0, 65), 4, 2, d, dtype, **options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [32, 40, 64, 96, 127, 128, 192, 256])
@pytest.mark.parametrize("dropout_p", [0.17, 0.9])
def test_accuracy_under_dropout(dropout_p, d, dtype):
    """The backward drops what the forward dropped, which S_dmask says."""
    problem = Problem((130,) * 2, (200,) * 2, 4, 2, d, dtype, causal=True, deterministic=True)
    check_dense_under_dropout(problem, dropout_p)


@pytest.mark.parametrize("d", [64, 128, 256])
def test_accuracy_over_several_segments(d):
    """1300 x 1300, causal: two segments of keys, tiles of keys and blocks of queries."""
    check_dense(Problem((1300,), (1300,), 2, 1, d, torch.bfloat16, causal=True))


# ---- Byte for byte ----

S = 1100  # crosses a segment of 1024 keys, with a ragged end
BATCH = Problem((S,) * 8, (S,) * 8, 4, 2, 64, torch.bfloat16)
SCORES = {
    "causal": {"causal": True},
    "window": {"causal": True, "window_size": (300, -1)},
    "softcap": {"causal": True, "softcap": 5.0},
    "alibi": {"causal": True, "alibi": "heads"},
    "plain": {},
}
scores = pytest.mark.parametrize("score", SCORES)
head_dims = pytest.mark.parametrize("d", [40, 64, 96, 128, 192, 256])


def inputs(d, score="causal", problem=BATCH):
    """q, k, v, dout, and a function that differentiates flash_attn_func on any part of them."""
    problem = dataclasses.replace(problem, d=d, **SCORES[score])
    options = problem.options()

    def gradients(q, k, v, dout, **changes):
        return autograd(
            lambda *x: flash_attn_func(*x, **options | changes), (q, k, v), dout.contiguous()
        )

    q, k, v = problem.dense()
    return (q, k, v, problem.upstream_gradient(q)), gradients


def entries(tensors, at):
    """The batch entries `at` of each tensor."""
    return [x[at] for x in tensors]


@head_dims
@scores
def test_run_to_run(score, d):
    """NaN lies in the memory that the kernels may get as scratch."""
    tensors, gradients = inputs(d, score)
    expected = gradients(*tensors)
    for _ in range(3):
        poison_free_memory(DEVICE)
        assert_same(gradients(*tensors), expected)


@head_dims
@scores
def test_batch_and_position(score, d):
    """8 = 4 + 4 = 1, and a batch in another order."""
    tensors, gradients = inputs(d, score)
    whole = gradients(*tensors)
    for part in (slice(0, 4), slice(4, 8), slice(0, 1), slice(5, 6)):
        alone = gradients(*entries(tensors, part))
        assert_same(alone, entries(whole, part), f"of {part}")
    order = torch.tensor([3, 7, 1, 0, 6, 2, 5, 4], device=DEVICE)
    assert_same(gradients(*entries(tensors, order)), entries(whole, order), "in another order")


@head_dims
@scores
def test_heads_may_be_sharded(score, d):
    """Each key head with its group of query heads, in a call of its own."""
    (q, k, v, dout), gradients = inputs(d, score)
    whole = gradients(q, k, v, dout)
    for head in range(2):
        queries, keys = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        part = (q[:, :, queries], k[:, :, keys], v[:, :, keys], dout[:, :, queries])
        changes = {}
        if score == "alibi":
            slopes = dataclasses.replace(BATCH, d=d, alibi="heads").options()["alibi_slopes"]
            changes["alibi_slopes"] = slopes[queries]
        expected = (whole[0][:, :, queries], whole[1][:, :, keys], whole[2][:, :, keys])
        assert_same(gradients(*part, **changes), expected, f"of key head {head}")


@head_dims
@scores
def test_dq_of_a_chunk(score, d):
    """The last rows of the queries, with all keys, have the dQ that they have in the whole."""
    (q, k, v, dout), gradients = inputs(d, score)
    whole = gradients(q, k, v, dout)[0]
    for rows in (1, 7, 16, 17, 64, 65, 128, 300, 513):
        chunk = gradients(q[:, -rows:], k, v, dout[:, -rows:])[0]
        assert_bitwise_equal(chunk, whole[:, -rows:], f"dq of the last {rows}")


@head_dims
@scores
def test_a_pack_has_the_gradients_of_its_sequences(score, d):
    """Packed beside strangers, in any order, or dense and alone; some have no rows at all."""
    seqlens_q, seqlens_k = (300, 0, 1, 130, 64), (513, 70, 600, 0, 64)
    problem = Problem(seqlens_q, seqlens_k, 4, 2, d, torch.bfloat16, **SCORES[score])
    (q, k, v), options = problem.packed(), problem.options()
    dout = problem.upstream_gradient(q)
    cu_q, cu_k = problem.cu_seqlens()
    packed = autograd(
        lambda *x: flash_attn_varlen_func(*x, cu_q, cu_k, 300, 600, **options), (q, k, v), dout
    )
    parts = zip(
        *(x.split(seqlens_q) for x in (q, dout, packed[0])),
        *(x.split(seqlens_k) for x in (k, v, *packed[1:])),
        strict=True,
    )
    for n, (q_n, dout_n, dq, k_n, v_n, dk, dv) in enumerate(parts):
        alone = autograd(
            lambda *x: flash_attn_func(*x, **options),
            [x[None] for x in (q_n, k_n, v_n)],
            dout_n[None],
        )
        assert_same([x[0] for x in alone], (dq, dk, dv), f"of sequence {n}")


@pytest.mark.parametrize("d", [64, 128])
def test_rows_behind_a_pack_have_no_gradient(d):
    """Tokens that no sequence covers get zeros, whatever they and their dout hold."""
    lengths = (130, 70)
    q, k, v = (torch.randn(260, h, d, device=DEVICE).bfloat16() for h in (4, 2, 2))
    dout = torch.randn_like(q)
    for x in (q, k, v, dout):
        x[200:] = torch.nan
    cu = cumulative_lengths(lengths, DEVICE)
    gradients = autograd(
        lambda *x: flash_attn_varlen_func(*x, cu, cu, 130, 130, causal=True), (q, k, v), dout
    )
    for gradient in gradients:
        assert torch.count_nonzero(gradient[200:]) == 0 and gradient.isfinite().all()


@pytest.mark.slow
def test_a_pack_may_be_far_smaller_than_its_longest_sequence_says():
    """b * max_seqlen_q is 2^35 + 2^19: with sixteen queries a thread block, more blocks than a line
    of a grid holds.
    """
    b = 2**16 + 1
    q, k, v = (torch.randn(n * b, 1, 16, device=DEVICE).bfloat16() for n in (1, 3, 3))
    dout = torch.randn_like(q)
    cu_q = torch.arange(b + 1, device=DEVICE, dtype=torch.int32)

    def gradients(longest):
        return autograd(
            lambda *x: flash_attn_varlen_func(*x, cu_q, 3 * cu_q, longest, 3), (q, k, v), dout
        )

    assert_same(gradients(2**19), gradients(1))


@pytest.mark.parametrize("d", [64, 128, 256])
def test_dropout_repeats(d):
    """The same seed gives the same gradients; another one, the control, gives others."""
    (q, k, v, dout), gradients = inputs(d)

    def under(seed):
        torch.manual_seed(seed)
        return gradients(q, k, v, dout, dropout_p=0.2)

    expected = under(1)
    assert_same(under(1), expected)
    assert not any(map(bitwise_equal, under(2), expected))


@pytest.mark.parametrize("d", [64, 128])
def test_control_another_order_of_the_keys_differs(d):
    """The same sums in another order, which is what an atomic addition comes to: other bytes."""
    (q, k, v, dout), gradients = inputs(d, "plain")
    expected = gradients(q, k, v, dout)[0]
    reordered = gradients(q, k.flip(1), v.flip(1), dout)[0]
    torch.testing.assert_close(reordered, expected, atol=0.02, rtol=0.02)
    assert not torch.equal(reordered, expected)
