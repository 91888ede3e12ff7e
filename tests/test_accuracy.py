"""Forward accuracy: at most twice the error of plain PyTorch in the same dtype, against float64.

Both modes take part; so do blind rows, empty sequences, odd head dims and strided tensors.
"""

import random

import pytest
import torch
from device import DEVICE, DTYPES, page_size
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    BLOCK,
    RICH_DENSE,
    RICH_PACKS,
    SEGMENT,
    Problem,
    assert_forward_accurate,
    dense_problems,
    varlen_problems,
    with_examples,
)

from flash_attn import determinism, flash_attn_func, flash_attn_varlen_func
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward
from flash_attn.reference import assert_accurate, attention, attention_varlen
from flash_attn.testing import page_table, paged_rows


@with_examples(RICH_DENSE)
@given(dense_problems())
def test_dense(problem: Problem):
    """flash_attn_func over random shapes and options."""
    q, k, v = problem.dense()
    with determinism.deterministic(problem.deterministic):
        out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **problem.options())
    assert_forward_accurate((out, lse), attention, (q, k, v), problem.options(), problem.dtype)


@with_examples(RICH_PACKS)
@given(varlen_problems())
def test_varlen(problem: Problem):
    """flash_attn_varlen_func over ragged packs, sequences without queries or keys included."""
    q, k, v = problem.packed()
    cu_q, cu_k = problem.cu_seqlens()
    with determinism.deterministic(problem.deterministic):
        out, lse, _ = flash_attn_varlen_func(
            q,
            k,
            v,
            cu_q,
            cu_k,
            max(problem.seqlens_q),
            max(problem.seqlens_k),
            return_attn_probs=True,
            **problem.options(),
        )
    assert_forward_accurate(
        (out, lse), attention_varlen, (q, k, v, cu_q, cu_k), problem.options(), problem.dtype
    )


PAGES = st.one_of(st.integers(1, 9), st.sampled_from([16, 100, 256])).map(page_size)


@with_examples(RICH_PACKS, page_size(7))
@given(varlen_problems(), PAGES)
def test_varlen_paged(problem: Problem, page: int):
    """The same over pages of any size, shuffled, with NaN in every row that is not in use."""
    q, k, v = problem.packed()
    cu_q, cu_k = problem.cu_seqlens()
    table, num_pages = page_table(problem.seqlens_k, page, seed=problem.seed, device=DEVICE)
    k_pages, v_pages = (
        paged_rows(x.split(problem.seqlens_k), table, num_pages, page) for x in (k, v)
    )
    with determinism.deterministic(problem.deterministic):
        out, lse, _ = flash_attn_varlen_func(
            q,
            k_pages,
            v_pages,
            cu_q,
            cu_k,
            max(problem.seqlens_q),
            max(problem.seqlens_k),
            return_attn_probs=True,
            block_table=table,
            **problem.options(),
        )
    assert_forward_accurate(
        (out, lse), attention_varlen, (q, k, v, cu_q, cu_k), problem.options(), problem.dtype
    )


@with_examples(RICH_PACKS, True)
@given(varlen_problems(), st.booleans())
def test_seqused_k_and_leftpad_k(problem: Problem, padded: bool):
    """The low-level op: each sequence uses keys [leftpad_k, seqused_k) of its part of the pack."""
    draw = random.Random(problem.seed)
    used = [draw.choice([length, draw.randint(0, length)]) for length in problem.seqlens_k]
    pads = [draw.randint(0, min(u, 70)) if padded else 0 for u in used]
    q, k, v = (
        torch.nn.functional.pad(x, (0, -x.shape[-1] % 8)).contiguous() for x in problem.packed()
    )  # this op wants d % 8 == 0
    cu_q, cu_k = problem.cu_seqlens()
    for b, (use, pad) in enumerate(zip(used, pads, strict=True)):
        for x in (k, v):
            x[int(cu_k[b]) : int(cu_k[b]) + pad] = torch.nan
            x[int(cu_k[b]) + use : int(cu_k[b + 1])] = torch.nan
    options = problem.options() | {"softmax_scale": problem.softmax_scale or problem.d**-0.5}
    left, right = options["window_size"]
    extra = {
        "seqused_k": torch.tensor(used, dtype=torch.int32, device=DEVICE),
        "leftpad_k": None,
    }
    if padded:
        extra["leftpad_k"] = torch.tensor(pads, dtype=torch.int32, device=DEVICE)
    with determinism.deterministic(problem.deterministic):
        out, lse, _, _ = _flash_attn_varlen_forward(
            q,
            k,
            v,
            cu_q,
            cu_k,
            max(problem.seqlens_q),
            max(problem.seqlens_k),
            0.0,
            options["softmax_scale"],
            options["causal"],
            window_size_left=left,
            window_size_right=right,
            softcap=options["softcap"],
            alibi_slopes=options["alibi_slopes"],
            **extra,
        )
    assert_forward_accurate(
        (out, lse), attention_varlen, (q, k, v, cu_q, cu_k), options | extra, problem.dtype
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_head_dim(dtype):
    """All of 1..256, in turn with and without whole vectors of lanes; 67 keys are two blocks."""
    for d in range(1, 257):
        problem = Problem((3, 3), (67, 67), h_q=2, h_kv=1, d=d, dtype=dtype, causal=True, seed=d)
        q, k, v = problem.dense()
        out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        assert_forward_accurate(
            (out, lse), attention, (q, k, v), problem.options(), dtype, label=f"d={d}"
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("s_q", [1, 40])
def test_long_context(dtype, s_q):
    """Across the rungs of the segment ladder: 16384 + 1024 + 5 keys, with a key that dominates.

    The dominating key sits in the last, short segment: every earlier partial is scaled down.
    """
    problem = Problem((s_q,), (16384 + 1024 + 5,), h_q=2, h_kv=1, d=32, dtype=dtype)
    q, k, v = problem.dense()
    k[:, -2] = q[:, -1:, 0] * 2.0
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert_forward_accurate((out, lse), attention, (q, k, v), {"causal": True}, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("magnitude", [2.0**-20, 2.0**-8, 2.0**4, 2.0**7])
def test_magnitudes(dtype, magnitude):
    """Tiny scores give the mean of v, huge ones pick a single key; nothing over- or underflows."""
    problem = Problem((9,), (SEGMENT + BLOCK + 1,), h_q=2, h_kv=2, d=64, dtype=dtype)
    q, k, v = problem.dense()
    q, k = q * magnitude, k * magnitude
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    assert_forward_accurate((out, lse), attention, (q, k, v), {}, dtype)


def test_the_criterion_can_fail():
    """Control: an error of three yardsticks, a wrong infinity and a NaN are each refused."""
    truth = torch.linspace(1.0, 2.0, 50, dtype=torch.float64)
    plain = truth + 1e-3
    assert_accurate((truth + 1.9e-3).float(), truth, plain)
    with pytest.raises(AssertionError, match="error 3"):
        assert_accurate((truth + 3e-3).float(), truth, plain)
    for poison in (float("inf"), float("nan")):
        broken = truth.float().clone()
        broken[7] = poison
        with pytest.raises(AssertionError, match=r"at \(7,\)"):
            assert_accurate(broken, truth, plain)
    truth[3] = float("inf")
    with pytest.raises(AssertionError, match=r"at \(3,\)"):
        assert_accurate(torch.full((50,), 1.5), truth, plain)
