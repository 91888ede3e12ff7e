"""Rows whose position lies outside the rotary tables, where nobody reads the positions first.

That is a GPU by default.  Such rows come back as they are, and their gradients too, and no index
leaves its tensor: there PyTorch would stop every later call of the process.
"""

import numpy as np
import pytest
import torch
from device import DEVICE
from test_rotary import S_RO, D, H, index, layouts, normal, tables

from flash_attn import _check_contents
from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)
from flash_attn.testing import assert_bitwise_equal

S = 5
INT32, INT64 = torch.iinfo(torch.int32), torch.iinfo(torch.int64)
OFFSETS = [0, -1, -S, S_RO - S + 2, S_RO, INT32.min, INT32.max]


@pytest.fixture
def contents_are_not_read(monkeypatch):
    """On the CPU as on a GPU: there by default, and the rows are the same there."""
    monkeypatch.setattr(_check_contents, "reads_contents", lambda of: False)


pytestmark = pytest.mark.usefixtures("contents_are_not_read")


def is_outside(position: int | None) -> bool:
    return position is None or not 0 <= position < S_RO


def rows(positions: list[int | None], dtype: torch.dtype) -> torch.Tensor:
    """(rows, h, d); outside are values that a turn by an angle of zero would change."""
    x = normal(len(positions), H, D, dtype=dtype)
    outside = torch.tensor([is_outside(position) for position in positions], device=DEVICE)
    for i, value in enumerate((np.inf, -0.0, np.nan)):
        x[outside, :, i] = value
    return x


def by_row(x, cos, sin, interleaved, positions):
    """Each row of x (rows, h, d) by itself, by an int offset, where its position has a row."""
    out = x.clone()
    for row, position in enumerate(positions):
        if not is_outside(position):
            alone = x[None, row : row + 1]
            turned = apply_rotary_emb(alone, cos, sin, interleaved, seqlen_offsets=position)
            out[row] = turned[0, 0]
    return out


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_dense_rows_outside_stay(interleaved, dtype, inplace):
    positions = [offset + i for offset in OFFSETS for i in range(S)]
    pack, (cos, sin) = rows(positions, dtype), tables(6)
    x = pack.view(len(OFFSETS), S, H, D)
    expected = by_row(pack, cos, sin, interleaved, positions).view_as(x)
    out = apply_rotary_emb(x, cos, sin, interleaved, inplace, seqlen_offsets=index(*OFFSETS))
    assert_bitwise_equal(out, expected)
    assert (out.data_ptr() == x.data_ptr()) is inplace


def test_offsets_whose_sums_overflow_are_outside():
    offsets = index(INT64.max, INT64.max - 2, INT64.min, dtype=torch.int64)
    x, (cos, sin) = normal(3, S, H, D), tables()
    assert_bitwise_equal(apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets), x)


@layouts
@pytest.mark.parametrize(
    "cu_seqlens",
    [
        pytest.param([3, 7, 7, 12], id="starts behind 0, ends before the end"),
        pytest.param([0, 0, 9, 40], id="ends behind the end"),
        pytest.param([20, 30, 40, 50], id="all behind the end"),
    ],
)
def test_rows_of_a_pack_outside_stay(interleaved, cu_seqlens):
    """Rows in no sequence, and rows that an offset takes outside."""
    t, offsets = 15, [-2, 0, S_RO - 3]
    positions = [None] * t
    for start, end, offset in zip(cu_seqlens, cu_seqlens[1:], offsets, strict=False):
        for row in range(start, min(end, t)):
            positions[row] = row - start + offset
    x, (cos, sin) = rows(positions, torch.float32), tables(6)
    for dtype in (torch.int32, torch.int64):
        out = apply_rotary_emb(
            x,
            cos,
            sin,
            interleaved,
            seqlen_offsets=index(*offsets, dtype=dtype),
            cu_seqlens=index(*cu_seqlens, dtype=dtype),
            max_seqlen=S,
        )
        assert_bitwise_equal(out, by_row(x, cos, sin, interleaved, positions))


def test_no_index_leaves_its_tensor_whatever_the_offsets_hold():
    """PyTorch's CPU kernels raise where those of a GPU assert; any row of x turns, or it stays."""
    generator = np.random.default_rng(0)
    x, (cos, sin) = normal(12, 1, D), tables()
    turned = [apply_rotary_emb(x[:, None], cos[i:], sin[i:])[:, 0] for i in range(S_RO)]
    results = torch.stack([x, *turned])
    extremes = [INT64.min, INT64.max, INT32.min, INT32.max, -1, 0, 5, 12, 13]
    for _ in range(200):
        b = int(generator.integers(0, 5))
        cu_seqlens = index(*generator.choice(extremes, b + 1).tolist(), dtype=torch.int64)
        offsets = index(*generator.choice(extremes, b).tolist(), dtype=torch.int64)
        out = apply_rotary_emb(
            x, cos, sin, seqlen_offsets=offsets, cu_seqlens=cu_seqlens, max_seqlen=12
        )
        assert (out == results).all(dim=-1).any(dim=0).all(), (cu_seqlens, offsets)


def test_tables_without_rows_turn_nothing():
    cos = sin = normal(0, D // 2)
    x = normal(4, H, D)
    out = apply_rotary_emb(x, cos, sin, cu_seqlens=index(0, 4), max_seqlen=0)
    assert_bitwise_equal(out, x)


def test_queries_and_keys_stay_by_tables_of_their_own():
    cos, sin = tables()
    shorter = cos[: S_RO - 3], sin[: S_RO - 3]
    offsets = index(0, S_RO - S)
    qkv = normal(2, S, 3, H, D)
    expected = qkv.clone()
    for i, own in enumerate(((cos, sin), shorter)):
        expected[:, :, i] = apply_rotary_emb(qkv[:, :, i], *own, seqlen_offsets=offsets)
    assert_bitwise_equal(expected[1, -3:, 1], qkv[1, -3:, 1])
    kv = qkv[:, :, 1:].clone()
    out = apply_rotary_emb_qkv_(qkv, cos, sin, *shorter, seqlen_offsets=offsets)
    assert_bitwise_equal(out, expected)
    assert_bitwise_equal(
        apply_rotary_emb_kv_(kv, *shorter, seqlen_offsets=offsets), expected[:, :, 1:]
    )


def test_module_turns_what_its_tables_reach():
    """Offsets in a tensor do not lengthen the tables: that is what max_seqlen is for."""
    rotary = RotaryEmbedding(D, device=DEVICE)
    qkv = normal(2, S, 3, H, D)
    before = qkv.clone()
    rotary(qkv, seqlen_offset=index(-1, S))
    assert_bitwise_equal(qkv[0, :1], before[0, :1])
    assert_bitwise_equal(qkv[1], before[1])
    assert not torch.equal(qkv[0, 2:, :2], before[0, 2:, :2])


def test_gradients_of_rows_outside_stay():
    x, (cos, sin) = normal(3, S, H, D).requires_grad_(), tables()
    grad_out, offsets = normal(3, S, H, D, seed=2), index(-2, 0, S_RO)
    apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets).backward(grad_out)
    assert_bitwise_equal(x.grad, apply_rotary_emb(grad_out, cos, -sin, seqlen_offsets=offsets))
    assert_bitwise_equal(x.grad[2], grad_out[2])


def test_compiled_code_leaves_the_same_rows():
    x, (cos, sin) = normal(3, S, H, D), tables()
    offsets = index(-2, 0, S_RO)

    def turn(x, offsets):
        return apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets)

    compiled = torch.compile(turn, fullgraph=True, backend="aot_eager")
    assert_bitwise_equal(compiled(x, offsets), turn(x, offsets))


@pytest.mark.gpu
def test_a_gpu_is_not_waited_for(monkeypatch):
    """By default, so without this file's fixture: neither dense nor packed offsets are read."""
    monkeypatch.undo()
    monkeypatch.delenv("FLASH_ATTN_CHECK", raising=False)
    x, (cos, sin) = normal(2, S, H, D), tables()
    offsets, cu_seqlens = index(-1, S_RO), index(0, 3, 99)
    torch.cuda.set_sync_debug_mode("error")
    try:
        dense = apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets)
        pack = apply_rotary_emb(
            x[0], cos, sin, seqlen_offsets=offsets, cu_seqlens=cu_seqlens, max_seqlen=3
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert_bitwise_equal(dense[1], x[1])
    assert_bitwise_equal(pack[3:], x[0, 3:])
