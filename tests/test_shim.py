"""flash_attn_2_cuda: upstream's raw entry points give the bytes of the public functions.

Every call below is positional, as the compiled module's would be; `ORDER` states that order.
"""

import inspect
import subprocess
import sys

import pytest
import torch
from device import DEVICE, FINEST, page_size

import flash_attn_2_cuda as shim
from flash_attn import (
    flash_attn_func,
    flash_attn_interface,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn.testing import assert_bitwise_equal, cumulative_lengths, random_normal

ORDER = {
    "fwd": "q k v out alibi_slopes p_dropout softmax_scale is_causal window_size_left "
    "window_size_right softcap return_softmax gen",
    "varlen_fwd": "q k v out cu_seqlens_q cu_seqlens_k seqused_k leftpad_k block_table "
    "alibi_slopes max_seqlen_q max_seqlen_k p_dropout softmax_scale zero_tensors is_causal "
    "window_size_left window_size_right softcap return_softmax gen",
    "bwd": "dout q k v out softmax_lse dq dk dv alibi_slopes p_dropout softmax_scale is_causal "
    "window_size_left window_size_right softcap deterministic gen rng_state",
    "varlen_bwd": "dout q k v out softmax_lse dq dk dv cu_seqlens_q cu_seqlens_k alibi_slopes "
    "max_seqlen_q max_seqlen_k p_dropout softmax_scale zero_tensors is_causal window_size_left "
    "window_size_right softcap deterministic gen rng_state",
    "fwd_kvcache": "q kcache vcache k v seqlens_k rotary_cos rotary_sin cache_batch_idx leftpad_k "
    "block_table alibi_slopes out softmax_scale is_causal window_size_left window_size_right "
    "softcap is_rotary_interleaved num_splits",
}

# One sequence of one query, one without keys, one that crosses three blocks of keys.
LENGTHS_Q, LENGTHS_K = [1, 5, 130], [70, 0, 201]
B, S_Q, S_K, H_Q, H_KV, D = 2, 37, 150, 4, 2, 32
SCALE = D**-0.5

# (causal, window, softcap, with ALiBi, dropout)
FEATURES = {
    "plain": (False, (-1, -1), 0.0, False, 0.0),
    "causal": (True, (-1, -1), 0.0, False, 0.0),
    "window, softcap": (False, (40, 9), 15.0, False, 0.0),
    "causal, alibi, dropout": (True, (-1, 0), 0.0, True, 0.25),
}
features = pytest.mark.parametrize("case", FEATURES.values(), ids=FEATURES.keys())


def normal(shape, seed: int, dtype: torch.dtype) -> torch.Tensor:
    return random_normal(shape, seed=seed, dtype=dtype, device=DEVICE)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def offsets_of(seqlens_q: list[int], seqlens_k: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return cumulative_lengths(seqlens_q, DEVICE), cumulative_lengths(seqlens_k, DEVICE)


def inputs(pack: bool, dtype: torch.dtype = torch.bfloat16) -> list[torch.Tensor]:
    """q, k, v that require gradients, and dout."""
    rows_q, rows_k = ((sum(LENGTHS_Q),), (sum(LENGTHS_K),)) if pack else ((B, S_Q), (B, S_K))
    shapes = [(*rows_q, H_Q, D), (*rows_k, H_KV, D), (*rows_k, H_KV, D), (*rows_q, H_Q, D)]
    q, k, v, dout = (normal(s, seed=i, dtype=dtype) for i, s in enumerate(shapes))
    return [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout]


def slopes(wanted: bool) -> torch.Tensor | None:
    return torch.tensor([0.5, 0.25, 0.125, 0.0625], device=DEVICE) if wanted else None


def buffer_like(x: torch.Tensor) -> torch.Tensor:
    """A view with rows of its own stride, full of NaN: each of its elements has to be written."""
    return x.new_full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))[..., : x.shape[-1]].detach()


@pytest.mark.parametrize("entry", ORDER)
def test_arguments_come_in_upstreams_order(entry):
    assert list(inspect.signature(getattr(shim, entry)).parameters) == ORDER[entry].split()


@features
def test_dense_forward_and_backward(case):
    causal, window, softcap, alibi, dropout_p = case
    q, k, v, dout = inputs(pack=False)
    alibi_slopes, want_s = slopes(alibi), dropout_p > 0
    torch.manual_seed(1)
    expected, lse, s_dmask = flash_attn_func(
        q, k, v, dropout_p, None, causal, window, softcap, alibi_slopes, False, True
    )
    gradients = torch.autograd.grad(expected, (q, k, v), dout)

    for out in (None, buffer_like(q)):
        torch.manual_seed(1)
        args = (alibi_slopes, dropout_p, SCALE, causal, *window, softcap)
        results = shim.fwd(q, k, v, out, *args, want_s, None)
        assert type(results) is list and len(results) == 4
        assert out is None or results[0] is out
        assert not any(result.requires_grad for result in results)
        for result, wanted in zip(results, (expected, lse, s_dmask), strict=False):
            assert_bitwise_equal(result, wanted)

    for dq, dk, dv in ((None,) * 3, (buffer_like(q), buffer_like(k), buffer_like(v))):
        args = (alibi_slopes, dropout_p, SCALE, causal, *window, softcap, False, None, results[3])
        results_bwd = shim.bwd(dout, q, k, v, results[0], results[1], dq, dk, dv, *args)
        assert type(results_bwd) is list and len(results_bwd) == 4
        assert dq is None or all(a is b for a, b in zip(results_bwd, (dq, dk, dv), strict=False))
        for result, wanted in zip(results_bwd, gradients, strict=False):
            assert_bitwise_equal(result, wanted)
        assert results_bwd[3].shape == (B, H_Q, 128) and results_bwd[3].dtype == torch.float32


@pytest.mark.parametrize("moved", ["dout", "q", "k", "v", "out", "dq", "dk", "dv"])
def test_backward_takes_rows_of_any_address(moved):
    """One tensor at a time, whose rows begin two bytes behind where the others' do."""
    q, k, v, dout = (x.detach() for x in inputs(pack=False))
    shape = (SCALE, True, -1, -1, 0.0)
    out, lse, _, rng_state = shim.fwd(q, k, v, None, None, 0.0, *shape, False, None)
    tensors = {"dout": dout, "q": q, "k": k, "v": v, "out": out}
    tensors |= {f"d{name}": torch.empty_like(tensors[name]) for name in "qkv"}

    def gradients(dout, q, k, v, out, dq, dk, dv):
        args = (None, 0.0, *shape, False, None, rng_state)
        return [x.clone() for x in shim.bwd(dout, q, k, v, out, lse, dq, dk, dv, *args)]

    expected = gradients(**tensors)
    x = tensors[moved]
    wide = x.new_empty(*x.shape[:-1], x.shape[-1] + 8)
    tensors[moved] = wide[..., 1 : 1 + x.shape[-1]].copy_(x)
    assert tensors[moved].data_ptr() % 16 == 2
    for result, wanted in zip(gradients(**tensors), expected, strict=True):
        assert_bitwise_equal(result, wanted)


@features
def test_varlen_forward_and_backward(case):
    causal, window, softcap, alibi, dropout_p = case
    q, k, v, dout = inputs(pack=True)
    alibi_slopes, want_s = slopes(alibi), dropout_p > 0
    offsets = offsets_of(LENGTHS_Q, LENGTHS_K)
    longest = max(LENGTHS_Q), max(LENGTHS_K)
    torch.manual_seed(1)
    expected, lse, s_dmask = flash_attn_varlen_func(
        *(q, k, v, *offsets, *longest),
        *(dropout_p, None, causal, window, softcap, alibi_slopes, False, True),
    )
    gradients = torch.autograd.grad(expected, (q, k, v), dout)

    for out in (None, buffer_like(q)):
        torch.manual_seed(1)
        args = (*longest, dropout_p, SCALE, False, causal, *window, softcap, want_s, None)
        results = shim.varlen_fwd(q, k, v, out, *offsets, None, None, None, alibi_slopes, *args)
        assert type(results) is list and len(results) == 4
        assert out is None or results[0] is out
        assert not any(result.requires_grad for result in results)
        for result, wanted in zip(results, (expected, lse, s_dmask), strict=False):
            assert_bitwise_equal(result, wanted)

    for dq, dk, dv in ((None,) * 3, (buffer_like(q), buffer_like(k), buffer_like(v))):
        args = (*longest, dropout_p, SCALE, False, causal, *window, softcap, False, None)
        results_bwd = shim.varlen_bwd(
            *(dout, q, k, v, results[0], results[1], dq, dk, dv, *offsets, alibi_slopes),
            *(*args, results[3]),
        )
        assert type(results_bwd) is list and len(results_bwd) == 4
        assert dq is None or all(a is b for a, b in zip(results_bwd, (dq, dk, dv), strict=False))
        for result, wanted in zip(results_bwd, gradients, strict=False):
            assert_bitwise_equal(result, wanted)
        assert results_bwd[3].shape == (H_Q, sum(LENGTHS_Q) + 128 * len(LENGTHS_Q))


def test_varlen_forward_uses_the_keys_that_seqused_and_leftpad_leave():
    """Equal to a pack that holds those keys only."""
    q, k, v, _ = inputs(pack=True)
    used, pad = [60, 0, 170], [3, 0, 65]
    starts = cumulative_lengths(LENGTHS_K).tolist()
    rows = torch.cat([torch.arange(s + p, s + u) for s, u, p in zip(starts, used, pad)])  # noqa: B905
    kept = [u - p for u, p in zip(used, pad, strict=True)]

    def run(k, v, seqlens_k, seqused_k, leftpad_k):
        offsets = offsets_of(LENGTHS_Q, seqlens_k)
        return shim.varlen_fwd(
            *(q, k, v, None, *offsets, seqused_k, leftpad_k, None, None),
            *(max(LENGTHS_Q), max(LENGTHS_K), 0.0, SCALE, False, True, -1, -1, 0.0, False, None),
        )

    picked = run(k, v, LENGTHS_K, int32(*used), int32(*pad))
    alone = run(k[rows], v[rows], kept, None, None)
    assert_bitwise_equal(picked[0], alone[0])
    assert_bitwise_equal(picked[1], alone[1])


@pytest.mark.parametrize("paged", [False, True], ids=["rows", "pages"])
def test_kvcache_appends_and_attends(paged):
    """Two new keys each, rotated; rows 2 and 0 of the cache, or its pages in random order."""
    capacity, page, s_new, dtype = 192, page_size(24), 2, torch.float16
    q, k, v = (normal((B, s_new, h, D), seed=h, dtype=dtype) for h in (H_Q, H_KV, H_KV))
    if paged:
        order = torch.randperm(2 * capacity // page, generator=torch.Generator().manual_seed(0))
        block_table, rows = int32(*order.tolist()).view(B, -1), None
        cache = normal((len(order), page, H_KV, D), seed=5, dtype=dtype)
    else:
        block_table, rows = None, int32(2, 0)
        cache = normal((3, capacity, H_KV, D), seed=5, dtype=dtype)
    pad = None if paged else int32(0, 3)
    seqlens = int32(150, 31)
    angle = normal((capacity, D // 2), seed=6, dtype=torch.float32)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)

    k_cache, v_cache = cache.clone(), cache.clone()
    expected, lse = flash_attn_with_kvcache(
        *(q, k_cache, v_cache, k, v, cos, sin, seqlens, rows, pad, block_table, None),
        *(True, (70, -1), 0.0, False, slopes(True), 0, True),
    )
    for out in (None, buffer_like(q)):
        k_mine, v_mine = cache.clone(), cache.clone()
        results = shim.fwd_kvcache(
            *(q, k_mine, v_mine, k, v, seqlens, cos, sin, rows, pad, block_table, slopes(True)),
            *(out, SCALE, True, 70, -1, 0.0, False, 0),
        )
        assert type(results) is list and len(results) == 2
        assert out is None or results[0] is out
        assert_bitwise_equal(results[0], expected)
        assert_bitwise_equal(results[1], lse)
        assert_bitwise_equal(k_mine, k_cache)
        assert_bitwise_equal(v_mine, v_cache)
    assert not torch.equal(k_cache, cache)


def minimal_call(entry: str, replaced: dict[str, object]) -> list[object]:
    """Arguments for a call of `entry` that succeeds, but for what is replaced."""
    pack = entry.startswith("varlen")
    q, k, v, dout = inputs(pack, FINEST)
    lse = torch.zeros((H_Q, len(q)) if pack else (B, H_Q, S_Q), device=DEVICE)
    names = ["q", "k", "v", "dout", "softmax_lse", "kcache", "vcache"]
    tensors = (q, k, v, dout, lse, k.detach().clone(), v.detach().clone())
    given = dict(zip(names, tensors, strict=True))
    given |= {"softmax_scale": SCALE, "p_dropout": 0.0, "softcap": 0.0, "num_splits": 0}
    given |= {"window_size_left": -1, "window_size_right": -1, "is_rotary_interleaved": True}
    switches = ("is_causal", "return_softmax", "zero_tensors", "deterministic")
    given |= dict.fromkeys(switches, False)
    for side, lengths in (("q", LENGTHS_Q), ("k", LENGTHS_K)):
        given[f"cu_seqlens_{side}"] = cumulative_lengths(lengths, DEVICE)
        given[f"max_seqlen_{side}"] = max(lengths)
    if entry.endswith("bwd"):
        given["out"] = q
    if entry == "fwd_kvcache":  # appends, so that a refusal has something to leave alone
        seqlens_k = int32(3, 100)
        given |= {"k": k[:, :2], "v": v[:, :2], "seqlens_k": seqlens_k}
    given |= replaced
    return [given.get(name) for name in ORDER[entry].split()]


@pytest.mark.parametrize("entry", ["fwd", "varlen_fwd", "bwd", "varlen_bwd"])
def test_a_generator_is_refused(entry):
    getattr(shim, entry)(*minimal_call(entry, {}))
    with pytest.raises(RuntimeError, match="`generator` argument is no longer supported"):
        getattr(shim, entry)(*minimal_call(entry, {"gen": torch.Generator()}))


@pytest.mark.parametrize("entry", ["fwd", "varlen_fwd", "fwd_kvcache"])
def test_an_out_that_does_not_fit_is_refused_before_anything_is_written(entry):
    arguments = minimal_call(entry, {})
    q = arguments[0].detach()
    caches = [a for a, name in zip(arguments, ORDER[entry].split(), strict=True) if "cache" in name]
    before = [None if cache is None else cache.clone() for cache in caches]
    place = ORDER[entry].split().index("out")
    for out in (q[:1].clone(), q.to(torch.bfloat16)):
        arguments[place] = out
        with pytest.raises(RuntimeError, match=r"out.* must"):
            getattr(shim, entry)(*arguments)
    for cache, copy in zip(caches, before, strict=True):
        assert cache is None or torch.equal(cache, copy)


def test_either_module_can_be_imported_first():
    """The interface offers the shim under upstream's name; the shim knows only what both call."""
    assert flash_attn_interface.flash_attn_gpu is shim
    program = (
        "import flash_attn_2_cuda; import flash_attn.flash_attn_interface as interface; "
        "assert interface.flash_attn_gpu is flash_attn_2_cuda"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize("zero_tensors", [False, True])
def test_zero_tensors_clears_what_no_sequence_covers(zero_tensors):
    """Rows 7 to 9 of the pack belong to nobody: a caller's dq keeps them unless told otherwise."""
    q = normal((10, 2, 16), seed=0, dtype=FINEST)
    offsets = int32(0, 4, 7)
    scoring = (0.0, 0.25, True, -1, -1, 0.0, None)
    forward, backward = (
        flash_attn_interface._flash_attn_varlen_forward,
        flash_attn_interface._flash_attn_varlen_backward,
    )
    out, lse, _, rng_state = forward(q, q, q, offsets, offsets, 4, 4, *scoring)
    gradients = [torch.full_like(q, 9.0) for _ in "qkv"]
    packing = (offsets, offsets, 4, 4)
    backward(q, q, q, q, out, lse, *gradients, *packing, *scoring, False, rng_state, zero_tensors)
    for gradient in gradients:
        assert (gradient[7:] == (0.0 if zero_tensors else 9.0)).all()
    assert (out[7:] == 0).all() and (lse[:, 7:] == torch.inf).all()


def test_maybe_contiguous_takes_none():
    x = torch.zeros(4, 6)
    assert flash_attn_interface.maybe_contiguous(None) is None
    assert flash_attn_interface.maybe_contiguous(x) is x
    assert flash_attn_interface.maybe_contiguous(x.T).is_contiguous()
