"""How much shared memory a GPU has decides its kernels, and no bit.

FLASH_ATTN_GPU_SHARED_KB=99 gives a large GPU the kernels of a small one, in a process of its own.
"""

import json
import os
import re
import subprocess
import sys

import golden
import pytest
import torch
from strategies import Problem, autograd

from flash_attn import deterministic, flash_attn_func

pytestmark = pytest.mark.gpu

# 130, 300 and 333 cross blocks of queries, halves of blocks and tiles of keys raggedly.
CALLS = {
    "plain": (130, 300, 4, 2, {}),
    "causal": (333, 333, 4, 2, {"causal": True}),
    "window": (130, 300, 2, 1, {"window_size": (70, 20)}),
    "narrow_window": (333, 333, 2, 2, {"window_size": (5, 0)}),
    "more_queries": (300, 77, 2, 1, {"causal": True}),
    "one_query": (1, 300, 4, 2, {}),
    "softcap": (64, 300, 4, 2, {"softcap": 2.0, "causal": True}),
    "alibi": (129, 300, 4, 1, {"alibi": "heads", "causal": True}),
}
HEAD_DIMS = (72, 96, 128)
CHILD = (
    "import json, sys; sys.path.insert(0, {tests!r}); import test_gpu_shared_memory as t; "
    "print(json.dumps([t.steps(), t.hashes()]))"
)


def gradients(name, d):
    s_q, s_k, h_q, h_kv, options = CALLS[name]
    problem = Problem((s_q,) * 2, (s_k,) * 2, h_q, h_kv, d, torch.bfloat16, **options)
    tensors = problem.dense()
    dout = problem.upstream_gradient(tensors[0])
    return autograd(lambda *x: flash_attn_func(*x, **problem.options()), tensors, dout)


def hashes():
    return {
        f"{name}-{d}": golden.hash_of(lambda name=name, d=d: gradients(name, d))
        for name in CALLS
        for d in HEAD_DIMS
    }


def steps():
    """The queries that a key walk of this process takes at a time."""
    q, k, v = (torch.randn(1, 64, 1, 128, device="cuda").bfloat16() for _ in range(3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        out = flash_attn_func(q.requires_grad_(), k, v)
        out.backward(torch.ones_like(out))
        torch.cuda.synchronize()
    names = [event.key for event in profile.key_averages()]
    found = [re.search(r"KeyWalkTraits<.*, 128, (\d+), ", name) for name in names]
    return [int(match[1]) for match in found if match]


def test_a_small_gpu_gives_the_bytes_of_a_large_one():
    if torch.cuda.get_device_properties("cuda").shared_memory_per_block_optin < 160 * 1024:
        pytest.skip("this GPU is a small one")
    assert steps() == [64]
    program = CHILD.format(tests=os.path.dirname(__file__))
    environment = os.environ | {"FLASH_ATTN_GPU_SHARED_KB": "99"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    used, found = json.loads(result.stdout.splitlines()[-1])
    assert used == [32], "the child took the kernels of a large GPU"
    assert found == hashes()


def test_control_another_order_of_keys_changes_the_bytes():
    """The same call with its keys in another order: sums of other parts."""
    q, k, v = (torch.randn(1, 300, 2, 128, device="cuda").bfloat16() for _ in range(3))
    order = torch.arange(300, device="cuda").roll(64)

    def gradient(k, v):
        leaf = q.clone().requires_grad_()
        flash_attn_func(leaf, k, v).sum().backward()
        return leaf.grad

    with deterministic():
        first, again = gradient(k, v), gradient(k, v)
        rolled = gradient(k[:, order], v[:, order])
    assert torch.equal(first, again) and not torch.equal(first, rolled)


@pytest.mark.parametrize("kb", ["98", "0", "-1", "9 9", "many"])
def test_too_little_is_refused(kb):
    program = "import torch, flash_attn as f; x = torch.ones(1, 1, 1, 8).cuda().half()\n"
    program += "f.flash_attn_func(x, x, x)"
    environment = os.environ | {"FLASH_ATTN_GPU_SHARED_KB": kb}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert result.returncode != 0
    assert f"received FLASH_ATTN_GPU_SHARED_KB={kb}; rule: a whole number of KiB from 99 on" in (
        result.stderr
    )
