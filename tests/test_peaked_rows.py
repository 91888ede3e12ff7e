"""Rows that few keys carry: one key gives its value's bytes, a few no more error than they must.

The first token of every prompt sees one key, and rows of trained models lean on a sink or a token.
There the rounding error of the largest probability goes straight into the output, so the rule that
moves the reference of the exponents shows (csrc/core/contract.h, GpuOrder). Its yardstick is the
rule of FlashAttention-2, which follows the running maximum.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from device import BLOCK, DEVICE, DTYPES, ON_GPU, SEGMENT, page_size
from strategies import autograd

from benchmarks.reference_rules import PEAKED, ROWS, by_rule, exact, rms, scores_of, values
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.determinism import deterministic
from flash_attn.testing import (
    assert_bitwise_equal,
    bitwise_equal,
    cumulative_lengths,
    page_table,
    paged_rows,
    random_normal,
)

HEAD_DIMS = (64, 96, 128, 192, 256, 1, 17, 33, 40, 72, 130, 255)
FEATURES = {
    "plain": {},
    "scale": {"softmax_scale": 0.3},
    "softcap": {"softcap": 2.5},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.125, 2.0], device=DEVICE)},
}
H_Q, H_KV = 4, 2
HEADS = 4  # of simulated rows
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
both_modes = pytest.mark.parametrize("mode", [True, False], ids=["deterministic", "standard"])


def rows(*shape, seed, dtype, amplitude=1.0):
    return (random_normal(shape, seed=seed) * amplitude).to(DEVICE, dtype)


def of_every_head(x):
    """Values of key heads (..., h_kv, d) as their query heads read them."""
    return x.repeat_interleave(H_Q // H_KV, dim=-2)


def assert_lone(out, lse, q, k, v, scale=None, label=""):
    """out is v and lse the score; q, k, v (..., h, d) are the rows and the key that each sees."""
    assert_bitwise_equal(out, of_every_head(v), f"out {label}")
    products = q.double() * of_every_head(k).double()
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    score, size = products.sum(-1) * scale, products.abs().sum(-1) * scale
    error = (lse.double() - score).abs()
    assert (error <= 2.0**-20 * size).all(), f"lse {label}: off by {error.max().item():.3g}"


def assert_zero(dq, dk, q, k, v, dout):
    """Gradients of rows that see one key: zero, but for what dP and delta round on a GPU."""
    largest = [x.float().abs().max() for x in (q, k)]
    size = dout.float().norm(dim=-1).max() * v.float().norm(dim=-1).max() * max(largest)
    rounding = 2.0**-21 if ON_GPU else 0.0
    for name, x in (("dq", dq), ("dk", dk)):
        assert (x.float().abs() <= rounding * size).all(), f"{name}: {x.abs().max().item():.3g}"


# ---- A row that sees one key ----


@every_dtype
@both_modes
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_the_first_token_of_a_prompt(d, dtype, mode):
    """Causal, by itself and as row 0 of a longer prompt."""
    for length, amplitude in ((1, 1.0), (SEGMENT + BLOCK + 5, 1.0), (70, 30.0)):
        q = rows(2, length, H_Q, d, seed=d, dtype=dtype, amplitude=amplitude)
        k, v = (rows(2, length, H_KV, d, seed=d + n, dtype=dtype) for n in (1, 2))
        with deterministic(mode):
            out, lse, _ = flash_attn_func(q, k, v, causal=True, return_attn_probs=True)
        first = (x[:, 0] for x in (q, k, v))
        assert_lone(out[:, 0], lse[:, :, 0], *first, label=f"row 0 of {length}")


@every_dtype
@both_modes
@pytest.mark.parametrize("feature", FEATURES)
def test_a_window_of_one_in_every_segment(feature, dtype, mode):
    """Each query sees the key beside it: dense, with gradients, as a pack, from a cache."""
    options = FEATURES[feature] | {"window_size": (0, 0)}
    length = 2 * SEGMENT + BLOCK + 3
    q = rows(1, length, H_Q, 64, seed=1, dtype=dtype)
    k, v = (rows(1, length, H_KV, 64, seed=n, dtype=dtype) for n in (2, 3))
    dout = rows(1, length, H_Q, 64, seed=4, dtype=dtype)

    def attend(q, k, v):
        return flash_attn_func(q, k, v, **options)

    with deterministic(mode):
        dense = attend(q, k, v)
        dq, dk, dv = autograd(attend, (q, k, v), dout)
        cu = cumulative_lengths([length], DEVICE)
        packed = [x[0] for x in (q, k, v)]
        pack = flash_attn_varlen_func(*packed, cu, cu, length, length, **options)
        tail = flash_attn_with_kvcache(q[:, -40:], k, v, **options)
        token = flash_attn_with_kvcache(q[:, -1:], k, v, **options)
    expected = of_every_head(v)
    for label, actual, wanted in (
        ("dense", dense, expected),
        ("pack", pack, expected[0]),
        ("40 rows from a cache", tail, expected[:, -40:]),
        ("a token from a cache", token, expected[:, -1:]),
    ):
        assert_bitwise_equal(actual, wanted, label)
    assert_zero(dq, dk, q, k, v, dout)
    group_sum = dout.unflatten(2, (H_KV, -1)).float().sum(3)
    assert (dv.float() - group_sum).abs().max() <= torch.finfo(dtype).eps * group_sum.abs().max()


@every_dtype
@both_modes
@pytest.mark.parametrize("d", HEAD_DIMS)
def test_a_key_that_one_lone_query_sees_has_the_gradient_of_its_output(d, dtype, mode):
    length = SEGMENT + 70
    q, k, v, dout = (rows(1, length, 2, d, seed=d + n, dtype=dtype) for n in range(4))

    def attend(q, k, v):
        return flash_attn_func(q, k, v, window_size=(0, 0))

    with deterministic(mode):
        dq, dk, dv = autograd(attend, (q, k, v), dout)
    assert_bitwise_equal(dv, dout + 0.0, "dv")
    assert_zero(dq, dk, q, k, v, dout)


@every_dtype
@both_modes
def test_the_first_gradient_of_a_prompt(dtype, mode):
    """dq of row 0 is zero, whatever the rows after it do to dk and dv."""
    q, k, v, dout = (rows(1, 200, 2, 64, seed=n, dtype=dtype) for n in range(4))
    with deterministic(mode):
        dq = autograd(lambda *x: flash_attn_func(*x, causal=True), (q, k, v), dout)[0]
    assert_zero(dq[:, 0], dq[:, 0], q, k, v, dout)
    assert torch.count_nonzero(dq[:, 1]) > 0


@every_dtype
@both_modes
def test_a_cache_that_holds_one_key(dtype, mode):
    """Alone, behind left padding, in a page; beside sequences that hold many."""
    lengths, capacity, pads = (1, SEGMENT + 9, 1), SEGMENT + 64, (0, 0, 37)
    q = rows(3, 1, H_Q, 64, seed=1, dtype=dtype)
    parts = [[rows(n, H_KV, 64, seed=s + n, dtype=dtype) for n in lengths] for s in (2, 3)]
    used = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    padding = torch.tensor(pads, dtype=torch.int32, device=DEVICE)
    caches = []
    for part in parts:
        cache = torch.full((3, capacity, H_KV, 64), math.nan, dtype=dtype, device=DEVICE)
        for b, x in enumerate(part):
            cache[b, pads[b] : pads[b] + len(x)] = x
        caches.append(cache)
    size = page_size(16)
    table, num_pages = page_table(lengths, size, seed=5, device=DEVICE)
    pages = [paged_rows(part, table, num_pages, size) for part in parts]
    with deterministic(mode):
        padded = flash_attn_with_kvcache(
            q, *caches, cache_seqlens=used + padding, cache_leftpad=padding, return_softmax_lse=True
        )
        paged = flash_attn_with_kvcache(
            q, *pages, cache_seqlens=used, block_table=table, return_softmax_lse=True
        )
    for b in (0, 2):
        k, v = (part[b][0] for part in parts)
        for label, (out, lse) in (("padded", padded), ("paged", paged)):
            assert_lone(out[b, 0], lse[b, :, 0], q[b, 0], k, v, label=f"{label}, {b}")


@every_dtype
def test_lse_of_one_key_is_its_score(dtype):
    """Products that fp32 holds exactly, times a power of two: at most the last place is off."""
    generator = torch.Generator().manual_seed(1)
    q, k = (torch.randint(-8, 9, (1, 300, 2, 64), generator=generator) for _ in "qk")
    score = (q.double() * k.double()).sum(-1).transpose(1, 2) * 0.125
    q, k = (x.to(DEVICE, dtype) for x in (q, k))
    _, lse, _ = flash_attn_func(q, k, k, window_size=(0, 0), return_attn_probs=True)
    exact = score.float().to(DEVICE)
    last_place = torch.nextafter(exact.abs(), exact.new_tensor(math.inf)) - exact.abs()
    # The CPU kernels scale queries before the product, and round each of them.
    of_products = 0.0 if ON_GPU else 2.0**-22 * (q.abs() * k.abs()).float().sum(-1).transpose(1, 2)
    assert ((lse - exact).abs() <= 2 * last_place + of_products).all()


# ---- Rows that few keys carry ----


def errors(kind, deviation, dtype):
    """Root mean square errors of out: ours, the running maximum's, and an integer reference's."""
    x, v = scores_of(kind, deviation, HEADS), values(HEADS)
    truth = exact(x, v)
    # Query r reads column r of the keys: its scores are what stands there.
    q = torch.eye(ROWS).expand(1, HEADS, ROWS, ROWS).transpose(1, 2)
    k, of_keys = (y.transpose(0, 1)[None] for y in (x.transpose(-1, -2), v))
    assert torch.equal(k.to(dtype).double(), k), "the keys hold the scores"
    inputs = [y.to(DEVICE, dtype).contiguous() for y in (q, k, of_keys)]
    ours = flash_attn_func(*inputs, softmax_scale=math.log(2.0))[0].transpose(0, 1).cpu()
    results = [ours, *(by_rule(r, x, v, dtype) for r in ("running maximum", "ceiling, late"))]
    return [rms(y.to(dtype).double() - truth) for y in results]


@both_modes
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deviation", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("kind", PEAKED)
def test_a_peaked_row_is_as_accurate_as_under_the_running_maximum(kind, deviation, dtype, mode):
    with deterministic(mode):
        ours, running, integer = errors(kind, deviation, dtype)
    assert ours <= 1.05 * running, f"{ours / running:.3f} of the running maximum's error"
    # The control: references that are integers, as they were, would not pass.
    assert integer > 1.05 * running


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("deviation", [0.5, 1.0, 3.0])
def test_a_flat_row_pays_little(deviation, dtype):
    """Normal scores, where a moving reference would cost time: the errors of many keys cancel."""
    ours, running, _ = errors("normal", deviation, dtype)
    assert ours <= 1.12 * running


def test_control_an_integer_reference_loses_the_value():
    """One key under the rule that was: a probability in (1/2, 1], rounded for P V alone."""
    x = random_normal((1, ROWS, 64), seed=3).double() - 1e4
    x[..., 0] = random_normal((1, ROWS), seed=5).double() * 4
    v = random_normal((1, 64, 64), seed=4).bfloat16()
    lost = by_rule("ceiling, late", x, v.double(), torch.bfloat16).bfloat16()
    kept = by_rule("running maximum", x, v.double(), torch.bfloat16).bfloat16()
    expected = v[:, :1].expand(1, ROWS, 64)
    assert not bitwise_equal(lost, expected) and bitwise_equal(kept, expected)


@pytest.mark.skipif(not ON_GPU, reason="probabilities on the CPU are float32")
def test_scores_beyond_sixteen_bits_keep_the_value():
    """exp2(x scale - m) misses 1 by more than 16 bits where a score is in the tens of thousands,
    and one in a hundred of such references is an integer by chance."""
    for dtype, amplitude in itertools.product((torch.float16, torch.bfloat16), (100.0, 300.0)):
        q, k = (rows(1, 4000, 4, 64, seed=n, dtype=dtype, amplitude=amplitude) for n in (1, 2))
        v = rows(1, 4000, 4, 64, seed=3, dtype=dtype)
        out = flash_attn_func(q, k, v, window_size=(0, 0))
        assert_bitwise_equal(out, v, f"out, {dtype}, {amplitude:g}")


def test_company_decides_nothing_for_a_row_of_one_key():
    """Its score is an integer in log2 units but for a rounding; alone, and before rows whose
    references are none."""
    dtype, scale = torch.bfloat16, 0.125
    to_log2 = torch.tensor(scale / math.log(2.0)).float()
    q, k, v = (rows(1, 40, 1, 64, seed=n, dtype=dtype) for n in (1, 2, 3))
    for n in range(1, 80):
        rest = (torch.tensor(float(n)) / to_log2).float()  # of the product, in 16 bits at a time
        q[0, 0, 0], k[0, 0, 0] = 0.0, 0.0
        q[0, 0, 0, :3] = 1.0
        for i in range(3):
            k[0, 0, 0, i] = rest
            rest = rest - k[0, 0, 0, i].float().cpu()
        with deterministic():
            results = [
                flash_attn_func(*(x[:, :end] for x in (q, k, v)), causal=True, softmax_scale=scale,
                                return_attn_probs=True)
                for end in (1, 40)
            ]  # fmt: skip
        (alone, lse_alone, _), (out, lse, _) = results
        assert_bitwise_equal(out[:, :1], alone, f"out, {n}")
        assert_bitwise_equal(lse[:, :, :1], lse_alone, f"lse, {n}")


@every_dtype
def test_many_queries_of_a_sequence_of_one_key(dtype):
    """Without a mask every query sees it; its dV is the sum of their gradients."""
    q, dout = (rows(2, 300, H_Q, 64, seed=n, dtype=dtype) for n in (1, 4))
    k, v = (rows(2, 1, H_KV, 64, seed=n, dtype=dtype) for n in (2, 3))
    out = flash_attn_func(q, k, v)
    assert_bitwise_equal(out, of_every_head(v).expand_as(out), "out")
    dq, dk, dv = autograd(flash_attn_func, (q, k, v), dout)
    assert_zero(dq, dk, q, k, v, dout * 300**0.5)
    total = dout.unflatten(2, (H_KV, -1)).double().sum((1, 3))
    rounding = max(torch.finfo(dtype).eps, 2.0**-20)
    assert (dv[:, 0].double() - total).abs().max() <= rounding * total.abs().max()
