"""The forward pass on a GPU: against float64, and against itself, byte for byte."""

import dataclasses
import re

import pytest
import torch

from flash_attn import (
    _native,
    check_device,
    determinism,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    reference,
)
from flash_attn._arguments import DENSE, Inputs, Packing, Scoring
from flash_attn.testing import assert_bitwise_equal, poison_free_memory

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (8, 32, 33, 40, 64, 72, 96, 100, 127, 128, 129, 160, 192, 200, 255, 256)
S = 1200  # crosses a segment of 1024, with a ragged end
MANY = 70_000  # sequences; a grid holds 65,535 in its second and in its third dimension


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device="cuda", dtype=dtype)


def dense(d, h_q=4, h_kv=2, b=8, s=S):
    return normal(b, s, h_q, d), normal(b, s, h_kv, d), normal(b, s, h_kv, d)


def lengths(*values):
    return torch.tensor(values, dtype=torch.int32, device="cuda")


@pytest.fixture(autouse=True)
def deterministic_mode():
    determinism.set_deterministic(True)


PROBLEMS = {  # b, s_q, s_k, h_q, h_kv and options
    "causal": (2, 200, 200, 4, 2, {"causal": True}),
    "decode": (1, 1, 1500, 8, 2, {}),
    "window": (2, 130, 1111, 4, 4, {"window_size": (100, 50)}),
    "more_queries": (1, 300, 77, 2, 1, {"causal": True}),
    "softcap": (2, 64, 600, 6, 2, {"softcap": 5.0, "causal": True}),
    "alibi": (1, 129, 700, 4, 2, {"alibi": True, "causal": True}),
    "negative_scale": (1, 65, 300, 2, 2, {"softmax_scale": -0.3}),
    "one_key": (3, 17, 1, 3, 1, {}),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", HEAD_DIMS)
@pytest.mark.parametrize("problem", PROBLEMS)
def test_accuracy(problem, d, dtype):
    b, s_q, s_k, h_q, h_kv, options = PROBLEMS[problem]
    options = dict(options)
    if options.pop("alibi", False):
        options["alibi_slopes"] = torch.rand(h_q, device="cuda")
    q = normal(b, s_q, h_q, d, dtype=dtype)
    k, v = normal(b, s_k, h_kv, d, dtype=dtype), normal(b, s_k, h_kv, d, dtype=dtype)
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **options)
    truth, true_lse = reference.attention(q, k, v, **options)
    plain, plain_lse = reference.attention(q, k, v, dtype=dtype, **options)
    reference.assert_accurate(out, truth, plain, label="out")
    reference.assert_accurate(lse, true_lse, plain_lse, label="lse")


@pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
def test_rows_do_not_depend_on_their_schedule(d):
    q, k, v = dense(d)
    full = flash_attn_func(q, k, v, causal=True)
    assert_bitwise_equal(flash_attn_func(q, k, v, causal=True), full)
    assert_bitwise_equal(flash_attn_func(q[3:4], k[3:4], v[3:4], causal=True), full[3:4])
    assert_bitwise_equal(
        flash_attn_func(q[:, :, :2], k[:, :, :1], v[:, :, :1], causal=True), full[:, :, :2]
    )
    for chunk in (1, 7, 16, 17, 53, 128, 300, 640):
        tail = flash_attn_func(q[:, S - chunk :], k, v, causal=True)
        assert_bitwise_equal(tail, full[:, S - chunk :])
    for num_splits in (1, 2, 3, 8, 64):
        for cut in (64, 1100, S):
            row = flash_attn_with_kvcache(
                *(q[:, cut - 1 : cut], k, v),
                cache_seqlens=lengths(*[cut] * 8),
                causal=True,
                num_splits=num_splits,
            )
            assert_bitwise_equal(row, full[:, cut - 1 : cut])


@pytest.mark.parametrize("d", [64, 96, 128, 256])
def test_decoding_does_not_depend_on_how_many_decode(d):
    """More sequences than run at once take other kernels at some head dims, and no pieces."""
    q, k, v = normal(72, 1, 16, d), normal(72, 1300, 8, d), normal(72, 1300, 8, d)
    together = flash_attn_func(q, k, v, return_attn_probs=True)[:2]
    for part in (slice(0, 1), slice(5, 15), slice(8, 72)):
        some = flash_attn_func(q[part], k[part], v[part], return_attn_probs=True)[:2]
        for x, y in zip(some, together, strict=True):
            assert_bitwise_equal(x, y[part])


def occupancies_of(decode) -> list[str]:
    """For which occupancy the kernels were made that a decode runs."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        decode()
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    return [found[1] for name in names if (found := re.search(r"Decode<.*Occupancy\)(\d)>", name))]


def test_a_decode_at_every_occupancy():
    """Each has a kernel of its own, and one row the same bytes in all of them."""
    gpu = torch.cuda.get_device_properties("cuda")
    if gpu.shared_memory_per_block_optin < 160 * 1024:
        pytest.skip("two spans of keys do not fit into this GPU's shared memory")
    most = 3 * gpu.multi_processor_count + 1
    q, k, v = normal(most, 1, 4, 128), normal(most, 500, 1, 128), normal(most, 500, 1, 128)

    def decode(b):
        return flash_attn_func(q[:b], k[:b], v[:b], return_attn_probs=True)[:2]

    together = decode(most)
    for occupancy, b in enumerate((1, 2 * gpu.multi_processor_count, most)):
        assert occupancies_of(lambda b=b: decode(b)) == [str(occupancy)]
        for x, y in zip(decode(b), together, strict=True):
            assert_bitwise_equal(x, y[:b])


def test_a_pack_with_a_gap_behind_it():
    q, k, v = dense(64, b=1, s=900)
    seqlens = (300, 1, 0, 513)
    cu = lengths(0, *torch.tensor(seqlens).cumsum(0).tolist())
    packed = [x[0] for x in (q, k, v)]
    out, lse, _ = flash_attn_varlen_func(*packed, cu, cu, 513, 513, return_attn_probs=True)
    begin = 0
    for length in seqlens:
        part = slice(begin, begin + length)
        if length:
            alone = flash_attn_func(*(x[:, part] for x in (q, k, v)))
            assert_bitwise_equal(out[part], alone[0])
        begin += length
    assert not out[begin:].any() and torch.isposinf(lse[:, begin:]).all()


def assert_defined_as_on_the_cpu(q, k, packing=DENSE, **options):
    """All that a forward pass hands out, NaN in the memory that it gets."""
    scoring, seed = Scoring(0.125, dropout_p=0.3), torch.tensor([1234, 5678])
    options |= {"return_softmax": True}
    fields = {field.name: getattr(packing, field.name) for field in dataclasses.fields(packing)}
    on_cpu = Packing(**{n: x.cpu() if torch.is_tensor(x) else x for n, x in fields.items()})
    inputs = Inputs(*(x.cpu() for x in (q, k, k)))
    expected = _native.forward(inputs, scoring, on_cpu, seed=seed, **options)
    poison_free_memory("cuda")
    inputs = Inputs(q, k, k)
    results = _native.forward(inputs, scoring, packing, seed=seed.cuda(), **options)
    for name, ours, theirs in zip(
        ("out", "lse", "S_dmask", "rng_state"), results, expected, strict=True
    ):
        assert_bitwise_equal(ours.cpu(), theirs, name)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    "ends,tokens,longest",
    [((0, 0), 9, 0), ((), 9, 0), ((0, 0), 0, 5)],
    ids=["no_queries", "no_sequences", "no_tokens"],
)
def test_a_pack_without_queries(ends, tokens, longest, deterministic):
    """Every token that there is lies behind the last sequence."""
    packing = Packing(lengths(0, *ends), lengths(0, *ends), longest, 7)
    q, k = normal(tokens, 4, 64), normal(7, 2, 64)
    assert_defined_as_on_the_cpu(q, k, packing, deterministic=deterministic)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("b,s_q", [(2, 0), (0, 3)])
@pytest.mark.parametrize("num_splits", [0, 4])
def test_a_batch_without_queries(num_splits, b, s_q, deterministic):
    q, k = normal(b, s_q, 4, 64), normal(b, S, 2, 64)
    assert_defined_as_on_the_cpu(q, k, deterministic=deterministic, num_splits=num_splits)


@pytest.mark.parametrize("longest", [513, 0])
def test_partials_are_all_that_is_written(longest):
    """Not zeros into the tokens behind a pack: out, which the kernel is given, is q."""
    q, k, v = (x[0] for x in dense(64, b=1))
    cu, before = lengths(0, longest), q.clone()
    extents = {"cu_seqlens_q": cu, "cu_seqlens_k": cu, "max_seqlen_q": longest, "max_seqlen_k": 513}
    determinism.forward_partials(q, k, v, **extents)
    assert_bitwise_equal(q, before)


def test_a_fold_of_many_sequences():
    """Two pieces of a segment each, whose partials fit."""
    q, k, v = normal(MANY, 1, 2, 16), normal(8, 1100, 1, 16), normal(8, 1100, 1, 16)
    rows = torch.randint(8, (MANY,), device="cuda", dtype=torch.int32)
    schedule = {"device": q.device, "deterministic": True, "num_splits": 2}
    assert _native.plan(Inputs(q, k, v), Scoring(0.25), DENSE, **schedule).pieces == 2

    def decode(part):
        options = {"cache_batch_idx": rows[part], "num_splits": 2, "return_softmax_lse": True}
        return flash_attn_with_kvcache(q[part], k, v, **options)

    whole = decode(slice(None))
    for part in (slice(0, MANY // 2), slice(MANY // 2, None)):
        for name, alone, together in zip(("out", "lse"), decode(part), whole, strict=True):
            assert_bitwise_equal(together[part], alone, name)


def test_s_dmask_of_many_sequences():
    """Each column of out shows one key, and so what was dropped: that depends on the batch index,
    |S_dmask| does not.
    """
    q, k = normal(MANY, 1, 1, 16), normal(MANY, 16, 1, 16)
    v = torch.eye(16, device="cuda", dtype=q.dtype)[:, None].expand(MANY, 16, 1, 16)

    def attend(part):
        return flash_attn_func(q[part], k[part], v[part], 0.5, return_attn_probs=True)

    out, _, s_dmask = attend(slice(None))
    assert torch.equal(s_dmask[:, 0, 0, :16] > 0, out[:, 0, 0] > 0)
    last = slice(MANY - 10_000, None)
    assert_bitwise_equal(s_dmask[last].abs(), attend(last)[2].abs())


@pytest.mark.parametrize("page_size", [16, 48, 256])
@pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
def test_pages(d, page_size):
    q, k, v = dense(d)
    full = flash_attn_func(q, k, v, causal=True)
    num_pages = -(-S // page_size)
    table = torch.randperm(8 * num_pages, device="cuda").to(torch.int32).view(8, num_pages)
    caches = [normal(8 * num_pages, page_size, 2, d).fill_(torch.nan) for _ in "kv"]
    at = torch.arange(S, device="cuda")
    for cache, rows in zip(caches, (k, v), strict=True):
        for b in range(8):
            cache[table[b, at // page_size].long(), at % page_size] = rows[b]
    for s_q in (1, 5, 300):
        out = flash_attn_with_kvcache(
            *(q[:, S - s_q :], *caches),
            cache_seqlens=lengths(*[S] * 8),
            block_table=table,
            causal=True,
        )
        assert_bitwise_equal(out, full[:, S - s_q :])


@pytest.mark.parametrize("interleaved", [False, True])
def test_append_with_rotary_as_on_the_cpu(interleaved):
    q, k, v = dense(64, b=3, s=5)
    caches = [normal(4, 600, 2, 64) for _ in "kv"]
    cos, sin = torch.rand(600, 16, device="cuda").bfloat16(), torch.rand(600, 16, device="cuda")
    sin = sin.bfloat16()
    options = {"causal": True, "rotary_interleaved": interleaved}
    on_cpu = [x.cpu() for x in caches]
    expected = flash_attn_with_kvcache(
        *(q.cpu(), *on_cpu, k.cpu(), v.cpu(), cos.cpu(), sin.cpu()),
        cache_seqlens=lengths(0, 77, 590).cpu(),
        cache_batch_idx=lengths(3, 0, 2).cpu(),
        **options,
    )
    out = flash_attn_with_kvcache(
        *(q, *caches, k, v, cos, sin),
        cache_seqlens=lengths(0, 77, 590),
        cache_batch_idx=lengths(3, 0, 2),
        **options,
    )
    for ours, theirs in zip(caches, on_cpu, strict=True):
        assert_bitwise_equal(ours.cpu(), theirs)
    torch.testing.assert_close(out.cpu(), expected, atol=0.02, rtol=0.02)


def test_an_append_past_the_end_writes_nothing():
    q, k, v = dense(64, b=1, s=3)
    caches = [normal(1, 64, 2, 64) for _ in "kv"]
    before = [x.clone() for x in caches]
    flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths(64), causal=True)
    for ours, old in zip(caches, before, strict=True):
        assert_bitwise_equal(ours, old)
    with pytest.raises(RuntimeError, match=r"cache_seqlens"):
        check_device()


@pytest.mark.parametrize("d", [64, 128, 256])
def test_partials_fold_to_the_same_bytes(d):
    q, k, v = dense(d)
    partials = determinism.forward_partials(q[:, -3:], k, v, causal=True)
    out, _ = determinism.reduce_partials(partials, q.dtype)
    assert_bitwise_equal(out, flash_attn_func(q[:, -3:], k, v, causal=True))


def test_dropout_keeps_what_the_cpu_keeps():
    q, k, v = (x.half() for x in dense(64, b=2, s=300))
    scoring = Scoring(0.125, causal=True, dropout_p=0.3)
    seed = torch.tensor([1234, 5678])
    inputs = Inputs(*(x.cpu() for x in (q, k, v)))
    on_cpu, *_, state = _native.forward(inputs, scoring, deterministic=True, seed=seed)
    inputs = Inputs(q, k, v)
    out, *_, rng_state = _native.forward(inputs, scoring, deterministic=True, seed=seed.cuda())
    assert torch.equal(rng_state.cpu(), state)
    torch.testing.assert_close(out.cpu(), on_cpu, atol=3e-3, rtol=3e-3)


def test_a_graph_follows_the_contents_of_cache_seqlens():
    q, k, v = dense(128, s=2048)
    cache_seqlens = lengths(*[2048] * 8)

    def decode():
        return flash_attn_with_kvcache(q[:, :1], k, v, cache_seqlens=cache_seqlens)

    decode()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = decode()
    for length in (1, 100, 1500, 2048):
        cache_seqlens.fill_(length)
        graph.replay()
        assert_bitwise_equal(out, decode())


def test_the_control_differs():
    """In standard mode a decoded row depends on its batch, as it does upstream."""
    q, k, v = dense(128, s=8192)

    def decode(first, end):
        rows = (x[first:end] for x in (q[:, :1], k, v))
        return flash_attn_func(*rows, return_attn_probs=True)[:2]

    def alone():
        return [torch.cat(x) for x in zip(*(decode(i, i + 1) for i in range(len(q))), strict=True)]

    with determinism.deterministic(False):
        differs = [not torch.equal(x, y) for x, y in zip(decode(0, 8), alone(), strict=True)]
    assert any(differs)
    for x, y in zip(decode(0, 8), alone(), strict=True):
        assert_bitwise_equal(x, y)


def test_a_short_sequence_has_no_more_splits_than_the_longest():
    """Partials are laid out for the longest: five splits of 257 keys once ran past them."""
    seqlens_q, seqlens_k = (1, 1, 1, 1, 171), (1, 1, 0, 385, 257)
    cu_q, cu_k = (lengths(0, *torch.tensor(x).cumsum(0).tolist()) for x in (seqlens_q, seqlens_k))
    q = normal(sum(seqlens_q), 9, 64)
    k, v = normal(sum(seqlens_k), 3, 64), normal(sum(seqlens_k), 3, 64)
    with determinism.deterministic(False):
        out, lse, _ = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 171, 385, return_attn_probs=True)
    expected = flash_attn_varlen_func(q, k, v, cu_q, cu_k, 171, 385, return_attn_probs=True)
    torch.testing.assert_close(out, expected[0], atol=0.02, rtol=0.02)
    torch.testing.assert_close(lse, expected[1], atol=1e-4, rtol=1e-4)
