"""What flash_attn 2.8 does, fact by fact: shapes, masks, strides, empty extents.

Accuracy has its own files. Here every fact is checked where it can be read off exactly: with q = 0
all visible keys weigh the same, and with unit vectors for values an output row lists the keys that
it saw.
"""

import itertools
import math

import pytest
import torch
from device import DEVICE, FINEST, WIDEST
from strategies import Problem

from flash_attn import (
    flash_attn_func,
    flash_attn_interface,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.reference import visible_keys
from flash_attn.testing import assert_bitwise_equal, cumulative_lengths, random_normal

ON_DEVICE = {"dtype": FINEST, "device": DEVICE}


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, **ON_DEVICE)


def cu_seqlens(*lengths) -> tuple[torch.Tensor, ...]:
    """The offsets of one pack for each argument."""
    return tuple(cumulative_lengths(x, DEVICE) for x in lengths)


def seen_keys(function, s_q, s_k, **options):
    """bool (s_q, s_k): which keys each row of one sequence attends to, read from the output."""
    q, k = zeros(1, s_q, 1, max(8, s_k)), zeros(1, s_k, 1, max(8, s_k))
    v = torch.eye(max(8, s_k), **ON_DEVICE)[:s_k].reshape(1, s_k, 1, -1)
    out, lse, _ = function(q, k, v, return_attn_probs=True, **options)
    seen = (out[0, :, 0, :s_k] > 0).cpu()
    count = seen.sum(-1)
    torch.testing.assert_close(lse[0, 0].cpu(), torch.where(count > 0, count.log(), math.inf))
    return seen


def as_varlen(q, k, v, **options):
    """The same call through flash_attn_varlen_func, with room to spare in max_seqlen_*."""
    cu_q, cu_k = cu_seqlens([q.shape[1]], [k.shape[1]])
    extents = (cu_q, cu_k, q.shape[1] + 5, k.shape[1] + 9)
    out, lse, s_dmask = flash_attn_varlen_func(q[0], k[0], v[0], *extents, **options)
    return out[None], lse[None], s_dmask


def as_kvcache(q, k, v, return_attn_probs, **options):
    """The same call through flash_attn_with_kvcache, on a cache with NaN beyond the sequence."""
    cache = [torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 7), value=math.nan) for x in (k, v)]
    length = torch.tensor([k.shape[1]], dtype=torch.int32, device=DEVICE)
    options |= {"cache_seqlens": length, "return_softmax_lse": True}
    return *flash_attn_with_kvcache(q, *cache, **options), None


# ---- Masks (2.1 to 2.3) ----

FUNCTIONS = pytest.mark.parametrize(
    "function", [flash_attn_func, as_varlen, as_kvcache], ids=["dense", "varlen", "kvcache"]
)


@FUNCTIONS
@pytest.mark.parametrize("s_q,s_k", [(5, 5), (3, 70), (70, 3), (1, 66), (66, 1)])
def test_causal_is_bottom_right(function, s_q, s_k):
    """The last query stands beside the last key; rows above the first key see nothing."""
    expected = torch.ones(s_q, s_k).tril(s_k - s_q).bool()
    assert torch.equal(seen_keys(function, s_q, s_k, causal=True), expected)


@FUNCTIONS
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("s_q,s_k", [(6, 6), (4, 9), (9, 7)])
def test_window(function, s_q, s_k, causal):
    """left and right keys around the diagonal; causal closes the right side, keeps the left."""
    for window in itertools.product((-1, 0, 1, 3), repeat=2):
        seen = seen_keys(function, s_q, s_k, causal=causal, window_size=window)
        assert torch.equal(seen, visible_keys(s_q, s_k, causal, window)), window


@FUNCTIONS
def test_window_beyond_the_keys_is_no_window(function):
    """A side of s_k or more, and any negative one, hides nothing."""
    for side in (-1, -7, 30, 1000):
        window = (side, side)
        assert seen_keys(function, 12, 12, window_size=window).all()
        causal = seen_keys(function, 12, 12, window_size=window, causal=True)
        assert torch.equal(causal, visible_keys(12, 12, causal=True))


def test_window_types():
    """A list and a CPU tensor of two do as well as a tuple."""
    expected = visible_keys(9, 9, window_size=(2, 1))
    for window in ((2, 1), [2, 1], torch.tensor([2, 1])):
        assert torch.equal(seen_keys(flash_attn_func, 9, 9, window_size=window), expected)


def test_lengths_are_each_sequences_own():
    """In a pack, every diagonal ends at its own sequence's last key, not at max_seqlen_k."""
    seqlens_q, seqlens_k = (4, 9, 1), (9, 4, 30)
    q, k = zeros(14, 1, 32), zeros(43, 1, 32)
    v = torch.cat([torch.eye(32, **ON_DEVICE)[:length] for length in seqlens_k])[:, None]
    cu_q, cu_k = cu_seqlens(seqlens_q, seqlens_k)
    out = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 9, 30, causal=True).cpu()
    for rows, s_q, s_k in zip(out.split(seqlens_q), seqlens_q, seqlens_k, strict=True):
        assert torch.equal(rows[:, 0, :s_k] > 0, visible_keys(s_q, s_k, causal=True))
        assert torch.count_nonzero(rows[:, 0, s_k:]) == 0


def test_single_query_is_causal_by_itself():
    """s_q = 1: the one query is the last one, so causal changes no byte; with ALiBi neither."""
    q, k, v = Problem((1,), (600,), 4, 2, 32, FINEST).dense()
    for options in ({}, {"alibi_slopes": torch.rand(4, device=DEVICE)}):
        full = flash_attn_func(q, k, v, **options)
        assert_bitwise_equal(flash_attn_func(q, k, v, causal=True, **options), full)


# ---- Heads, scale, score modifications (2.4, 2.7, 2.8, 2.12) ----


@pytest.mark.parametrize("s_q", [1, 5])
def test_grouped_heads(s_q):
    """Query head h reads key head h // (h_q / h_kv), also in decoding, where groups share rows."""
    v = torch.arange(1.0, 4.0, **ON_DEVICE).reshape(1, 1, 3, 1).expand(1, 70, 3, 8).contiguous()
    q, k = zeros(1, s_q, 6, 8), zeros(1, 70, 3, 8)
    expected = torch.tensor([1.0, 1, 2, 2, 3, 3], **ON_DEVICE).reshape(1, 1, 6, 1).expand_as(q)
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    torch.testing.assert_close(out, expected)
    assert lse.shape == (1, 6, s_q)


def test_decoding_a_pack_honours_cu_seqlens_q():
    """max_seqlen_q = 1 with grouped heads: a sequence without a query shifts nobody's rows."""
    problem = Problem((1, 0, 1, 1), (70, 5, 0, 9), 4, 2, 16, FINEST)
    q, k, v = problem.packed()
    cu_q, cu_k = problem.cu_seqlens()
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 1, 70, return_attn_probs=True)
    assert out.shape == (3, 4, 16) and lse.shape == (4, 3)
    for row, keys in enumerate((slice(0, 70), slice(75, 75), slice(75, 84))):
        alone = flash_attn_func(q[None, row : row + 1], k[None, keys], v[None, keys])
        torch.testing.assert_close(out[row], alone[0, 0])
    assert torch.count_nonzero(out[1]) == 0 and lse[:, 1].isposinf().all()


@pytest.mark.parametrize("d", [1, 5, 30, 64, 250])
def test_default_scale_is_of_the_caller_s_head_dim(d):
    """d ** -0.5 of the unpadded head dim; out and gradients come back unpadded."""
    q, k, v = (x.requires_grad_() for x in Problem((3,), (70,), 2, 1, d, FINEST).dense())
    out = flash_attn_func(q, k, v)
    assert_bitwise_equal(out, flash_attn_func(q, k, v, softmax_scale=d**-0.5))
    assert out.shape == q.shape
    grads = torch.autograd.grad(out.sum(), (q, k, v))
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


def test_softcap_bounds_the_scores():
    """Scores of 1000 times the cap end at the cap, so lse = softcap + log(s_k); 0 means no cap."""
    q, k = zeros(1, 2, 1, 16) + 100.0, zeros(1, 80, 1, 16) + 100.0
    lse = flash_attn_func(q, k, k, softcap=30.0, return_attn_probs=True)[1]
    torch.testing.assert_close(lse, torch.full_like(lse, 30.0 + math.log(80)))
    lse = flash_attn_func(q, k, k, softcap=0.0, return_attn_probs=True)[1]
    torch.testing.assert_close(lse, torch.full_like(lse, 40000.0 + math.log(80)))


@pytest.mark.parametrize("mask", [{}, {"causal": True}, {"window_size": (3, 2)}], ids=str)
def test_alibi_by_the_documented_formula(mask):
    """lse = log sum exp(-slope * |i + s_k - s_q - j|) in any mask; slopes (h,) or (b, h)."""
    q, k = zeros(2, 4, 2, 8), zeros(2, 9, 2, 8)
    slopes = torch.tensor([[0.5, 0.25], [0.125, 2.0]], device=DEVICE)
    distance = (torch.arange(4)[:, None] + 5 - torch.arange(9)).abs().to(DEVICE)
    window = mask.get("window_size", (-1, -1))
    hidden = ~visible_keys(4, 9, mask.get("causal", False), window, DEVICE)
    scores = (-slopes[:, :, None, None] * distance).masked_fill(hidden, -math.inf)
    lse = flash_attn_func(q, k, k, alibi_slopes=slopes, return_attn_probs=True, **mask)[1]
    torch.testing.assert_close(lse, scores.logsumexp(-1))
    lse = flash_attn_func(q, k, k, alibi_slopes=slopes[1], return_attn_probs=True, **mask)[1]
    torch.testing.assert_close(lse, scores[1:].logsumexp(-1).expand(2, 2, 4))


def test_slopes_get_no_gradient():
    """alibi_slopes is not differentiable, and asking for it does not break the others."""
    q, k, v = (x.requires_grad_() for x in Problem((3,), (7,), 2, 2, 16, FINEST).dense())
    slopes = torch.rand(2, device=DEVICE, requires_grad=True)
    flash_attn_func(q, k, v, alibi_slopes=slopes).sum().backward()
    assert slopes.grad is None and q.grad is not None


# ---- Nothing to see, nothing to compute (2.9 to 2.11) ----


def test_blind_rows():
    """A row without a visible key: out = 0, lse = +inf, gradients zero and finite everywhere."""
    q, k, v = (x.requires_grad_() for x in Problem((9,), (4,), 2, 2, 16, FINEST).dense())
    out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
    assert torch.count_nonzero(out[:, :5]) == 0 and lse[:, :, :5].isposinf().all()
    assert lse[:, :, 5:].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert torch.count_nonzero(dq[:, :5]) == 0
    assert all(x.isfinite().all() for x in (dq, dk, dv))


@pytest.mark.parametrize("s_q,s_k", [(3, 0), (0, 3), (0, 0)])
def test_empty_extents(s_q, s_k):
    """s_k = 0: out zero, lse +inf, dq zero. s_q = 0: dk and dv zero, not left uninitialised."""
    q, k, v = (
        x.requires_grad_() for x in Problem((s_q,) * 2, (s_k,) * 2, 4, 2, 16, torch.float16).dense()
    )
    for function in (flash_attn_func, as_packed_pair):
        out, lse, _ = function(q, k, v, return_attn_probs=True)
        assert out.shape == q.shape and torch.count_nonzero(out) == 0
        assert lse.numel() == 2 * 4 * s_q and lse.isposinf().all()
        for x, grad in zip((q, k, v), torch.autograd.grad(out.sum(), (q, k, v)), strict=True):
            assert grad.shape == x.shape and torch.count_nonzero(grad) == 0


def as_packed_pair(q, k, v, **options):
    """A dense batch of two as a pack, shapes restored."""
    cu_q, cu_k = cu_seqlens([q.shape[1]] * 2, [k.shape[1]] * 2)
    extents = (cu_q, cu_k, q.shape[1], k.shape[1])
    out, *rest = flash_attn_varlen_func(*(x.flatten(0, 1) for x in (q, k, v)), *extents, **options)
    return out.view_as(q), *rest


def test_empty_batch_is_refused():
    """b = 0 has no meaning upstream either."""
    q = zeros(0, 3, 2, 16)
    with pytest.raises(RuntimeError, match="batch size must be positive"):
        flash_attn_func(q, q, q)


def test_empty_sequences_in_a_pack():
    """No keys: zero and +inf for those rows alone. No queries: their keys get zero gradients."""
    seqlens_q, seqlens_k = (3, 2, 0, 4), (70, 0, 6, 5)
    problem = Problem(seqlens_q, seqlens_k, 2, 1, 16, FINEST)
    q, k, v = (x.requires_grad_() for x in problem.packed())
    cu_q, cu_k = cu_seqlens(seqlens_q, seqlens_k)
    out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 4, 70, return_attn_probs=True)
    assert torch.count_nonzero(out[3:5]) == 0 and lse[:, 3:5].isposinf().all()
    assert lse[:, [0, 1, 2, 5, 6, 7, 8]].isfinite().all()
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert torch.count_nonzero(dq[3:5]) == 0
    for grad in (dk, dv):
        assert torch.count_nonzero(grad[70:76]) == 0
    assert (dv[:70] != 0).all() and (dv[76:] != 0).all()


# ---- Return values and shapes ----


def test_return_values():
    """out alone by default; (out, lse, S_dmask) on request, lse in float32 and natural log."""
    q, k, v = Problem((3, 3), (70, 70), 4, 2, 16, torch.bfloat16).dense()
    out = flash_attn_func(q, k, v)
    assert isinstance(out, torch.Tensor) and out.shape == q.shape and out.dtype == q.dtype
    triple = flash_attn_func(q, k, v, return_attn_probs=True)
    assert isinstance(triple, tuple) and len(triple) == 3
    assert_bitwise_equal(triple[0], out)
    assert triple[1].shape == (2, 4, 3) and triple[1].dtype == torch.float32
    assert triple[2].shape == (0,) and triple[2].dtype == q.dtype
    cu_q, cu_k = cu_seqlens((3, 3), (70, 70))
    flat = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    lse = flash_attn_varlen_func(*flat, cu_q, cu_k, 3, 70, return_attn_probs=True)[1]
    assert lse.shape == (4, 6) and lse.dtype == torch.float32
    single = flash_attn_with_kvcache(q, k, v)
    assert isinstance(single, torch.Tensor) and single.shape == q.shape
    pair = flash_attn_with_kvcache(q, k, v, return_softmax_lse=True)
    assert isinstance(pair, tuple) and len(pair) == 2 and pair[1].shape == (2, 4, 3)


def test_packed_functions_are_the_same_call():
    """kvpacked and qkvpacked, dense and varlen: bytes and gradients of the separate tensors."""
    # 16 bits of float32's range: a gradient that underflows to -0 would lose its sign in a sum.
    on_device = {"dtype": WIDEST, "device": DEVICE}
    qkv = random_normal((2, 70, 3, 2, 20), seed=0, **on_device).requires_grad_()
    dout = random_normal((2, 70, 2, 20), seed=1, **on_device)
    options = {"causal": True, "softmax_scale": 0.3}
    (cu,) = cu_seqlens((70, 70))

    def flat(x):
        return x.flatten(0, 1)

    dense = flash_attn_func(*qkv.unbind(2), **options)
    (expected,) = torch.autograd.grad(dense, qkv, dout)
    for name, out in {
        "kv": flash_attn_kvpacked_func(qkv[:, :, 0], qkv[:, :, 1:], **options),
        "qkv": flash_attn_qkvpacked_func(qkv, **options),
        "varlen": flash_attn_varlen_func(*flat(qkv).unbind(1), cu, cu, 70, 70, **options),
        "varlen kv": flash_attn_varlen_kvpacked_func(
            flat(qkv)[:, 0], flat(qkv)[:, 1:], cu, cu, 70, 70, **options
        ),
        "varlen qkv": flash_attn_varlen_qkvpacked_func(flat(qkv), cu, 70, **options),
    }.items():
        out = out.view_as(dense)
        assert_bitwise_equal(out, dense, name)
        assert_bitwise_equal(torch.autograd.grad(out, qkv, dout)[0], expected, f"gradient, {name}")


def test_low_level_results():
    """Forward: (out, lse, S_dmask, rng_state). Backward: softmax_d alone, gradients in place."""
    q, k, v = Problem((130, 130), (70, 70), 4, 2, 16, FINEST).dense()
    score = (0.0, 0.25, False, -1, -1, 0.0, None)
    out, lse, s_dmask, rng_state = flash_attn_interface._flash_attn_forward(q, k, v, *score, False)
    assert lse.shape == (2, 4, 130) and s_dmask.shape == (0,)
    assert rng_state.shape == (2,) and rng_state.dtype == torch.int64
    grads = [torch.full_like(x, math.nan) for x in (q, k, v)]
    softmax_d = flash_attn_interface._flash_attn_backward(
        out, q, k, v, out, lse, *grads, *score, False
    )
    assert softmax_d.shape == (2, 4, 256) and softmax_d.dtype == torch.float32
    row_sums = out.float().square().sum(-1).transpose(1, 2)
    torch.testing.assert_close(softmax_d[:, :, :130], row_sums)
    assert all(x.isfinite().all() for x in grads)

    cu_q, cu_k = cu_seqlens((130, 130), (70, 70))
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    extents = (cu_q, cu_k, 130, 70)
    packed = flash_attn_interface._flash_attn_varlen_forward(
        *flat, *extents, 0.0, softmax_scale=0.25, causal=False, zero_tensors=True
    )
    assert_bitwise_equal(packed[0].view_as(out), out)
    assert packed[1].shape == (4, 260)
    varlen_grads = [torch.full_like(x, math.nan) for x in flat]
    softmax_d = flash_attn_interface._flash_attn_varlen_backward(
        packed[0], *flat, *packed[:2], *varlen_grads, *extents, *score, False
    )
    assert softmax_d.shape == (4, 260 + 128 * 2) and softmax_d.dtype == torch.float32
    for packed_grad, grad in zip(varlen_grads, grads, strict=True):
        assert_bitwise_equal(packed_grad.view_as(grad), grad)


# ---- Strides and autograd ----


def test_last_dimension_is_made_contiguous():
    """Any q, k, v is taken; a cache must have a contiguous last dimension, for it is written to."""
    q, k, v = Problem((5,), (70,), 2, 2, 16, FINEST).dense()
    expected = flash_attn_func(q, k, v)
    odd = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    assert odd[0].stride(-1) != 1
    assert_bitwise_equal(flash_attn_func(*odd), expected)
    cu_q, cu_k = cu_seqlens((5,), (70,))
    packed = flash_attn_varlen_func(*(x[0] for x in odd), cu_q, cu_k, 5, 70)
    assert_bitwise_equal(packed[None], expected)
    for caches in ((odd[1], v), (k, odd[2])):
        with pytest.raises((AssertionError, RuntimeError), match="contiguous last dimension"):
            flash_attn_with_kvcache(q, *caches)


def test_lse_and_s_dmask_get_no_gradient():
    """A loss that also uses lse has the gradients of its out part."""
    q, k, v = (x.requires_grad_() for x in Problem((5,), (70,), 2, 2, 16, FINEST).dense())
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True)
    alone = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    both = torch.autograd.grad(out.sum() + 3.0 * lse.sum(), (q, k, v))
    for actual, expected in zip(both, alone, strict=True):
        assert_bitwise_equal(actual, expected)


@pytest.mark.parametrize("wanted", ["none", "disabled", "q", "k", "v"])
def test_saved_only_if_needed(wanted):
    """Tensors are kept for backward iff gradients are enabled and an input asks for one."""
    tensors = dict(zip("qkv", Problem((5,), (70,), 2, 2, 12, FINEST).dense(), strict=True))
    for name in "qkv" if wanted == "disabled" else wanted if wanted in "qkv" else "":
        tensors[name].requires_grad_()
    saved = []
    with (
        torch.autograd.graph.saved_tensors_hooks(
            lambda x: saved.append(x.numel()) or x, lambda x: x
        ),
        torch.set_grad_enabled(wanted != "disabled"),
    ):
        out = flash_attn_func(**tensors)
    assert out.requires_grad == (wanted in "qkv") and bool(saved) == (wanted in "qkv")
    if saved:
        out.sum().backward()
        assert [name for name in "qkv" if tensors[name].grad is not None] == [wanted]


@pytest.mark.parametrize("deterministic", [False, True])
def test_deterministic_argument(deterministic):
    """deterministic= may be passed, and backward repeats to the byte either way."""
    q, k, v = (x.requires_grad_() for x in Problem((70,), (70,), 4, 2, 16, FINEST).dense())
    first, second = (
        torch.autograd.grad(
            flash_attn_func(q, k, v, causal=True, deterministic=deterministic).sum(), (q, k, v)
        )
        for _ in range(2)
    )
    for a, b in zip(first, second, strict=True):
        assert_bitwise_equal(a, b)
