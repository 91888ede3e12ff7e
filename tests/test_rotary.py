"""Rotary embedding: the bits of the stated formula, every way to place a row, gradients.

References are a numpy loop that rounds each product and sum to fp32, and complex numbers in fp64.
"""

import itertools
import math
import os
import shutil

import numpy as np
import pytest
import torch
import torch._dynamo.testing
from device import DEVICE
from torch.autograd import gradcheck, gradgradcheck

from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)
from flash_attn.testing import assert_bitwise_equal

B, S, H, D = 3, 11, 4, 32
S_RO = 40


def index(*values: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Offsets or lengths."""
    return torch.tensor(values, dtype=dtype, device=DEVICE)


layouts = pytest.mark.parametrize("interleaved", [False, True], ids=["half", "interleaved"])


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return values.to(DEVICE, dtype)


def tables(r: int = D // 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    angle = normal(S_RO, r, seed=1) * 3
    return angle.cos().to(dtype), angle.sin().to(dtype)


def pairs(r: int, interleaved: bool) -> list[tuple[int, int]]:
    return [(2 * i, 2 * i + 1) if interleaved else (i, i + r) for i in range(r)]


def turned_in_fp64(x, cos, sin, interleaved, position):
    """Each pair as a complex number times cos + i sin; `position` maps (b, s) to a table row."""
    x64, turn = x.double(), torch.complex(cos.double(), sin.double())
    out = x64.clone()
    for row in np.ndindex(*x.shape[:2]):
        for i, (first, second) in enumerate(pairs(cos.shape[1], interleaved)):
            z = torch.complex(x64[row][..., first], x64[row][..., second]) * turn[position(*row), i]
            out[row][..., first], out[row][..., second] = z.real, z.imag
    return out


@layouts
@pytest.mark.parametrize("r", [D // 2, D // 4, 3], ids=lambda r: f"{2 * r} of {D} dims")
def test_every_operation_is_rounded_on_its_own(interleaved, r):
    """fp32 bytes equal the formula in numpy, one ufunc (so one rounding) per operation."""
    x = normal(B, S, H, D)
    cos, sin = tables(r)
    x_np, cos_np, sin_np = (tensor.cpu().numpy() for tensor in (x, cos, sin))
    expected = x_np.copy()
    for first, second in pairs(r, interleaved):
        i = first // 2 if interleaved else first
        x1, x2 = x_np[..., first], x_np[..., second]
        c, s = cos_np[None, :S, None, i], sin_np[None, :S, None, i]
        expected[..., first] = np.subtract(np.multiply(x1, c), np.multiply(x2, s))
        expected[..., second] = np.add(np.multiply(x1, s), np.multiply(x2, c))
    out = apply_rotary_emb(x, cos, sin, interleaved=interleaved)
    assert_bitwise_equal(out.cpu(), torch.from_numpy(expected))


def test_a_fused_multiply_add_would_be_noticed():
    """Control: with the sum of each first half rounded once (as in fp64), fp32 bytes differ."""
    x, (cos, sin) = normal(B, S, H, D), tables()
    once_rounded = turned_in_fp64(x, cos, sin, False, lambda i, j: j).float()
    assert not torch.equal(apply_rotary_emb(x, cos, sin), once_rounded)


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sixteen_bit_values_are_turned_in_fp32_and_cast_once(dtype, interleaved):
    x, (cos, sin) = normal(B, S, H, D, dtype=dtype), tables(dtype=dtype)
    out = apply_rotary_emb(x, cos, sin, interleaved=interleaved)
    in_fp32 = apply_rotary_emb(x.float(), cos.float(), sin.float(), interleaved=interleaved)
    assert_bitwise_equal(out, in_fp32.to(dtype))
    truth = turned_in_fp64(x, cos, sin, interleaved, lambda i, j: j)
    assert (in_fp32 - truth).abs().max() < 1e-6
    # The reference in plain PyTorch says the same; its intermediates have the dtype of x.
    plain = apply_rotary_emb_torch(x, cos[:S], sin[:S], interleaved)
    torch.testing.assert_close(plain, out, atol=8 * torch.finfo(dtype).eps, rtol=0)


@layouts
def test_offsets_give_each_sequence_its_own_first_position(interleaved):
    x, (cos, sin) = normal(B, S, H, D), tables(6)
    offsets = [0, 29, 7]
    for dtype in (torch.int32, torch.int64):
        out = apply_rotary_emb(
            x, cos, sin, interleaved, seqlen_offsets=index(*offsets, dtype=dtype)
        )
        for i, offset in enumerate(offsets):
            alone = apply_rotary_emb(x[i : i + 1], cos, sin, interleaved, seqlen_offsets=offset)
            from_there = apply_rotary_emb(x[i : i + 1], cos[offset:], sin[offset:], interleaved)
            assert_bitwise_equal(out[i : i + 1], alone)
            assert_bitwise_equal(alone, from_there)
    truth = turned_in_fp64(x, cos, sin, interleaved, lambda i, j: offsets[i] + j)
    torch.testing.assert_close(out.double(), truth, atol=1e-6, rtol=0)


@layouts
@pytest.mark.parametrize("offsets", [None, 3, [5, 0, 9, 0, 1]], ids=["none", "int", "tensor"])
def test_a_pack_turns_as_its_sequences_do(interleaved, offsets):
    """Empty sequences first, in the middle and last; rows behind the last sequence stay."""
    lengths, tail = [0, 7, 0, 11, 0], 4
    cu_seqlens = index(0, *np.cumsum(lengths))
    x, (cos, sin) = normal(sum(lengths) + tail, H, D), tables(5)
    x[-1] = math.nan
    as_given = index(*offsets) if isinstance(offsets, list) else offsets or 0
    out = apply_rotary_emb(
        x,
        cos,
        sin,
        interleaved,
        seqlen_offsets=as_given,
        cu_seqlens=cu_seqlens,
        max_seqlen=max(lengths),
    )
    for i, (start, end) in enumerate(itertools.pairwise(cu_seqlens.tolist())):
        offset = offsets[i] if isinstance(offsets, list) else as_given
        alone = apply_rotary_emb(x[None, start:end], cos, sin, interleaved, seqlen_offsets=offset)
        assert_bitwise_equal(out[start:end], alone[0], label=f"sequence {i}")
    assert_bitwise_equal(out[-tail:], x[-tail:])


@layouts
def test_in_place_writes_the_same_bytes_to_its_argument(interleaved):
    """Also where x is a strided view; what is not turned keeps its bytes."""
    wide, (cos, sin) = normal(B, S, 2 * H, D + 8), tables(6)
    before = wide.clone()
    x = wide[:, :, ::2, 3 : 3 + D]
    expected = apply_rotary_emb(x, cos, sin, interleaved)
    assert_bitwise_equal(wide, before)
    out = apply_rotary_emb_func(x, cos, sin, interleaved, inplace=True)
    assert out.data_ptr() == x.data_ptr() and out.stride() == x.stride()
    assert_bitwise_equal(x, expected)
    x.copy_(before[:, :, ::2, 3 : 3 + D])
    assert_bitwise_equal(wide, before)


@layouts
@pytest.mark.parametrize("own_k", [False, True], ids=["one table", "tables for k"])
@pytest.mark.parametrize("h_q,h_kv", [(4, 4), (6, 2), (4, 1)], ids=["mha", "gqa", "mqa"])
def test_qkv_turns_queries_and_keys_in_place(interleaved, own_k, h_q, h_kv):
    cos, sin = tables(6)
    cos_k, sin_k = (cos.flip(0), sin.flip(0)) if own_k else (None, None)
    offsets = index(0, 29, 7)
    qkv = normal(B, S, h_q + 2 * h_kv, D)
    q, k, v = qkv.clone().split([h_q, h_kv, h_kv], dim=2)
    expected = torch.cat(
        (
            apply_rotary_emb(q, cos, sin, interleaved, seqlen_offsets=offsets),
            apply_rotary_emb(
                k,
                cos_k if own_k else cos,
                sin_k if own_k else sin,
                interleaved,
                seqlen_offsets=offsets,
            ),
            v,
        ),
        dim=2,
    )
    packed = qkv.clone().view(B, S, 3, h_q, D) if h_q == h_kv else None
    out = apply_rotary_emb_qkv_(qkv, cos, sin, cos_k, sin_k, interleaved, offsets, num_heads_q=h_q)
    assert out.data_ptr() == qkv.data_ptr()
    assert_bitwise_equal(qkv, expected)
    if packed is not None:
        apply_rotary_emb_qkv_(packed, cos, sin, cos_k, sin_k, interleaved, offsets)
        assert_bitwise_equal(packed.flatten(2, 3), expected)


@layouts
def test_kv_turns_keys_in_place(interleaved):
    kv, (cos, sin) = normal(B, S, 2, H, D), tables(6)
    k, v = kv.clone().unbind(2)
    out = apply_rotary_emb_kv_(kv, cos, sin, interleaved, seqlen_offsets=3)
    assert out.data_ptr() == kv.data_ptr()
    assert_bitwise_equal(kv[:, :, 0], apply_rotary_emb(k, cos, sin, interleaved, seqlen_offsets=3))
    assert_bitwise_equal(kv[:, :, 1], v)


def test_rotate_half():
    x = torch.arange(6.0)
    assert rotate_half(x).tolist() == [-3, -4, -5, 0, 1, 2]
    assert rotate_half(x, interleaved=True).tolist() == [-1, 0, -3, 2, -5, 4]


@layouts
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_gradients(interleaved, inplace):
    """First and second derivatives in fp64; the in-place forms get a copy to work on."""
    cos, sin = tables(2, torch.float64)
    offsets, cu_seqlens = index(4, 0), index(0, 1, 3)

    def dense(x):
        return apply_rotary_emb(x * 1, cos, sin, interleaved, inplace, seqlen_offsets=offsets)

    def packed(x):
        return apply_rotary_emb(
            x * 1, cos, sin, interleaved, inplace, cu_seqlens=cu_seqlens, max_seqlen=2
        )

    def qkv(x):
        return apply_rotary_emb_qkv_(x * 1, cos, sin, sin, cos, interleaved, offsets, num_heads_q=2)

    def kv(x):
        return apply_rotary_emb_kv_(x * 1, cos, sin, interleaved, offsets)

    shapes = {dense: (2, 3, 1, 6), packed: (4, 2, 6), qkv: (2, 2, 4, 6), kv: (2, 2, 2, 1, 6)}
    for function, shape in shapes.items():
        x = normal(*shape, dtype=torch.float64).requires_grad_()
        assert gradcheck(function, (x,)), function.__name__
        assert gradgradcheck(function, (x,)), function.__name__


def test_the_gradient_is_the_conjugate_rotation_with_the_same_roundings():
    x, (cos, sin) = normal(B, S, H, D, dtype=torch.bfloat16).requires_grad_(), tables(6)
    grad_out = normal(B, S, H, D, dtype=torch.bfloat16, seed=2)
    apply_rotary_emb(x, cos, sin).backward(grad_out)
    assert_bitwise_equal(x.grad, apply_rotary_emb(grad_out, cos, -sin))


def test_a_parameter_may_be_turned_in_place():
    """As upstream allows: the leaf's gradient is that of the value it had before."""
    qkv, (cos, sin) = normal(B, S, 3, H, D).requires_grad_(), tables()
    untouched = qkv.detach().clone().requires_grad_()
    grad_out = normal(B, S, 3, H, D, seed=2)
    apply_rotary_emb_qkv_(qkv, cos, sin).backward(grad_out)
    q, k, v = untouched.unbind(2)
    turned = [apply_rotary_emb(q, cos, sin), apply_rotary_emb(k, cos, sin), v]
    torch.stack(turned, dim=2).backward(grad_out)
    assert_bitwise_equal(qkv.grad, untouched.grad)


def test_an_incoming_gradient_shared_with_a_residual_stays_as_it_is():
    """y + h hands one and the same gradient to both; rotating it in place would corrupt h's."""
    cos, sin = tables()
    base = normal(B, S, H, D).requires_grad_()
    h = base * 2
    y = apply_rotary_emb(base * 3, cos, sin, inplace=True)
    grad_out = normal(B, S, H, D, seed=2)
    before = grad_out.clone()
    (y + h).backward(grad_out)
    assert_bitwise_equal(grad_out, before)
    expected = apply_rotary_emb(grad_out, cos, -sin) * 3 + grad_out * 2
    torch.testing.assert_close(base.grad, expected, atol=1e-5, rtol=0)


def angles_in_fp64(dim: int, base: float, seqlen: int) -> torch.Tensor:
    return torch.tensor(
        [[p / base ** (2 * i / dim) for i in range(dim // 2)] for p in range(seqlen)],
        dtype=torch.float64,
        device=DEVICE,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_module_tables_are_made_in_fp32(dtype):
    """Also in a module that was cast to 16 bit, whose own frequencies are too coarse by then."""
    rotary = RotaryEmbedding(D, base=500.0, device=DEVICE).to(dtype)
    qkv = normal(B, S, 3, H, D, dtype=dtype)
    expected = qkv.clone()
    angle = angles_in_fp64(D, 500.0, S)
    rotary(qkv)
    for table, function in ((rotary._cos_cached, torch.cos), (rotary._sin_cached, torch.sin)):
        assert table.dtype == dtype
        # The argument is rounded to fp32 before cos, so its error grows with the position.
        atol = 2e-6 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(table.double(), function(angle), atol=atol, rtol=0)
    apply_rotary_emb_qkv_(expected, rotary._cos_cached, rotary._sin_cached)
    assert_bitwise_equal(qkv, expected)


def test_module_turns_decoded_tokens_as_the_prompt():
    """Tables grow with what is seen, a row of them never changes its bytes on the way."""
    whole, steps = RotaryEmbedding(D, device=DEVICE), RotaryEmbedding(D, device=DEVICE)
    q, kv = normal(B, S, H, D), normal(B, S, 2, 2, D, seed=1)
    q_whole, kv_whole = whole(q.clone(), kv.clone(), max_seqlen=S_RO)
    for start, end in ((0, 5), (5, 6), (6, 7), (7, S)):
        q_part, kv_part = steps(
            q[:, start:end].clone(), kv[:, start:end].clone(), seqlen_offset=start
        )
        assert_bitwise_equal(q_part, q_whole[:, start:end])
        assert_bitwise_equal(kv_part, kv_whole[:, start:end])
    at_once = whole(q.clone(), kv.clone(), seqlen_offset=index(*[0] * B))
    assert_bitwise_equal(at_once[0], q_whole)


def test_module_keeps_its_tables_until_it_needs_others():
    rotary = RotaryEmbedding(D, device=DEVICE)
    rotary(normal(B, S, 3, H, D), max_seqlen=S_RO)
    first = rotary._cos_cached
    rotary(normal(B, S, 3, H, D), seqlen_offset=S_RO - S)
    assert rotary._cos_cached is first and first.shape[0] == S_RO
    rotary(normal(B, S, 3, H, D, dtype=torch.float16))
    assert rotary._cos_cached.dtype == torch.float16
    assert list(rotary.state_dict()) == []


def test_module_with_tables_from_inference_mode_can_still_train():
    rotary = RotaryEmbedding(D, device=DEVICE)
    with torch.inference_mode():
        rotary(normal(B, S, 3, H, D))
    qkv = normal(B, S, 3, H, D).requires_grad_()
    rotary(qkv * 1).sum().backward()
    assert qkv.grad.isfinite().all()


@layouts
def test_module_with_xpos_lets_scores_decay_with_distance(interleaved):
    """A score is that of plain rotary times zeta_i ** ((p_q - p_k) / scale_base) in each pair i."""
    dim, scale_base = 8, 16.0
    rotary = RotaryEmbedding(dim, interleaved=interleaved, scale_base=scale_base, device=DEVICE)
    q, kv = normal(1, S, 1, dim), normal(1, S, 2, 1, dim, seed=1)
    q_turned, kv_turned = rotary(q.clone(), kv.clone())
    qkv = torch.cat((q, kv[:, :, 0], kv[:, :, 1]), dim=2)
    packed = rotary(qkv.clone(), num_heads_q=1)
    assert_bitwise_equal(packed, torch.cat((q_turned, kv_turned.squeeze(3)), dim=2))

    angle = angles_in_fp64(dim, 10000.0, S)
    zeta = [(2 * i / dim + 0.4) / 1.4 for i in range(dim // 2)]
    for p_q, p_k in [(0, 0), (9, 2), (3, 10)]:
        score = 0.0
        for i, (first, second) in enumerate(pairs(dim // 2, interleaved)):
            a = complex(q[0, p_q, 0, first], q[0, p_q, 0, second])
            b = complex(kv[0, p_k, 0, 0, first], kv[0, p_k, 0, 0, second])
            turn = complex(0, float(angle[p_q, i] - angle[p_k, i]))
            turned = a * b.conjugate() * np.exp(turn)
            score += turned.real * zeta[i] ** ((p_q - p_k) / scale_base)
        ours = q_turned[0, p_q, 0].double() @ kv_turned[0, p_k, 0, 0].double()
        assert ours.item() == pytest.approx(score, abs=1e-5)


needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)


@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])]
)
def test_compiled_code_gives_the_same_bytes(backend):
    """Tables, rotation and gradient.  Inductor has its own cos, and likes to fuse what it sees."""
    eager, traced = (RotaryEmbedding(D, scale_base=512.0, device=DEVICE) for _ in range(2))
    cos, sin = tables(6)

    def model(x, rotary):
        # Around the ops no sum of inexact products: a compiler may fuse that, in gradients too.
        qkv = rotary(torch.stack((x * 2, x * 4, x), dim=2), seqlen_offset=5)
        q, k, v = qkv.unbind(2)
        return apply_rotary_emb(q, cos, sin, interleaved=True, seqlen_offsets=7) * k * v

    compiled = torch.compile(model, fullgraph=True, backend=backend)
    x, grad_out = normal(B, S, H, D).requires_grad_(), normal(B, S, H, D, seed=2)
    expected, out = model(x, eager), compiled(x, traced)
    assert_bitwise_equal(out, expected)
    (expected_grad,) = torch.autograd.grad(expected, x, grad_out)
    (grad,) = torch.autograd.grad(out, x, grad_out)
    assert_bitwise_equal(grad, expected_grad)


def test_compiled_code_takes_any_size():
    """Rows, heads and offsets that the compiler does not know yet, in two calls of one graph."""
    cos, sin = tables(6)
    graphs = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def model(x, offset, num_heads_q):
        qkv = apply_rotary_emb_qkv_(x * 1, cos, sin, seqlen_offsets=offset, num_heads_q=num_heads_q)
        return apply_rotary_emb(qkv, cos, sin, seqlen_offsets=offset)

    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    for s, h_q, offset in ((5, 4, 2), (7, 6, 3)):
        x = normal(B, s, h_q + 4, D)
        assert_bitwise_equal(compiled(x, offset, h_q), model(x, offset, h_q))
    assert graphs.frame_count == 1


@pytest.mark.parametrize("pack", [False, True], ids=["dense", "pack"])
def test_opcheck_of_the_rotation(pack):
    x = normal(6, H, D) if pack else normal(2, 3, H, D)
    cu_seqlens, max_seqlen = (index(0, 2, 5), 3) if pack else (None, 0)
    positions = (1, index(3, 0), cu_seqlens, max_seqlen)
    args = (x, *tables(6), None, None, *positions, None, 0, False, False)
    torch.library.opcheck(torch.ops.flash_attn._apply_rotary_.default, args)


@pytest.mark.parametrize("scale_base", [None, 512.0], ids=["plain", "xpos"])
def test_opcheck_of_the_tables(scale_base):
    rotary = RotaryEmbedding(D, scale_base=scale_base, device=DEVICE).to(torch.bfloat16)
    args = (rotary.inv_freq, rotary.scale, D, 10000.0, scale_base or 0.0, S, torch.float16)
    torch.library.opcheck(torch.ops.flash_attn._rotary_tables.default, args)
