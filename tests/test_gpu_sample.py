"""2,000 random problems on a GPU, from fixed seeds: forward and gradients against float64.

The other files draw 50 problems a test. A sample this large needs small problems: lengths still
cluster around the ends of blocks and segments, and every feature is switched on and off.
"""

import hypothesis
import pytest
from gradient_calls import check_dense, check_pack
from hypothesis import given
from hypothesis import strategies as st
from strategies import Problem, assert_forward_accurate, dense_problems, varlen_problems

from flash_attn import determinism, flash_attn_func, flash_attn_varlen_func
from flash_attn.reference import attention, attention_varlen

pytestmark = pytest.mark.gpu_sample

BUDGET = 1 << 20  # multiply-adds of q.k
SEEDS, PROBLEMS_A_SEED = 20, 100  # as many tests, for as many processes as there are


def check_forward_of_a_batch(problem: Problem):
    tensors, options = problem.dense(), problem.options()
    with determinism.deterministic(problem.deterministic):
        out, lse, _ = flash_attn_func(*tensors, return_attn_probs=True, **options)
    assert_forward_accurate((out, lse), attention, tensors, options, problem.dtype)


def check_forward_of_a_pack(problem: Problem):
    arguments, options = (*problem.packed(), *problem.cu_seqlens()), problem.options()
    longest = max(problem.seqlens_q), max(problem.seqlens_k)
    with determinism.deterministic(problem.deterministic):
        out, lse, _ = flash_attn_varlen_func(
            *arguments, *longest, return_attn_probs=True, **options
        )
    assert_forward_accurate((out, lse), attention_varlen, arguments, options, problem.dtype)


@pytest.mark.parametrize("seed", range(SEEDS))
def test_sample(seed):
    """Each problem is tried forward and backward; every second one is a pack."""
    batches, packs = dense_problems(BUDGET), varlen_problems(BUDGET)

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=PROBLEMS_A_SEED, derandomize=False, database=None)
    @given(st.one_of(st.tuples(st.just("batch"), batches), st.tuples(st.just("pack"), packs)))
    def sample(drawn):
        kind, problem = drawn
        if kind == "batch":
            check_forward_of_a_batch(problem)
            check_dense(problem)
        else:
            check_forward_of_a_pack(problem)
            check_pack(problem)

    sample()
