"""On a GPU: streams, graphs, compiled code, company on the device, and very long sequences."""

import pytest
import torch
from device import DEVICE
from row_calls import assert_same

from flash_attn import determinism, flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.reference import assert_accurate, attention
from flash_attn.testing import assert_bitwise_equal, bytes_of, cumulative_lengths

pytestmark = pytest.mark.gpu

S, D = 1100, 128


@pytest.fixture(autouse=True)
def deterministic_mode():
    determinism.set_deterministic(True)


def normal(*shape, dtype=torch.bfloat16):
    return torch.randn(*shape, device=DEVICE, dtype=dtype)


def leaves(b=2, s=S, h_q=4, h_kv=2, d=D):
    """q, k, v to differentiate, and dout."""
    tensors = [normal(b, s, h, d).requires_grad_() for h in (h_q, h_kv, h_kv)]
    return tensors, normal(b, s, h_q, d)


def there_and_back(inputs, dout):
    """out, dq, dk, dv."""
    out = flash_attn_func(*inputs, causal=True)
    return out.detach(), *torch.autograd.grad(out, inputs, dout)


def assert_same_results(actual, expected):
    for name, a, e in zip(("out", "dq", "dk", "dv"), actual, expected, strict=True):
        assert_bitwise_equal(a, e, name)


# ---- Streams and graphs ----


def test_kernels_run_on_the_current_stream():
    """Inputs arrive late on another stream: a kernel anywhere else would read what lay there.

    The control reads them at once, from the default stream, and finds the old values.
    """
    inputs, dout = leaves()
    expected = there_and_back(inputs, dout)
    late = [torch.zeros_like(x).requires_grad_() for x in inputs]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(400_000_000)  # cycles: a few tenths of a second
        with torch.no_grad():
            for x, values in zip(late, inputs, strict=True):
                x.copy_(values)
        results = there_and_back(late, dout)
    too_early = late[0].detach().clone()
    side.synchronize()
    assert torch.count_nonzero(too_early) == 0
    assert_same_results(results, expected)


def test_decode_runs_on_the_current_stream():
    """The same for an append: new keys arrive late."""
    q, k, v = (normal(4, 1, h, D) for h in (4, 2, 2))
    caches = [normal(4, 1100, 2, D) for _ in "kv"]
    lengths = torch.tensor([1099, 70, 1024, 0], dtype=torch.int32, device=DEVICE)
    late_caches = [x.clone() for x in caches]
    expected = flash_attn_with_kvcache(q, *caches, k, v, cache_seqlens=lengths, causal=True)
    late_k, side = torch.zeros_like(k), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(200_000_000)
        late_k.copy_(k)
        out = flash_attn_with_kvcache(
            q, *late_caches, late_k, v, cache_seqlens=lengths, causal=True
        )
    side.synchronize()
    assert_bitwise_equal(out, expected)
    assert_bitwise_equal(late_caches[0], caches[0])


def test_a_graph_of_forward_and_backward():
    """Captured once, replayed on other inputs: the bytes of eager calls."""
    inputs, dout = leaves()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what the first call sets up must not be captured
        there_and_back(inputs, dout)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = there_and_back(inputs, dout)
    for _ in range(3):
        with torch.no_grad():
            for x in (*inputs, dout):
                x.copy_(torch.randn_like(x))
        graph.replay()
        assert_same_results(captured, there_and_back(inputs, dout))


def test_a_graph_of_a_pack():
    """The lengths of the pack are read when the graph is replayed, too."""
    q, k, v = (normal(S, h, D) for h in (4, 2, 2))
    cu = cumulative_lengths((S - 300, 300), DEVICE)

    def attend():
        return flash_attn_varlen_func(q, k, v, cu, cu, S, S, causal=True)

    attend()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attend()
    for first in (0, 1, 64, 513, S):
        cu[1] = first
        graph.replay()
        assert_bitwise_equal(out, attend(), f"{first} rows first")


@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 100])
def test_compiled_code_gives_the_bytes_of_eager_calls(d):
    """The default backend, in one graph; forward and backward."""
    torch.compiler.reset()
    inputs, dout = leaves(d=d)
    compiled = torch.compile(flash_attn_func, fullgraph=True)
    out = compiled(*inputs, causal=True)
    results = out.detach(), *torch.autograd.grad(out, inputs, dout)
    assert_same_results(results, there_and_back(inputs, dout))


# ---- Company on the device ----

REPEATS = 1000


class Repeats:
    """Compares results with the first ones on the device, without waiting for it."""

    def __init__(self, first):
        self.first = [bytes_of(x) for x in first]
        self.differing = torch.zeros((), dtype=torch.int64, device=DEVICE)

    def add(self, results):
        for first, x in zip(self.first, results, strict=True):
            self.differing += (bytes_of(x) != first).sum()


@pytest.mark.parametrize("b,s,d", [(1, 400, 64), (2, 700, 128)])
def test_a_thousand_repeats_give_one_set_of_bytes(b, s, d):
    """Forward and backward, while matrix products on a second stream take turns with them."""
    inputs, dout = leaves(b, s, d=d)
    repeats = Repeats(there_and_back(inputs, dout))
    company, a = torch.cuda.Stream(), normal(2048, 2048)
    torch.cuda.synchronize()
    for _ in range(REPEATS):
        with torch.cuda.stream(company):
            torch.mm(a, a)
        repeats.add(there_and_back(inputs, dout))
    torch.cuda.synchronize()
    assert repeats.differing.item() == 0


def test_a_thousand_decodes_give_one_set_of_bytes():
    """Many pieces of few rows, whose folds wait for each other, beside the same company."""
    q, k, v = normal(2, 1, 8, D), normal(2, 9000, 2, D), normal(2, 9000, 2, D)
    lengths = torch.tensor([9000, 4097], dtype=torch.int32, device=DEVICE)

    def decode():
        return flash_attn_with_kvcache(
            q, k, v, cache_seqlens=lengths, causal=True, return_softmax_lse=True
        )

    repeats = Repeats(decode())
    company, a = torch.cuda.Stream(), normal(2048, 2048)
    torch.cuda.synchronize()
    for _ in range(REPEATS):
        with torch.cuda.stream(company):
            torch.mm(a, a)
        repeats.add(decode())
    torch.cuda.synchronize()
    assert repeats.differing.item() == 0


def test_control_one_differing_repeat_is_counted():
    """A single bit of a single element, in one repeat of three."""
    first = (normal(2, 5), normal(3))
    repeats = Repeats(first)
    repeats.add(first)
    spoilt = first[0].clone()
    spoilt.view(torch.int16)[1, 2] ^= 1
    repeats.add((spoilt, first[1]))
    repeats.add(first)
    assert repeats.differing.item() == 1


# ---- Very long sequences ----


def assert_accurate_by_sequence(results, q, k, v, **options):
    """Against float64 and PyTorch in bf16, one sequence after the other: memory for one of them."""
    for b, (out, lse) in enumerate(zip(*results, strict=True)):
        one = [x[b : b + 1] for x in (q, k, v)]
        true_out, true_lse = attention(*one, **options)
        plain_out, _ = attention(*one, dtype=q.dtype, **options)
        _, plain_lse = attention(*one, dtype=torch.float32, **options)
        # A score is rounded to fp32 more than once, and lse follows it.
        noise = 2.0**-22 * (1.0 + true_lse.abs().max().item())
        assert_accurate(out[None], true_out, plain_out, label=f"out of sequence {b}")
        assert_accurate(lse[None], true_lse, plain_lse, atol=noise, label=f"lse of sequence {b}")


@pytest.mark.parametrize(
    "b,s_q,s_k,h_q,h_kv,d",
    [(1, 1, 131072, 8, 2, 128), (1, 5, 131072, 2, 2, 64), (16, 1, 100000, 4, 1, 128)],
)
@pytest.mark.parametrize("deterministic", [True, False])
def test_accuracy_of_long_caches(deterministic, b, s_q, s_k, h_q, h_kv, d):
    """Across all rungs of the segment ladder; a key near the end weighs as much as thousands."""
    determinism.set_deterministic(deterministic)
    q, k, v = normal(b, s_q, h_q, d), normal(b, s_k, h_kv, d), normal(b, s_k, h_kv, d)
    k[:, -9] = q[:, -1, :: h_q // h_kv]
    results = flash_attn_with_kvcache(q, k, v, causal=True, return_softmax_lse=True)
    assert_accurate_by_sequence(results, q, k, v, causal=True)


def test_long_ragged_caches_are_their_sequences_alone():
    """16 x 100000 keys of one head, in use to different ends: bytes of each, decoded alone."""
    q, k, v = normal(16, 1, 4, D), normal(16, 100_000, 1, D), normal(16, 100_000, 1, D)
    lengths = [100_000, 99_999, 65_536, 65_537, 16_384, 16_385, 512, 513, 1, 77] + [80_000] * 6
    cache_seqlens = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    results = flash_attn_with_kvcache(
        q, k, v, cache_seqlens=cache_seqlens, causal=True, return_softmax_lse=True
    )
    for n, length in enumerate(lengths[:10]):
        alone = flash_attn_func(
            *(q[n : n + 1], k[n : n + 1, :length], v[n : n + 1, :length]),
            causal=True,
            return_attn_probs=True,
        )[:2]
        assert_same(alone, [x[n : n + 1] for x in results], f"of {length} keys")


def test_long_gradients():
    """64 queries at the end of 100,000 keys: dq sums over all of them."""
    shapes = ((1, 64, 2, 64), (1, 100_000, 1, 64), (1, 100_000, 1, 64))
    q, k, v = (normal(*shape).requires_grad_() for shape in shapes)
    dout = normal(1, 64, 2, 64)
    gradients = torch.autograd.grad(flash_attn_func(q, k, v, causal=True), (q, k, v), dout)
    truth, plain = (
        torch.autograd.grad(out, (q, k, v), dout.to(out.dtype))
        for out in (attention(q, k, v, dtype=t, causal=True)[0] for t in (torch.float64, q.dtype))
    )
    for name, ours, true, yard in zip(("dq", "dk", "dv"), gradients, truth, plain, strict=True):
        assert_accurate(ours, true, yard, label=name)


def test_rows_beyond_two_to_the_31_elements():
    """A cache so large that 32-bit offsets would wrap: its last row, alone and in its place."""
    q, k, v = (normal(1, s, h, 256) for s, h in ((1, 4), (900, 4), (900, 4)))
    rows = 2**31 // (262_144 * 4 * 256) + 2
    caches = [torch.empty(rows, 262_144, 4, 256, dtype=q.dtype, device=DEVICE) for _ in "kv"]
    for cache, values in zip(caches, (k, v), strict=True):
        cache[-1, :900] = values[0]
    assert caches[0].numel() > 2**31 and caches[0].stride(0) * (rows - 1) >= 2**31
    index, length = (torch.tensor([n], dtype=torch.int32, device=DEVICE) for n in (rows - 1, 900))
    out = flash_attn_with_kvcache(
        q, *caches, cache_seqlens=length, cache_batch_idx=index, causal=True
    )
    assert_bitwise_equal(out, flash_attn_func(q, k, v, causal=True))
