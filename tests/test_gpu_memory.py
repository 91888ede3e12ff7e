"""Memory of a training loop whose graphs are captured: PyTorch's pools, and nothing of ours."""

import multiprocessing

import pytest
import torch
from device import DEVICE

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.testing import cumulative_lengths

pytestmark = pytest.mark.gpu

TOKENS, HEADS, D = 1024, 8, 64
SETTLED, STEPS = 4, 33  # steps until every graph is captured; then 29 more


def attentions():
    cu = cumulative_lengths((300, 700, 24), DEVICE)

    def sdpa(q, k, v):
        q, k, v = (x[None].transpose(1, 2) for x in (q, k, v))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out.transpose(1, 2)[0]

    return {
        "sdpa": sdpa,
        "dense": lambda q, k, v: flash_attn_func(q[None], k[None], v[None], causal=True)[0],
        "pack": lambda q, k, v: flash_attn_varlen_func(q, k, v, cu, cu, 700, 700, causal=True),
    }


def reserved_by_step(name):
    """MiB that PyTorch holds after each step of a compiled layer, beyond those at its start."""
    attention = attentions()[name]
    torch.manual_seed(0)
    width = HEADS * D
    options = {"device": DEVICE, "dtype": torch.bfloat16}
    project = torch.nn.Linear(width, 3 * width, **options)
    x = torch.randn(TOKENS, width, **options)
    before = torch.cuda.memory_reserved()

    @torch.compile(backend="cudagraphs")
    def layer(x):
        return attention(*project(x).view(TOKENS, 3, HEADS, D).unbind(1))

    held = []
    for _ in range(STEPS):
        project.zero_grad(set_to_none=True)
        layer(x).float().square().mean().backward()
        torch.cuda.synchronize()
        held.append((torch.cuda.memory_reserved() - before) / 2**20)
    return held


def test_captured_training_holds_what_pytorchs_own_attention_holds():
    """Flat once every graph is captured, and no more than SDPA in the same loop."""
    held = {}
    for name in attentions():
        # A process of its own: what another loop left in the allocator and in cuBLAS counts else.
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            held[name] = pool.apply(reserved_by_step, (name,))
    for name, by_step in held.items():
        assert len(set(by_step[SETTLED:])) == 1, (name, by_step)
        assert by_step[-1] <= held["sdpa"][-1] + 2, (name, by_step[-1], held["sdpa"][-1])
