"""Backward accuracy: dq, dk, dv err at most twice as much as plain PyTorch's autograd does.

The truth is autograd through the float64 reference, the yardstick autograd through the same formula
in the tensors' own dtype.
"""

import pytest
import torch
from device import DEVICE, DTYPES, FINEST, SEGMENT
from gradient_calls import check_dense, check_pack
from hypothesis import given
from strategies import (
    RICH_DENSE,
    RICH_PACKS,
    Problem,
    autograd,
    dense_problems,
    varlen_problems,
    with_examples,
)

from flash_attn import flash_attn_func, flash_attn_varlen_func

BUDGET = 1 << 22


@with_examples(RICH_DENSE)
@given(dense_problems(BUDGET))
def test_dense(problem: Problem):
    """flash_attn_func over random shapes and options."""
    check_dense(problem)


@with_examples(RICH_PACKS)
@given(varlen_problems(BUDGET))
def test_varlen(problem: Problem):
    """flash_attn_varlen_func over ragged packs, empty sequences included."""
    check_pack(problem)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_dim(dtype):
    """All of 1..256 over two ragged blocks, with grouped heads."""
    for d in range(1, 257):
        check_dense(
            Problem((5,), (67,), h_q=2, h_kv=1, d=d, dtype=dtype, causal=True, seed=d), f"d={d}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_several_segments(dtype, group):
    """As many queries as keys, causal: the forward pass crosses two segment boundaries."""
    s = 2 * SEGMENT + 76
    check_dense(
        Problem((s,), (s,), h_q=group, h_kv=1, d=40, dtype=dtype, causal=True), f"{s} x {s}"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_see_nothing(dtype):
    """70 queries over 30 keys, causal: the first 40 rows are blind; dq is exactly zero there."""
    problem = Problem((70,), (30,), h_q=2, h_kv=2, d=16, dtype=dtype, causal=True)
    tensors, dout = problem.dense(), problem.upstream_gradient(problem.dense()[0])
    dq, dk, dv = autograd(lambda *x: flash_attn_func(*x, causal=True), tensors, dout)
    assert torch.count_nonzero(dq[:, :40]) == 0 and torch.count_nonzero(dq[:, 40:]) > 0
    dout[:, :40] = 1000.0  # the gradient of a row that sees nothing reaches no key
    again = autograd(lambda *x: flash_attn_func(*x, causal=True), tensors, dout)
    assert torch.equal(dk, again[1]) and torch.equal(dv, again[2])
    check_dense(problem)


@pytest.mark.parametrize("strided", ["dense", "varlen"])
def test_gradient_of_a_transposed_output(strided):
    """dout may have any outer strides, a broadcast (stride 0) included."""
    problem = Problem((33, 33), (65, 65), h_q=4, h_kv=2, d=24, dtype=FINEST)
    if strided == "dense":
        tensors, function = problem.dense(), flash_attn_func
    else:
        tensors = problem.packed()
        cu_q, cu_k = problem.cu_seqlens()

        def function(q, k, v):
            return flash_attn_varlen_func(q, k, v, cu_q, cu_k, 33, 65)

    dout = problem.upstream_gradient(tensors[0])
    expected = autograd(function, tensors, dout)
    swapped = dout.transpose(-3, -2).contiguous().transpose(-3, -2)
    assert not swapped.is_contiguous()
    for actual, wanted in zip(autograd(function, tensors, swapped), expected, strict=True):
        assert torch.equal(actual, wanted)
    ones = torch.ones((), dtype=FINEST, device=DEVICE).expand_as(dout)
    dense_ones = autograd(function, tensors, ones.contiguous())
    for actual, wanted in zip(autograd(function, tensors, ones), dense_ones, strict=True):
        assert torch.equal(actual, wanted)
