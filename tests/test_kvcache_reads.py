"""A call without new keys reads the caches, and PyTorch is told so: callers may rely on it."""

import pytest
import torch
from device import DEVICE, FINEST
from test_compile import backends, fresh_compiler  # noqa: F401  the fixture is for all tests here

import flash_attn_2_cuda
from flash_attn import flash_attn_func, flash_attn_with_kvcache
from flash_attn.testing import assert_bitwise_equal, random_normal

B, KEYS, H, D = 2, 70, 2, 16


def normal(*shape: int, seed: int) -> torch.Tensor:
    return random_normal(shape, seed=seed, dtype=FINEST, device=DEVICE)


def queries() -> torch.Tensor:
    return normal(B, 1, H, D, seed=0)


def caches() -> list[torch.Tensor]:
    return [normal(B, KEYS, H, D, seed=seed) for seed in (1, 2)]


def read(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
    return flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=KEYS - 1, causal=True)


def append(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
    new = {"k": q, "v": q}
    return flash_attn_with_kvcache(q, k_cache, v_cache, **new, cache_seqlens=KEYS - 1, causal=True)


def read_by_entry(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
    given = (q, k_cache, v_cache, *[None] * 10, D**-0.5, True, -1, -1, 0.0, True, 0)
    return flash_attn_2_cuda.fwd_kvcache(*given)[0]


def test_a_read_leaves_the_version_and_an_append_moves_it():
    k_cache, v_cache = caches()
    for function in (read, read_by_entry):
        function(queries(), k_cache, v_cache)
        assert (k_cache._version, v_cache._version) == (0, 0)
    append(queries(), k_cache, v_cache)
    assert (k_cache._version, v_cache._version) == (1, 1)


@pytest.mark.parametrize("function", [read, read_by_entry])
def test_a_backward_over_a_cache_lives_through_a_read(function):
    """An append in between is still noticed, instead of giving gradients of other keys."""
    q, (k_cache, v_cache) = queries().requires_grad_(), caches()
    out = flash_attn_func(q, k_cache, v_cache)
    (expected,) = torch.autograd.grad(out.sum(), q, retain_graph=True)
    function(queries(), k_cache, v_cache)
    assert_bitwise_equal(torch.autograd.grad(out.sum(), q, retain_graph=True)[0], expected)
    append(queries(), k_cache, v_cache)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(out.sum(), q)


@backends
def test_a_cache_of_inference_mode_is_read_outside_it(backend):
    q, expected = queries(), read(queries(), *caches())
    with torch.inference_mode():
        made = caches()
        assert_bitwise_equal(read(q, *made), expected)
    assert_bitwise_equal(read(q, *made), expected)
    compiled = torch.compile(read, backend=backend, fullgraph=True)
    assert_bitwise_equal(compiled(q, *made), expected)
    assert_bitwise_equal(compiled(q.requires_grad_(), *made), expected)


@backends
def test_compiled_reads_of_a_shared_prefix(backend):
    """One row for all sequences, by stride 0: nothing is written, so nothing overlaps."""
    q, (k, v) = queries(), [cache[:1].expand(B, -1, -1, -1) for cache in caches()]
    expected = read(q, *(cache.contiguous() for cache in (k, v)))
    assert_bitwise_equal(read(q, k, v), expected)
    assert_bitwise_equal(torch.compile(read, backend=backend, fullgraph=True)(q, k, v), expected)

    def expand_inside(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return read(q, *(cache[:1].expand(B, -1, -1, -1) for cache in (k, v)))

    compiled = torch.compile(expand_inside, backend=backend, fullgraph=True)
    assert_bitwise_equal(compiled(q, *caches()), expected)


@backends
def test_compiled_reads_and_appends_keep_their_order(backend):
    """Read, append, read: the compiler may not move the reads past the write between them."""

    def steps(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor) -> torch.Tensor:
        def all_keys() -> torch.Tensor:
            return flash_attn_with_kvcache(q, k_cache, v_cache)

        return torch.cat((all_keys(), append(q, k_cache, v_cache), all_keys()))

    q, ours, eager = queries(), caches(), caches()
    expected = steps(q, *eager)
    assert not torch.equal(expected[:B], expected[-B:])
    found = torch.compile(steps, backend=backend, fullgraph=True)(q, *ours)
    assert_bitwise_equal(found, expected)
    for cache, wanted in zip(ours, eager, strict=True):
        assert_bitwise_equal(cache, wanted)


def test_export_of_a_read_writes_nothing():
    class Decode(torch.nn.Module):
        def forward(
            self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
        ) -> torch.Tensor:
            return read(q, k_cache, v_cache)

    class DecodeAndAppend(torch.nn.Module):
        def forward(
            self, q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor
        ) -> torch.Tensor:
            return append(q, k_cache, v_cache)

    for module, function, writes in ((Decode(), read, 0), (DecodeAndAppend(), append, 2)):
        inputs = (queries(), *caches())
        program = torch.export.export(module, inputs)
        signature = program.run_decompositions().graph_signature
        assert len(signature.user_inputs_to_mutate) == writes
        expected = function(queries(), *caches())
        assert_bitwise_equal(program.module()(queries(), *caches()), expected)


@pytest.mark.parametrize("missing", ["k", "v", "both"])
def test_a_refused_append_leaves_the_caches(missing):
    """What is said of new keys goes to the op that appends, which refuses what is half said."""
    q, (k_cache, v_cache) = queries(), caches()
    before = [cache.clone() for cache in (k_cache, v_cache)]
    new = {"k": q, "v": q, "rotary_cos": normal(KEYS, 8, seed=5), "rotary_sin": None}
    for name in {"k", "v"} if missing == "both" else {missing}:
        del new[name]
    with pytest.raises(RuntimeError, match=r"^flash_attn: .*; received .*; rule: "):
        flash_attn_with_kvcache(q, k_cache, v_cache, **new, cache_seqlens=3)
    for cache, was in zip((k_cache, v_cache), before, strict=True):
        assert_bitwise_equal(cache, was)
