"""Dropout: the mask's statistics, what S_dmask says about it, and results under that very mask.

The generator is counter-based: an entry of the mask is a function of (seed, offset, batch index,
head, query position, key position), so neither schedule nor shape nor mode can move it.
"""

import math

import pytest
import torch
from device import DEVICE, DTYPES, FINEST, ON_GPU
from gradient_calls import check_dense_under_dropout
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    RICH_DENSE,
    RICH_PACKS,
    SCORE_NOISE,
    Problem,
    assert_forward_accurate,
    assert_gradients_accurate,
    dense_problems,
    varlen_problems,
    with_examples,
    without_softcap,
)

from flash_attn import determinism, flash_attn_func, flash_attn_varlen_func
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _get_block_size_n,
)
from flash_attn.reference import attention, attention_varlen, visible_keys
from flash_attn.testing import assert_bitwise_equal, cumulative_lengths, random_normal

SMALL_BUDGET = 1 << 21  # autograd through the reference keeps several fp64 copies of the scores
PROBABILITIES = st.sampled_from([0.1, 0.17, 0.5, 0.9])


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=FINEST, device=DEVICE)


def mask_of(b=1, s_q=64, s_k=64, h=1, dropout_p=0.5, seed=0, **options):
    """The keep mask, bool (b, h, s_q, s_k); with q = 0 every |S| is 1, so that no sign is lost."""
    torch.manual_seed(seed)
    q, kv = zeros(b, s_q, h, 8), zeros(b, s_k, h, 8)
    s_dmask = flash_attn_func(q, kv, kv, dropout_p, return_attn_probs=True, **options)[2]
    assert set(s_dmask[:, :, :s_q, :s_k].abs().unique().tolist()) <= {0.0, 1.0}
    return s_dmask[:, :, :s_q, :s_k] > 0


def assert_uncorrelated(left, right, dropout_p):
    """Two masks that should be independent: their correlation lies within five sigma of zero."""
    variance = dropout_p * (1 - dropout_p)
    products = (left.double() - (1 - dropout_p)) * (right.double() - (1 - dropout_p))
    assert abs(products.mean().item()) / variance < 5 / math.sqrt(products.numel())


# ---- The mask's statistics ----


@pytest.mark.parametrize("dropout_p", [0.01, 0.17, 0.5, 0.9])
def test_keep_fraction(dropout_p):
    """The fraction kept is 1 - p within five sigma, in all and in each row, column and head."""
    keep = mask_of(b=2, s_q=257, s_k=300, h=3, dropout_p=dropout_p).double()
    sigma = math.sqrt(dropout_p * (1 - dropout_p))
    for dims in [(0, 1, 2, 3), (2, 3), (3,), (2,), (0, 1, 3), (0, 1, 2)]:
        fraction = keep.mean(dim=dims)
        count = keep.numel() / fraction.numel()
        bound = (5 if fraction.numel() < 1000 else 6) * sigma / math.sqrt(count)
        # The count is binomial: for few entries and a small p its tail is longer than a Gaussian's.
        bound += 2 / count
        assert (fraction - (1 - dropout_p)).abs().max().item() < bound, dims


@pytest.mark.parametrize("dropout_p", [0.17, 0.5])
def test_counts_spread_as_a_binomial(dropout_p):
    """Row sums vary as independent draws do: neither clumped nor evened out."""
    keep = mask_of(b=2, s_q=500, s_k=256, h=2, dropout_p=dropout_p).double()
    for sums, count in ((keep.sum(-1), 256), (keep.sum(-2), 500)):
        ratio = sums.flatten().var().item() / (count * dropout_p * (1 - dropout_p))
        assert abs(ratio - 1) < 5 * math.sqrt(2 / sums.numel())


def test_neighbours_are_independent():
    """Rows, columns, heads, batch entries and seeds do not echo each other at any near shift."""
    p = 0.3
    keep = mask_of(b=2, s_q=300, s_k=300, h=3, dropout_p=p)
    for shift in (1, 2, 3, 4, 8, 16, 32, 64, 128):
        assert_uncorrelated(keep[:, :, shift:], keep[:, :, :-shift], p)
        assert_uncorrelated(keep[..., shift:], keep[..., :-shift], p)
        assert_uncorrelated(keep[:, :, shift:, shift:], keep[:, :, :-shift, :-shift], p)
    assert_uncorrelated(keep[:, 0], keep[:, 1], p)
    assert_uncorrelated(keep[:, 0], keep[:, 2], p)
    assert_uncorrelated(keep[0], keep[1], p)
    assert_uncorrelated(keep[0, 1], keep[1, 0], p)
    assert_uncorrelated(keep[0, 0], keep[0, 0].T, p)
    assert_uncorrelated(keep, mask_of(2, 300, 300, 3, p, seed=1), p)


def test_consecutive_calls_are_independent():
    """A second call takes new numbers from the generator."""
    q = zeros(1, 300, 1, 8)
    torch.manual_seed(0)
    first, second = (flash_attn_func(q, q, q, 0.3, return_attn_probs=True)[2] > 0 for _ in "12")
    assert not torch.equal(first, second)
    assert_uncorrelated(first[..., :300, :300], second[..., :300, :300], 0.3)


# ---- What the mask depends on ----


def test_same_seed_same_bytes():
    """manual_seed decides: the same seed repeats out, lse and S_dmask, another one does not."""
    q, k, v = Problem((70,), (600,), 4, 2, 32, torch.float16).dense()

    def run(seed):
        torch.manual_seed(seed)
        return flash_attn_func(q, k, v, 0.2, return_attn_probs=True)

    for name, first, second in zip(("out", "lse", "S_dmask"), run(7), run(7), strict=True):
        assert_bitwise_equal(first, second, name)
    other = run(8)
    assert not torch.equal(run(7)[0], other[0])
    assert_bitwise_equal(run(7)[1], other[1], "lse does not depend on the mask")


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (100, 20)}], ids=str)
def test_mask_depends_on_positions_only(options):
    """Under one seed, the mask of a short problem is the corner of a longer one's mask."""
    small = mask_of(b=1, s_q=100, s_k=130, h=2)
    large = mask_of(b=3, s_q=333, s_k=700, h=2)
    assert torch.equal(small[0], large[0, :, :100, :130])
    masked = mask_of(b=3, s_q=333, s_k=700, h=2, **options)
    window = options.get("window_size", (-1, -1))
    seen = visible_keys(333, 700, options.get("causal", False), window, DEVICE)
    assert torch.equal(masked & seen, large & seen)


def test_varlen_has_the_mask_of_dense():
    """Positions count from the sequence's own start, so a pack draws what a dense batch draws."""
    lengths = (90, 17, 200)
    q = zeros(sum(lengths), 2, 8)
    torch.manual_seed(3)
    cu = cumulative_lengths(lengths, DEVICE)
    packed = flash_attn_varlen_func(q, q, q, cu, cu, 200, 200, 0.5, return_attn_probs=True)[2]
    dense = mask_of(b=3, s_q=200, s_k=200, h=2, seed=3)
    for b, length in enumerate(lengths):
        corner = (b, slice(None), slice(length), slice(length))
        assert torch.equal(packed[corner] > 0, dense[corner])


@pytest.mark.cpu_only
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_threads_and_mode_do_not_move_the_mask(threads):
    """S_dmask has the same bytes for any number of threads and in both modes."""
    q, k, v = Problem((70, 70), (1100, 1100), 4, 2, 16, torch.float32).dense()
    before = torch.get_num_threads()
    results = []
    try:
        for count, deterministic in [(1, False), (1, True), (threads, False), (threads, True)]:
            torch.set_num_threads(count)
            torch.manual_seed(0)
            with determinism.deterministic(deterministic):
                results.append(flash_attn_func(q, k, v, 0.2, causal=True, return_attn_probs=True))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result[2] >= 0, results[0][2] >= 0)
    for name, single, many in zip(("out", "lse", "S_dmask"), results[1], results[3], strict=True):
        assert_bitwise_equal(single, many, f"{name}, deterministic mode")


def test_generator_is_only_used_with_dropout():
    """dropout_p = 0 draws nothing; with dropout every call advances the generator equally."""
    q, k, v = Problem((5,), (70,), 2, 2, 16, FINEST).dense()
    generator_state = torch.cuda.get_rng_state if ON_GPU else torch.get_rng_state
    torch.manual_seed(0)
    before = generator_state()
    flash_attn_func(q, k, v)
    assert torch.equal(generator_state(), before)
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        states = [
            _flash_attn_forward(q, k, v, 0.1, 1.0, False, -1, -1, 0.0, None, False)[3]
            for _ in range(3)
        ]
        draws.append(torch.stack(states))
    assert torch.equal(*draws), "the same seed gives the same sequence of (seed, offset)"
    assert len({tuple(state.tolist()) for state in draws[0]}) == 3, "each call has its own"


# ---- What S_dmask says ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (40, 9)}], ids=str)
def test_s_dmask_renormalises_to_the_softmax(dtype, options):
    """|S| is exp(score - row maximum) in q's dtype: divided by its sum it is the softmax."""
    problem = Problem((150, 150), (200, 200), 4, 2, 32, dtype, **options)
    q, k, v = problem.dense()
    torch.manual_seed(0)
    s_dmask = flash_attn_func(q, k, v, 0.17, return_attn_probs=True, **options)[2]
    assert s_dmask.shape == (2, 4, 256, 256) and s_dmask.dtype == dtype
    assert _get_block_size_n(q.device, 32, True, problem.causal) >= 200  # one block: one maximum
    seen = visible_keys(150, 200, problem.causal, problem.window_size, DEVICE)
    weights = s_dmask[:, :, :150, :200].double().abs().masked_fill(~seen, 0.0)
    assert torch.equal(weights.amax(-1), seen.any(-1).double().expand(2, 4, 150))
    # Attending to the unit vectors reads the softmax itself out of the reference.
    unit = torch.eye(200, device=DEVICE)[None, :, None].expand(2, 200, 2, 200)
    truth, _ = attention(q, k, unit, softmax_scale=32**-0.5, **options)
    softmax = weights / weights.sum(-1, keepdim=True).clamp_min(1.0)
    error = (softmax.transpose(1, 2) - truth).abs().max().item()
    assert error < 2 * torch.finfo(dtype).eps + SCORE_NOISE  # scores are of the order of one


def test_s_dmask_is_empty_without_dropout():
    """No dropout, no mask: a tensor of shape (0,) in q's dtype."""
    q, k, v = Problem((5,), (70,), 2, 2, 16, torch.bfloat16).dense()
    s_dmask = flash_attn_func(q, k, v, return_attn_probs=True)[2]
    assert s_dmask.shape == (0,) and s_dmask.dtype == torch.bfloat16


# ---- Results under the mask ----


@with_examples(without_softcap(RICH_DENSE), 0.2)
@given(dense_problems(SMALL_BUDGET, softcap=False), PROBABILITIES)
def test_dense_under_its_mask(problem: Problem, dropout_p: float):
    """out, lse, dq, dk and dv agree with the float64 reference that is given the same mask."""
    results, tensors, dropped = check_dense_under_dropout(problem, dropout_p)
    assert_forward_accurate(results, attention, tensors, dropped, problem.dtype)


@with_examples(without_softcap(RICH_PACKS), 0.2)
@given(varlen_problems(SMALL_BUDGET, softcap=False), PROBABILITIES)
def test_varlen_under_its_mask(problem: Problem, dropout_p: float):
    """The same for packs; S_dmask is (b, h_q, round_up(max_q, 128), round_up(max_k, 128))."""
    tensors, options = problem.packed(), problem.options()
    cu_q, cu_k = problem.cu_seqlens()
    leaves = [x.detach().requires_grad_() for x in tensors]
    extents = (max(problem.seqlens_q), max(problem.seqlens_k))
    torch.manual_seed(problem.seed)
    with determinism.deterministic(problem.deterministic):
        out, lse, s_dmask = flash_attn_varlen_func(
            *leaves, cu_q, cu_k, *extents, dropout_p, return_attn_probs=True, **options
        )
    padded = tuple(-(-extent // 128) * 128 for extent in extents)
    if min(padded) > 0:
        assert s_dmask.shape == (problem.batch, problem.h_q, *padded)
        options |= {"dropout_p": dropout_p, "keep": s_dmask >= 0}
    assert_forward_accurate(
        (out, lse), attention_varlen, (*tensors, cu_q, cu_k), options, problem.dtype
    )
    dout = problem.upstream_gradient(out)
    assert_gradients_accurate(
        torch.autograd.grad(out, leaves, dout),
        lambda *x, dtype: attention_varlen(*x, cu_q, cu_k, dtype=dtype, **options),
        problem,
        tensors,
        dout,
    )


def test_kept_weights_are_scaled():
    """One key: a row is v / (1 - p) where it is kept and exactly zero where it is dropped."""
    v = random_normal((1, 1, 2, 16), seed=0, dtype=FINEST, device=DEVICE)
    q = zeros(1, 400, 2, 16)
    torch.manual_seed(0)
    out, lse, s_dmask = flash_attn_func(q, v, v, 0.25, return_attn_probs=True)
    keep = (s_dmask[:, :, :400, :1] > 0).transpose(1, 2)  # (1, 400, 2, 1)
    torch.testing.assert_close(out, torch.where(keep, v / 0.75, 0.0))
    assert torch.count_nonzero(lse) == 0, "dropout does not enter lse"
    assert 0 < int(keep.sum()) < keep.numel()


def test_backward_replays_the_forward_mask():
    """Whatever was drawn in between, and however late, backward drops what its forward dropped."""
    q, k, v = (x.requires_grad_() for x in Problem((70,), (130,), 2, 1, 16, FINEST).dense())
    dout = random_normal(q.shape, seed=5, dtype=FINEST, device=DEVICE)
    torch.manual_seed(0)
    prompt = torch.autograd.grad(flash_attn_func(q, k, v, 0.3), (q, k, v), dout)
    torch.manual_seed(0)
    out = flash_attn_func(q, k, v, 0.3)
    flash_attn_func(q, k, v, 0.3)
    torch.manual_seed(99)
    for name, late, expected in zip(
        ("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), dout), prompt, strict=True
    ):
        assert_bitwise_equal(late, expected, name)


def test_low_level_backward_takes_rng_state():
    """Another rng_state gives other gradients; without dropout it may be None."""
    q, k, v = Problem((70,), (130,), 2, 2, 16, FINEST).dense()
    dout = random_normal(q.shape, seed=5, dtype=FINEST, device=DEVICE)

    def backward(out, lse, dropout_p, rng_state):
        grads = [torch.empty_like(x) for x in (q, k, v)]
        options = (dropout_p, 0.25, False, -1, -1, 0.0, None, False)
        _flash_attn_backward(dout, q, k, v, out, lse, *grads, *options, rng_state=rng_state)
        return grads

    torch.manual_seed(0)
    out, lse, _, state = _flash_attn_forward(q, k, v, 0.3, 0.25, False, -1, -1, 0.0, None, False)
    first, again = backward(out, lse, 0.3, state), backward(out, lse, 0.3, state.clone())
    assert_bitwise_equal(first[0], again[0], "dq")
    other_state = _flash_attn_forward(q, k, v, 0.3, 0.25, False, -1, -1, 0.0, None, False)[3]
    assert not torch.equal(first[0], backward(out, lse, 0.3, other_state)[0])
    out, lse, _, _ = _flash_attn_forward(q, k, v, 0.0, 0.25, False, -1, -1, 0.0, None, False)
    assert backward(out, lse, 0.0, None)[0].isfinite().all()


@pytest.mark.parametrize("dropout_p", [0.1, 0.9, 0.99])
def test_the_scale_of_kept_weights_is_rounded_once(dropout_p):
    """A kept weight of one is 1 / (1 - p) to the last bit."""
    q, v = zeros(1, 400, 1, 8), zeros(1, 1, 1, 8) + 1
    kept = flash_attn_func(q, v, v, dropout_p).max().cpu()
    assert kept == torch.tensor(1.0 / (1.0 - dropout_p), dtype=FINEST)
