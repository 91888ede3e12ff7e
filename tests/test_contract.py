"""The row contract's two lemmas, and what must not reach a bit: machine, threads, environment.

Neutral element: a block or segment in which a row sees nothing leaves its state as it was.
Row independence: a row's bits do not depend on the rows that it is computed together with.

All comparisons are on bytes, in deterministic mode; standard mode is the control that differs.
"""

import json
import math
import os
import re
import subprocess
import sys

import golden
import pytest
import torch
from device import DEVICE, DTYPES, FINEST, ON_GPU, WIDEST, page_size
from row_calls import assert_same, rows, run
from strategies import (
    BLOCK,
    SEGMENT,
    Problem,
    autograd,
)

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.determinism import deterministic, forward_partials, reduce_partials
from flash_attn.testing import (
    assert_bitwise_equal,
    bitwise_equal,
    cumulative_lengths,
    page_table,
    paged_rows,
    random_normal,
)

# Keys: two segments, a block and a bit; one block and a bit.
LONG, SHORT = 2 * SEGMENT + BLOCK + 12, BLOCK + 6
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (100, 0)},
    "softcap": {"causal": True, "softcap": 5.0},
    "alibi": {
        "causal": True,
        "alibi_slopes": torch.tensor([0.5, 0.01, 0.125, 0.002], device=DEVICE),
    },
}
PREFIX_FEATURES = [name for name in FEATURES if name != "plain"]  # no row looks ahead
POISONS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "huge": 3e38, "zero": 0.0}


@pytest.fixture(autouse=True)
def deterministic_mode():
    with deterministic():
        yield


# ---- Neutral element: keys that a row does not see ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("feature", PREFIX_FEATURES)
def test_later_keys_are_neutral(feature, dtype):
    """Row i of a prefill has the bytes of row i of a sequence that ends there, wherever that is."""
    q, k, v = Problem((LONG,), (LONG,), 4, 2, 24, dtype).dense()
    whole = run(q, k, v, **FEATURES[feature])
    for end in (1, 7, 64, 65, 511, 512, 513, 700, 1025, 1099):
        begin = max(0, end - 9)
        chunk = run(q[:, begin:end], k[:, :end], v[:, :end], **FEATURES[feature])
        assert_same(chunk, rows(whole, begin, end), f"of rows {begin}..{end}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_before_the_window_are_neutral(dtype):
    """Whole segments and parts of blocks left of the window hold anything finite: same bytes."""
    q, k, v = Problem((40,), (LONG,), 4, 2, 24, dtype).dense()
    expected = run(q, k, v, window_size=(50, 0))
    first_seen = LONG - 40 - 50
    for value in (0.0, 1000.0, -1000.0):
        k[:, :first_seen], v[:, :first_seen] = value, -value
        assert_same(run(q, k, v, window_size=(50, 0)), expected, f"behind {value}")


@pytest.mark.parametrize("feature", PREFIX_FEATURES)
def test_later_rows_without_gradient_are_neutral(feature):
    """dq of a row ends with its own keys; a later query with dout = 0 adds nothing to dk and dv."""
    problem = Problem((LONG,), (LONG,), 4, 2, 24, FINEST)
    tensors, dout = problem.dense(), problem.upstream_gradient(problem.dense()[0])
    dout[:, 600:] = 0.0

    def attend(q, k, v):
        return flash_attn_func(q, k, v, **FEATURES[feature])

    whole = autograd(attend, tensors, dout)
    for end in (600, 640, 1025):
        part = autograd(attend, [x[:, :end] for x in tensors], dout[:, :end])
        assert_same(part, [x[:, :end] for x in whole], f"of the first {end}")
        assert all(torch.count_nonzero(x[:, end:]) == 0 for x in whole)


@pytest.mark.parametrize("dtype", sorted({WIDEST, torch.bfloat16}, key=str, reverse=True), ids=str)
def test_a_zero_keeps_its_sign(dtype):
    """A product that underflows to -0 ends as +0, with and without masked keys behind it."""
    q, k, v = (torch.zeros(1, SHORT, 1, 16, dtype=dtype, device=DEVICE) for _ in range(3))
    q[..., 0], k[:, 0, :, 0] = 1.0, 80.0  # key 0 weighs 1, key 1 about 1e-35
    v[:, 1], v[:, 2:] = -1e-30, 1.0
    dout = torch.full_like(v, 1e-30)
    for end in (2, 17, SHORT):
        tensors = [x[:, :end] for x in (q, k, v)]
        out = run(*tensors, softmax_scale=1.0, causal=True)[0]
        assert_bitwise_equal(out[:, 1:2], torch.zeros_like(out[:, :1]), f"{end} keys")
        dq = autograd(lambda *x: flash_attn_func(*x, causal=True), tensors, dout[:, :end])[0]
        assert not (torch.signbit(dq) & (dq == 0)).any()


# ---- Neutral element: bytes beyond the sequence ----


def poisoned(values, poison):
    """A tensor of the same shape full of one value; `huge` is the dtype's largest."""
    return torch.full_like(values, min(POISONS[poison], torch.finfo(values.dtype).max))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("poison", POISONS)
def test_unused_bytes_reach_no_row(poison, dtype):
    """Page tails, spare pages, unused cache rows, left padding, neighbours in a pack."""
    lengths, s_q = (SEGMENT + 9, 3, 0, 70), 5
    on_device = {"dtype": dtype, "device": DEVICE}
    q = random_normal((4, s_q, 4, 24), seed=0, **on_device)
    parts = [[random_normal((n, 2, 24), seed=s, **on_device) for n in lengths] for s in (1, 2)]
    seqlens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    fill = min(POISONS[poison], torch.finfo(dtype).max)

    def cache(pad, fill):
        caches = []
        for sequences in parts:
            x = torch.full((4, SEGMENT + 88, 2, 24), fill, **on_device)
            for b, keys in enumerate(sequences):
                x[b, pad : pad + len(keys)] = keys
            caches.append(x)
        leftpad = torch.full_like(seqlens, pad)
        options = {"cache_seqlens": seqlens + pad, "cache_leftpad": leftpad if pad else None}
        return flash_attn_with_kvcache(q, *caches, causal=True, return_softmax_lse=True, **options)

    expected = cache(0, 0.0)
    assert expected[0][3].isfinite().all() and torch.count_nonzero(expected[0][3]) > 0
    assert_same(cache(0, fill), expected, "beside unused cache rows")
    assert_same(cache(11, fill), expected, "behind left padding")
    for page in (page_size(1), 48):
        table, num_pages = page_table(lengths, page, seed=page, device=DEVICE)
        pages = [paged_rows(x, table, num_pages, page, fill=fill) for x in parts]
        paged = flash_attn_with_kvcache(
            q, *pages, cache_seqlens=seqlens, block_table=table, causal=True,
            return_softmax_lse=True,
        )  # fmt: skip
        assert_same(paged, expected, f"in pages of {page}")
    for b in range(4):  # everything else in the pack is poison: neighbours before and behind
        packed_k, packed_v = (
            torch.cat([x if n == b else poisoned(x, poison) for n, x in enumerate(sequences)])
            for sequences in parts
        )
        packed_q = torch.cat([x if n == b else poisoned(x, poison) for n, x in enumerate(q)])
        cu_q, cu_k = (cumulative_lengths(x, DEVICE) for x in ([s_q] * 4, lengths))
        out, lse, _ = flash_attn_varlen_func(
            packed_q, packed_k, packed_v, cu_q, cu_k, s_q, max(lengths), causal=True,
            return_attn_probs=True,
        )  # fmt: skip
        mine = slice(b * s_q, (b + 1) * s_q)
        assert_same((out[mine], lse[:, mine]), (expected[0][b], expected[1][b]), f"pack, {b}")


@pytest.mark.parametrize("poison", ["nan", "inf", "huge"])
def test_gradients_beside_poisoned_sequences(poison):
    """dq, dk and dv of a sequence do not notice what its neighbours in the pack hold."""
    lengths = (SHORT, 130, 9)
    problem = Problem(lengths, lengths, 4, 2, 24, FINEST)
    tensors, dout = problem.packed(), problem.upstream_gradient(problem.packed()[0])
    cu = cumulative_lengths(lengths, DEVICE)

    def attend(q, k, v):
        return flash_attn_varlen_func(q, k, v, cu, cu, 130, 130, causal=True)

    expected = autograd(attend, tensors, dout)
    for b in range(3):
        mine = slice(int(cu[b]), int(cu[b + 1]))
        alone = []
        for x in (*tensors, dout):
            alone.append(poisoned(x, poison))
            alone[-1][mine] = x[mine]
        actual = autograd(attend, alone[:3], alone[3])
        assert_same([x[mine] for x in actual], [x[mine] for x in expected], f"of sequence {b}")


# ---- Row independence ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("s_q", [2, 5, 6, 7, 13, 100, 211])
def test_rows_in_any_order(s_q, dtype):
    """Without a mask, permuted queries give permuted bytes: out, lse and dq."""
    problem = Problem((s_q,), (SEGMENT + SHORT,), 4, 2, 24, dtype)
    q, k, v = problem.dense()
    dout = problem.upstream_gradient(q)
    order = torch.randperm(s_q, generator=torch.Generator().manual_seed(s_q))
    out, lse = run(q, k, v)
    assert_same(run(q[:, order], k, v), (out[:, order], lse[:, :, order]), "permuted")
    dq = autograd(flash_attn_func, (q, k, v), dout)[0]
    moved = autograd(flash_attn_func, (q[:, order], k, v), dout[:, order])[0]
    assert_bitwise_equal(moved, dq[:, order], "dq")


@pytest.mark.parametrize("stranger", [0.0, 1e4, math.inf, math.nan])
def test_rows_among_strangers(stranger):
    """A row keeps its bytes when every other row and every other head is replaced, even by NaN."""
    problem = Problem((30,), (SEGMENT + SHORT,), 6, 2, 24, FINEST)
    q, k, v = problem.dense()
    dout = problem.upstream_gradient(q)
    expected = run(q, k, v, causal=True)
    dq = autograd(lambda *x: flash_attn_func(*x, causal=True), (q, k, v), dout)[0]
    for row, head in ((0, 0), (3, 1), (11, 2), (12, 5), (29, 3)):
        others, other_dout = torch.full_like(q, stranger), torch.full_like(dout, stranger)
        others[:, row, head], other_dout[:, row, head] = q[:, row, head], dout[:, row, head]
        out, lse = run(others, k, v, causal=True)
        assert_bitwise_equal(out[0, row, head], expected[0][0, row, head], f"out {row}, {head}")
        assert_bitwise_equal(lse[0, head, row], expected[1][0, head, row], f"lse {row}, {head}")
        moved = autograd(lambda *x: flash_attn_func(*x, causal=True), (others, k, v), other_dout)[0]
        assert_bitwise_equal(moved[0, row, head], dq[0, row, head], f"dq {row}, {head}")


# ---- What must not reach a bit ----

HASHING = """
import json, sys, torch
sys.path[:0] = [{tests!r}]
import test_contract
print(json.dumps([torch.ops.flash_attn_native.cpu_isa(), test_contract.hashes_of_calls()]))
"""
SLOW = re.compile(r"(prefill|pack)-\w+-d(96|128|192|256)")  # gradients of wide heads


def hashes_of_calls():
    """By name, of golden.py's calls, of dropout, whose seed PyTorch draws, and of huge scores."""
    calls = {name: call for name, call in golden.calls().items() if not SLOW.match(name)}
    for dtype in DTYPES:
        q, k, v = golden.qkv(90, SEGMENT + SHORT, 255, dtype)

        def dropout(q=q, k=k, v=v):
            torch.manual_seed(0)
            return flash_attn_func(q, k, v, 0.2, causal=True, return_attn_probs=True)[:2]

        calls[f"dropout-{dtype}"] = dropout
        calls[f"huge-{dtype}"] = lambda q=q * 1e3, k=k * 1e3, v=v: run(q, k, v)
    return {name: golden.hash_of(call) for name, call in calls.items()}


@pytest.mark.cpu_only
def test_instruction_sets_agree():
    """generic, AVX2 and AVX-512 code give the same bytes, each in a process of its own."""
    found = {}
    for isa in ("generic", "avx2", "avx512"):
        program = HASHING.format(tests=os.path.dirname(__file__))
        environment = os.environ | {"FLASH_ATTN_CPU_ISA": isa}
        result = subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True
        )
        if "this machine cannot run the kernels asked for" in result.stderr:
            continue
        assert result.returncode == 0, result.stderr
        used, found[isa] = json.loads(result.stdout)
        assert used == isa
    if len(found) == 1:
        pytest.skip("this machine runs the generic code only")
    assert all(hashes == found["generic"] for hashes in found.values())


@pytest.mark.cpu_only
def test_an_unknown_instruction_set_is_refused():
    """FLASH_ATTN_CPU_ISA is obeyed or refused: nothing falls back in silence."""
    program = (
        "import torch, flash_attn as f; x = torch.ones(1, 1, 1, 8); f.flash_attn_func(x, x, x)"
    )
    environment = os.environ | {"FLASH_ATTN_CPU_ISA": "sse9"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert "received FLASH_ATTN_CPU_ISA=sse9; rule: avx512, avx2 or generic" in result.stderr


@pytest.mark.cpu_only
@pytest.mark.parametrize("feature", FEATURES)
def test_threads_do_not_matter(feature):
    """1, 2, 3 and 5 threads: a prefill with gradients, and a decode that is cut into segments."""
    problem = Problem((SHORT, SHORT), (LONG, LONG), 4, 2, 24, FINEST)
    q, k, v = (x.requires_grad_() for x in problem.dense())
    dout = problem.upstream_gradient(q)
    expected = None
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        out, lse = run(q, k, v, **FEATURES[feature])
        grads = torch.autograd.grad(out, (q, k, v), dout)
        decoded = run(q[:1, -1:], k[:1], v[:1], **FEATURES[feature])
        result = (out, lse, *grads, *decoded)
        expected = expected or result
        for n, (actual, first) in enumerate(zip(result, expected, strict=True)):
            assert_bitwise_equal(actual, first, f"result {n} on {threads} threads")


@pytest.mark.cpu_only
def test_flushing_subnormals_does_not_matter():
    """torch.set_flush_denormal(True) changes PyTorch's own products, and none of ours."""
    q, k, v = (torch.zeros(1, SHORT, 2, 16) for _ in range(3))
    q[..., 0] = 1.0
    k[:, 0, :, 0] = 87.5  # the other keys weigh 2^-126.2: subnormal
    v[:, 1:], v[:, 0] = 1e30, 1e-39
    tiny = torch.rand(1, 2, 2, 16) * 1e-39
    dout = torch.full_like(q, 1e-39)

    def everything():
        out, lse = run(q, k, v, softmax_scale=1.0)
        tiny_out, _ = run(q, k, tiny.expand(1, SHORT // 2, 2, 2, 16).reshape(v.shape))
        grads = autograd(lambda *x: flash_attn_func(*x, softmax_scale=1.0), (q, k, v), dout)
        partials = forward_partials(q, k, v, softmax_scale=1.0)
        return out, lse, tiny_out, *grads, *reduce_partials(partials, torch.float32)

    expected = everything()
    smallest_normal = torch.finfo(torch.float32).tiny
    assert ((expected[2] != 0) & (expected[2].abs() < smallest_normal)).any()
    assert (expected[0] > 1e-9).any(), "a subnormal weight must be visible in the result"
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormals")
    try:
        assert (torch.tensor([1e-39]) * 1.0).item() == 0.0, "the control: PyTorch does flush"
        flushed = [x.clone() for x in everything()]
    finally:
        torch.set_flush_denormal(False)
    for n, (actual, wanted) in enumerate(zip(flushed, expected, strict=True)):
        assert_bitwise_equal(actual, wanted, f"result {n}")


def test_standard_mode_is_the_control():
    """Standard mode does depend on the batch, so the comparisons in this file can fail."""
    # A GPU that has room cuts a row into blocks; 16 bits of out hide most differences, lse fewer.
    b, s_k, h = (32, 4096, 16) if ON_GPU else (8, LONG, 2)
    q, k, v = Problem((1,) * b, (s_k,) * b, h, h, 32, FINEST).dense()
    with deterministic(False):
        together, alone = run(q, k, v), run(q[:1], k[:1], v[:1])
    assert not all(bitwise_equal(x[:1], y) for x, y in zip(together, alone, strict=True))
    together, alone = run(q, k, v), run(q[:1], k[:1], v[:1])
    assert_same(alone, (together[0][:1], together[1][:1]))
