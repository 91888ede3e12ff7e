"""The native rules of the fast path are never looser than the rules in Python.

Random calls, most of them wrong in some way: whatever the fast path answers, the long way answers
with the same bytes. What it hands back it has not touched.
"""

import pytest
import torch
from device import DEVICE, FINEST, ON_GPU, page_size
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attn import (
    _fast_path,
    deterministic,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn.testing import assert_bitwise_equal

# On a GPU nobody reads index tensors; a wrong one is raised by a later call, here by another test.
pytestmark = pytest.mark.cpu_only
assert not ON_GPU or page_size(1) == 16

SMALL = st.integers(0, 4)
DTYPES = st.sampled_from([FINEST] * 8 + [torch.float64, torch.bfloat16, torch.int32])


def tensor(sizes, dtype, seed, layout):
    """Of these sizes; its columns lie one behind the other, apart, or are one."""
    x = torch.randn(*sizes, generator=torch.Generator().manual_seed(seed)).to(dtype).to(DEVICE)
    if layout == "last" and x.dim() > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if layout == "expanded" and x.numel():
        return x[(slice(None),) * (x.dim() - 1) + (slice(0, 1),)].expand(x.shape)
    return x


LAYOUTS = st.sampled_from(["contiguous"] * 8 + ["last", "expanded"])


@st.composite
def numbers(draw, *usual):
    """The usual sizes, now and then with one that is off by a little."""
    sizes = list(usual)
    if sizes and draw(st.integers(0, 4)) == 0:
        sizes[draw(st.integers(0, len(sizes) - 1))] += draw(st.integers(-2, 2))
    return [max(size, 0) for size in sizes]


@st.composite
def tensors_of(draw, *usual):
    sizes = draw(numbers(*usual))
    if draw(st.integers(0, 12)) == 0:
        sizes = sizes[1:] if draw(st.booleans()) else [1, *sizes]
    return tensor(sizes, draw(DTYPES), draw(st.integers(0, 9)), draw(LAYOUTS))


@st.composite
def index(draw, *values):
    """int32, now and then another length, dtype or value."""
    entries = list(values)
    if entries and draw(st.integers(0, 3)) == 0:
        entries[draw(st.integers(0, len(entries) - 1))] += draw(st.integers(-3, 3))
    if draw(st.integers(0, 9)) == 0:
        entries = entries[:-1]
    dtype = draw(st.sampled_from([torch.int32] * 9 + [torch.int64]))
    return torch.tensor(entries, dtype=dtype, device=DEVICE)


@st.composite
def scores(draw):
    found = {}
    if draw(st.booleans()):
        found["causal"] = True
    if draw(st.integers(0, 3)) == 0:
        found["window_size"] = (draw(st.integers(-2, 5)), draw(st.integers(-2, 5)))
    if draw(st.integers(0, 5)) == 0:
        found["softcap"] = draw(st.sampled_from([0.0, 3.0, -1.0, float("nan"), float("inf")]))
    if draw(st.integers(0, 5)) == 0:
        found["softmax_scale"] = draw(st.sampled_from([0.5, -0.5, float("nan"), float("inf")]))
    return found


HEADS = st.sampled_from([(1, 1), (2, 1), (4, 2)] * 4 + [(3, 2), (2, 4)])
HEAD_DIMS = st.sampled_from([1, 8, 17, 40, 256] * 3 + [257])


def like(k, seed, layout="contiguous"):
    return tensor(k.shape, k.dtype, seed, layout)


@st.composite
def dense_calls(draw):
    b, s_q, s_k = draw(SMALL), draw(SMALL), draw(SMALL)
    (h_q, h_kv), d = draw(HEADS), draw(HEAD_DIMS)
    k = draw(tensors_of(b, s_k, h_kv, d))
    v = like(k, 1, draw(LAYOUTS)) if draw(st.integers(0, 5)) else draw(tensors_of(b, s_k, h_kv, d))
    options = draw(scores())
    if draw(st.integers(0, 4)) == 0:
        slopes = draw(st.sampled_from([(h_q,), (b, h_q), (h_q, b), (1, 1, h_q)]))
        options["alibi_slopes"] = tensor(slopes, torch.float32, 3, draw(LAYOUTS))
    return flash_attn_func, [draw(tensors_of(b, s_q, h_q, d)), k, v], options


@st.composite
def packed_calls(draw):
    lengths = [draw(st.lists(SMALL, min_size=2, max_size=2)) for _ in "qk"]
    (h_q, h_kv), d = draw(HEADS), draw(HEAD_DIMS)
    q = draw(tensors_of(sum(lengths[0]), h_q, d))
    options = draw(scores())
    if draw(st.booleans()):
        pages, page = 3, draw(st.integers(1, 2))
        entries = [
            draw(st.integers(-1 if draw(st.integers(0, 9)) == 0 else 0, 2)) for _ in "012345"
        ]
        options["block_table"] = torch.tensor(entries, dtype=torch.int32, device=DEVICE).view(2, 3)
        k = draw(tensors_of(pages, page, h_kv, d))
    else:
        k = draw(tensors_of(sum(lengths[1]), h_kv, d))
    offsets = [draw(index(0, pair[0], sum(pair))) for pair in lengths]
    longest = [max(pair) + draw(st.integers(-1, 3)) for pair in lengths]
    return flash_attn_varlen_func, [q, k, like(k, 1), *offsets, *longest], options


PAGES = st.lists(st.integers(-1, 3), min_size=4, max_size=4)
CACHE_OPTIONS = {
    "cache_batch_idx": index(0, 1),
    "cache_leftpad": index(0, 1),
    "block_table": PAGES.map(lambda x: torch.tensor(x, dtype=torch.int32).view(2, 2).to(DEVICE)),
    "num_splits": st.sampled_from([0, 3, 128, 129, -1]),
}


@st.composite
def cache_calls(draw):
    b, rows, capacity = 2, draw(st.integers(2, 4)), draw(st.integers(3, 8))
    (h_q, h_kv), d = draw(HEADS), draw(HEAD_DIMS)
    options = draw(scores())
    k_cache = draw(tensors_of(rows, capacity, h_kv, d))
    v_cache = k_cache if draw(st.integers(0, 9)) == 0 else like(k_cache, 1, draw(LAYOUTS))
    for name, strategy in CACHE_OPTIONS.items():
        if draw(st.integers(0, 5)) == 0:
            options[name] = draw(strategy)
    options["cache_seqlens"] = draw(st.one_of(index(1, 2), st.integers(-1, 7), st.none()))
    if draw(st.booleans()):
        options["k"] = draw(tensors_of(b, draw(st.integers(0, 3)), h_kv, d))
        options["v"] = like(options["k"], 2)
        if draw(st.integers(0, 2)) == 0:
            half = draw(st.sampled_from([8, 8, 4, 0]))
            table = tensor((draw(st.integers(6, 12)), half), FINEST, 4, "contiguous")
            options |= {"rotary_cos": table, "rotary_sin": table.clone()}
    q = draw(tensors_of(b, draw(SMALL), h_q, d))
    return flash_attn_with_kvcache, [q, k_cache, v_cache], options


def copied(x, copies):
    """A tensor that a call may write to, once for each object: two arguments may be the same."""
    if not isinstance(x, torch.Tensor) or not x.is_contiguous():
        return x
    return copies.setdefault(id(x), x.clone())


def outcome(function, arguments, options):
    """(out and lse, or None where the call was refused; the arguments behind the call)"""
    copies = {}
    arguments = [copied(x, copies) for x in arguments]
    cached = function is flash_attn_with_kvcache
    options = options | {"return_softmax_lse" if cached else "return_attn_probs": True}
    try:
        results = function(*arguments, **options)
    except RuntimeError as error:
        assert str(error).startswith("flash_attn: "), error
        return None, arguments
    return results[:2], arguments


def check(call, mode):
    function, arguments, options = call
    answered = []
    native = {name: getattr(_fast_path, name) for name in ("attend", "attend_cache")}

    def spy(name):
        def run(*given):
            results = native[name](*given)
            answered.append(results is not None)
            return results

        return run

    with deterministic(mode), pytest.MonkeyPatch.context() as patch:
        for name in native:
            patch.setattr(_fast_path, name, spy(name))
        short, behind = outcome(function, arguments, options)
        for name in native:
            patch.setattr(_fast_path, name, lambda *given: None)
        long, expected = outcome(function, arguments, options)
    assert (short is None) == (long is None), "one way refuses what the other runs"
    for a, b in zip(short or [], long or [], strict=True):
        assert_bitwise_equal(a, b)
    for a, b in zip(behind, expected, strict=True):
        if isinstance(a, torch.Tensor):
            assert_bitwise_equal(a, b)
    return any(answered)


@settings(max_examples=300)
@given(call=dense_calls(), mode=st.booleans())
def test_dense(call, mode):
    check(call, mode)


@settings(max_examples=300)
@given(call=packed_calls(), mode=st.booleans())
def test_packed(call, mode):
    check(call, mode)


@settings(max_examples=400)
@given(call=cache_calls(), mode=st.booleans())
def test_cache(call, mode):
    check(call, mode)


@pytest.mark.parametrize("calls", [dense_calls, packed_calls, cache_calls])
def test_control_both_kinds_of_calls_are_drawn(calls):
    """Some calls the fast path answers, some it hands back: else the tests above show nothing."""
    seen = set()

    @settings(max_examples=100)
    @given(call=calls())
    def draw(call):
        seen.add(check(call, True))

    draw()
    assert seen == {True, False}
