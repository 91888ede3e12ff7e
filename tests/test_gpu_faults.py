"""Faults in index tensors that nobody reads on the host: raised late, by name, and once.

test_gpu_bounds.py has every fault; here is when and how it is raised.
"""

import pytest
import torch
from device import DEVICE

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.testing import random_normal

pytestmark = pytest.mark.gpu

PAGE, B, H, D = 64, 3, 2, 64


def rows(*shape, seed=0):
    return random_normal(shape, seed=seed, dtype=torch.bfloat16, device=DEVICE)


def cache():
    """q, a paged cache of 12 pages, their table, and lengths of 200, 70 and 130 keys."""
    table = torch.arange(12, dtype=torch.int32, device=DEVICE).view(B, 4)
    lengths = torch.tensor([200, 70, 130], dtype=torch.int32, device=DEVICE)
    k, v = (rows(12, PAGE, H, D, seed=n) for n in (1, 2))
    return rows(B, 1, H, D), k, v, table, lengths


def decode(q, k, v, table, lengths):
    return flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths, block_table=table)


def test_the_next_call_raises_it_once_and_names_everything():
    tensors = cache()
    expected = decode(*tensors)
    tensors[3][1, 1] = 12
    decode(*tensors)
    torch.cuda.synchronize()
    words = (
        r"block_table names a page outside the cache, in an earlier call of "
        r"flash_attn_with_kvcache on this GPU.*"
        r"received row-major, block_table\[5\] = 12; rule: 0 <= page"
    )
    with pytest.raises(RuntimeError, match=words):
        decode(*tensors)
    tensors[3][1, 1] = 5
    assert torch.equal(decode(*tensors), expected), "raised once, and the call is as good as ever"
    flash_attn.check_device()


@pytest.mark.parametrize("call", ["dense", "varlen", "backward", "append"])
def test_any_call_raises_it(call):
    tensors = cache()
    x = rows(1, 20, H, D).requires_grad_()
    out = flash_attn_func(x, x, x)
    cu = torch.tensor([0, 20], dtype=torch.int32, device=DEVICE)
    tensors[4][2] = 5000
    decode(*tensors)
    torch.cuda.synchronize()
    new, q = rows(B, 1, H, D), tensors[0]
    dense = [rows(B, 80, H, D) for _ in "kv"]
    calls = {
        "dense": lambda: flash_attn_func(x, x, x),
        "varlen": lambda: flash_attn_varlen_func(x[0], x[0], x[0], cu, cu, 20, 20),
        "backward": lambda: out.sum().backward(),
        "append": lambda: flash_attn_with_kvcache(q, *dense, new, new, cache_seqlens=3),
    }
    with pytest.raises(RuntimeError, match=r"cache_seqlens.*\[2\] = 5000; rule"):
        calls[call]()


def test_check_device_waits_for_the_call():
    """Without a synchronisation in between, behind a second of other work."""
    tensors = cache()
    tensors[4][0] = -3
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    decode(*tensors)
    with pytest.raises(RuntimeError, match=r"cache_seqlens.*\[0\] = -3"):
        flash_attn.check_device()
    flash_attn.check_device("cpu")
    flash_attn.check_device(torch.cuda.current_device())


def test_a_replayed_graph_reports_too():
    """Captured with a table that is well, replayed over one that is not."""
    tensors = cache()
    decode(*tensors)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode(*tensors)
    graph.replay()
    flash_attn.check_device()
    tensors[3][0, 2] = -1
    graph.replay()
    with pytest.raises(RuntimeError, match=r"block_table\[2\] = -1"):
        flash_attn.check_device()


def test_the_first_call_of_a_process_may_be_captured():
    """The word that kernels write to is allocated outside the graph."""
    import subprocess
    import sys

    program = """
import torch, flash_attn
x = torch.randn(1, 40, 2, 64, device="cuda", dtype=torch.bfloat16)
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = flash_attn.flash_attn_func(x, x, x)
graph.replay()
assert torch.equal(out, flash_attn.flash_attn_func(x, x, x))
flash_attn.check_device()
print("captured")
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout == "captured\n", result.stderr


def test_a_pack_names_its_backward_pass():
    q = rows(30, H, D).requires_grad_()
    cu = torch.tensor([0, 10, 30], dtype=torch.int32, device=DEVICE)
    out = flash_attn_varlen_func(q, q, q, cu, cu, 20, 20)
    flash_attn.check_device()
    with torch.autograd._unsafe_preserve_version_counter(cu):  # unseen by autograd
        cu.copy_(torch.tensor([0, 10, 31], dtype=torch.int32))
    out.sum().backward()
    words = r"cu_seqlens_.*an earlier call of the backward pass of flash_attn_varlen_func"
    with pytest.raises(RuntimeError, match=words):
        flash_attn.check_device()


# ---- A bound that says little ----


@pytest.mark.parametrize("d", [64, 256])
@pytest.mark.parametrize("causal", [False, True])
def test_a_loose_bound_changes_nothing(d, causal):
    """Thousands of short sequences, under their longest length and beyond 32 bits of tiles."""
    lengths = torch.randint(0, 5, (4100,), generator=torch.Generator().manual_seed(d))
    lengths[77], lengths[2000] = 300, 0
    cu = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).to(DEVICE, torch.int32)
    total = int(lengths.sum()) + 9  # tokens that belong to nobody
    tensors = [rows(total, h, d, seed=h) for h in (8, 4, 4)]
    dout = rows(total, 8, d, seed=3)

    def there_and_back(longest):
        leaves = [x.detach().requires_grad_() for x in tensors]
        with flash_attn.deterministic():
            out, lse, _ = flash_attn_varlen_func(
                *leaves, cu, cu, longest, longest, causal=causal, return_attn_probs=True
            )
        return out, lse, *torch.autograd.grad(out, leaves, dout)

    expected = there_and_back(300)
    assert expected[0][:-9].isfinite().all() and (expected[0][-9:] == 0).all()
    for longest in (301, 1 << 20, 2**31 - 1, 2**62):
        for name, actual, wanted in zip(
            ("out", "lse", "dq", "dk", "dv"), there_and_back(longest), expected, strict=True
        ):
            assert torch.equal(actual.view(torch.uint8), wanted.view(torch.uint8)), (name, longest)
