"""Integers at the ends of their range: a sum with one saturates, and never wraps into an answer.

Bytes are compared with those of the same call whose bound does not bind.
"""

import itertools
from typing import Any

import pytest
import torch
from device import DEVICE, FINEST

from flash_attn import (
    _native,
    determinism,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn._arguments import Inputs, Packing, Scoring
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)
from flash_attn.testing import assert_bitwise_equal, random_normal

S_Q, S_K, H, D = 5, 70, 2, 16
FAR = [2**31 - 1, 2**31, 2**32, 2**40 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**70]
NEAR_ZERO = [-2, -(2**31), -(2**63), -(2**63) - 1, -(2**70)]
# (left, right) that hide nothing; and those that hide as (3, -1) and (-1, 0) do.
UNLIMITED = [(x, -1) for x in FAR + NEAR_ZERO] + [(-1, x) for x in FAR + NEAR_ZERO]
UNLIMITED += [(x, x) for x in FAR] + [(2**63 - 1, -(2**63)), (-(2**63), 2**63 - 1)]
WINDOWS = [(window, (-1, -1)) for window in UNLIMITED]
WINDOWS += [((3, x), (3, -1)) for x in FAR] + [((x, 0), (-1, 0)) for x in FAR + NEAR_ZERO]
windows = pytest.mark.parametrize(("window", "plain"), WINDOWS, ids=[f"{w[0]}" for w in WINDOWS])
INT64 = [w for w in WINDOWS if all(-(2**63) <= x < 2**63 for x in w[0])]
int64_windows = pytest.mark.parametrize(("window", "plain"), INT64, ids=[f"{w[0]}" for w in INT64])


@pytest.fixture(autouse=True)
def deterministic():
    """Where bytes do not depend on what a schedule makes of a bound."""
    determinism.set_deterministic(True)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return random_normal(shape, seed=seed, dtype=FINEST, device=DEVICE)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def assert_same(results: Any, expected: Any) -> None:
    for x, y in zip(results, expected, strict=True):
        assert_bitwise_equal(x, y)


def dense(s_q: int = S_Q, s_k: int = S_K) -> list[torch.Tensor]:
    return [normal(2, s, H, D, seed=i) for i, s in enumerate((s_q, s_k, s_k))]


PACK = {"cu_seqlens_q": int32(0, S_Q, S_Q + 2), "cu_seqlens_k": int32(0, S_K, S_K + 9)}
LENGTHS = {"max_seqlen_q": S_Q, "max_seqlen_k": S_K}


def pack() -> list[torch.Tensor]:
    return [normal(t, H, D, seed=i) for i, t in enumerate((S_Q + 2, S_K + 9, S_K + 9))]


def with_gradients(function: Any, inputs: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
    inputs = [x.clone().requires_grad_() for x in inputs]
    out = function(*inputs, **options)
    return [out, *torch.autograd.grad(out, inputs, normal(*out.shape, seed=9))]


# ---- Windows -------------------------------------------------------------------------------------


@windows
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("s", [(S_Q, S_K), (1, 1), (S_K, S_Q)], ids=["chunk", "one", "few keys"])
def test_dense(window, plain, causal, s):
    """The window (-1, 2^63 - 1) of a single query once saw nothing: its end wrapped."""
    calls = [
        with_gradients(flash_attn_func, dense(*s), causal=causal, window_size=w)
        for w in (window, plain)
    ]
    assert_same(*calls)


@windows
def test_varlen_and_its_partials(window, plain):
    calls = [
        with_gradients(flash_attn_varlen_func, pack(), **PACK, **LENGTHS, window_size=w)
        for w in (window, plain)
    ]
    assert_same(*calls)
    partials = [
        determinism.forward_partials(*pack(), **PACK, **LENGTHS, window_size=w)
        for w in (window, plain)
    ]
    assert_same(*((x.out, x.max_log2, x.sum) for x in partials))


@windows
@pytest.mark.parametrize("turned", [False, True], ids=["", "rotary"])
def test_kvcache(window, plain, turned):
    """A side as wide as the cache is none, for the rotation of queries as well."""
    results = []
    for w in (window, plain):
        caches = [normal(2, S_K, H, D, seed=i) for i in (3, 4)]
        new = [normal(2, S_Q, H, D, seed=i) for i in (5, 6, 7)]
        tables = [normal(S_K + S_Q, 8, seed=i) for i in (8, 9)] if turned else [None, None]
        out, lse = flash_attn_with_kvcache(
            new[0],
            *caches,
            *new[1:],
            *tables,
            cache_seqlens=int32(40, 3),
            window_size=w,
            return_softmax_lse=True,
        )
        results.append((out, lse, *caches))
    assert_same(*results)


@int64_windows
def test_low_level_ops(window, plain):
    results = []
    for w in (window, plain):
        score = (0.0, 0.25, False, *w, 0.0, None)
        out, lse, _, state = _flash_attn_forward(*dense(), *score, False)
        gradients = [torch.empty_like(x) for x in dense()]
        _flash_attn_backward(out, *dense(), out, lse, *gradients, *score, False, state)
        lengths = (*PACK.values(), *LENGTHS.values())
        packed, packed_lse, _, state = _flash_attn_varlen_forward(*pack(), *lengths, *score)
        packed_gradients = [torch.empty_like(x) for x in pack()]
        _flash_attn_varlen_backward(
            *(packed, *pack(), packed, packed_lse, *packed_gradients, *lengths, *score, False),
            rng_state=state,
        )
        results.append((out, lse, *gradients, packed, packed_lse, *packed_gradients))
    assert_same(*results)


def test_compiled_windows_of_any_size():
    """A compiler may know of a side only that it is an int64."""

    def attend(q, k, v, left, right):
        return flash_attn_func(q, k, v, window_size=(left, right))

    torch.compiler.reset()
    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    for window, plain in (((3, 2**63 - 1), (3, -1)), ((2**62, -(2**63)), (-1, -1))):
        assert_bitwise_equal(compiled(*dense(), *window), attend(*dense(), *plain))


# ---- Lengths -------------------------------------------------------------------------------------

MAXIMA = [S_K, S_K + 9, 2**31, 2**40, 2**63 - 1]


@pytest.mark.parametrize(
    ("max_q", "max_k"), [*((x, y) for x, y in itertools.product(MAXIMA, MAXIMA) if max(x, y) > S_K)]
)
def test_a_loose_maximum_is_harmless(max_q, max_k):
    """No sequence is longer than the pack that holds it, whatever the maximum says."""
    loose = {"max_seqlen_q": max_q, "max_seqlen_k": max_k}
    given = with_gradients(flash_attn_varlen_func, pack(), **PACK, **loose)
    assert_same(given, with_gradients(flash_attn_varlen_func, pack(), **PACK, **LENGTHS))
    partials = determinism.forward_partials(*pack(), **PACK, **loose)
    assert partials.out.shape[0] == 1


def test_a_loose_maximum_of_pages_and_of_used_keys():
    q, pages = pack()[0], normal(6, 16, H, D)
    table = int32(5, 0, 3, 1, 4, 2)
    tables = torch.stack((table, table.flip(0)))
    lengths = {"cu_seqlens_q": PACK["cu_seqlens_q"], "cu_seqlens_k": PACK["cu_seqlens_k"]}
    given, expected = (
        flash_attn_varlen_func(
            q, pages, pages, **lengths, max_seqlen_q=S_Q, max_seqlen_k=n, block_table=tables
        )
        for n in (2**63 - 1, S_K)
    )
    assert_bitwise_equal(given, expected)


@pytest.mark.parametrize("maximum", [2**31, 2**63 - 1])
def test_a_plan_gets_the_tokens_of_a_pack_as_the_longest_length(maximum):
    """A grid that is sized by a loose maximum would count beyond 32 bits."""

    def plan(q, k, max_seqlen_q, max_seqlen_k, **pages):
        packing = Packing(*PACK.values(), max_seqlen_q, max_seqlen_k, **pages)
        schedule = {"device": q.device, "deterministic": True, "num_splits": 0}
        return _native.plan(Inputs(q, k, k), Scoring(0.25), packing, **schedule)

    q, k, _ = pack()
    assert plan(q, k, maximum, maximum) == plan(q, k, q.shape[0], k.shape[0])
    cache, pages = normal(2, 16, H, D), {"block_table": int32(0, 1)[:, None]}
    assert plan(q, cache, maximum, maximum, **pages) == plan(q, cache, q.shape[0], 16, **pages)


def test_s_dmask_keeps_the_shape_of_the_maxima():
    *_, s_dmask = flash_attn_varlen_func(
        *pack(), **PACK, max_seqlen_q=200, max_seqlen_k=300, dropout_p=0.5, return_attn_probs=True
    )
    assert s_dmask.shape == (2, H, 256, 384)


def test_lengths_that_nobody_read_saturate(monkeypatch):
    """On a GPU cache_seqlens may hold anything: the sum with the new keys must not wrap."""
    monkeypatch.setattr("flash_attn._fast_path.attend_cache", lambda *arguments: None)
    seen = []

    def forward(inputs, scoring, packing, **schedule):
        seen.append(packing.seqused_k)
        return torch.empty_like(inputs.q), torch.empty(2, H, 1), None, None

    monkeypatch.setattr("flash_attn._check_contents.reads_contents", lambda of: False)
    monkeypatch.setattr(_native, "forward", forward)
    monkeypatch.setattr(_native, "append", lambda q, *rest, **named: q)
    new, cache = normal(2, 1, H, D), normal(2, S_K, H, D)
    flash_attn_with_kvcache(
        *(new, cache, cache.clone(), new, new), cache_seqlens=int32(2**31 - 1, 2**31 - 2)
    )
    flash_attn_with_kvcache(
        *(new, cache, cache.clone(), new, new), cache_seqlens=int32(7, -(2**31))
    )
    assert [x.tolist() for x in seen] == [[2**31 - 1] * 2, [8, -(2**31) + 1]]


@pytest.mark.parametrize("used", [2**31, 2**33, 2**62, -(2**40)])
@pytest.mark.cpu_only
def test_a_compiled_length_does_not_wrap(used):
    """2^33 in 32 bits is 0: a compiled step would write over the first keys."""

    def step(new, k_cache, v_cache, used):
        return flash_attn_with_kvcache(new, k_cache, v_cache, new, new, cache_seqlens=used)

    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    caches = [normal(2, S_K, H, D, seed=i) for i in (3, 4)]
    with pytest.raises(RuntimeError, match=r"past the end|must not be negative"):
        compiled(normal(2, 1, H, D), *caches, used)
