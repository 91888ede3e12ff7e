"""Packing and padding: rows pass bit for bit, lengths and offsets add up, gradients are exact."""

import einops
import pytest
import torch
from torch.autograd import gradcheck

from flash_attn import bert_padding
from flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from flash_attn.testing import assert_bitwise_equal

# Per batch row: which positions hold tokens.  Right-padded, left-padded, with holes, full, empty.
MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [0, 1, 1, 1, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 0, 1, 0]],
    "empty row": [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]],
    "all empty": [[0, 0, 0, 0, 0], [0, 0, 0, 0, 0]],
}


def batch_of(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
def test_unpad_takes_the_rows_of_the_mask_in_order(mask, mask_dtype):
    hidden = batch_of((len(mask), 5, 2, 3))
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(
        hidden, torch.tensor(mask).to(mask_dtype)
    )

    taken = [(i, j) for i, row in enumerate(mask) for j, bit in enumerate(row) if bit]
    assert packed.shape == (len(taken), 2, 3)
    for row, (i, j) in zip(packed, taken, strict=True):
        assert_bitwise_equal(row, hidden[i, j])
    assert indices.tolist() == [i * 5 + j for i, j in taken]
    lengths = [sum(row) for row in mask]
    assert cu_seqlens.tolist() == [sum(lengths[:i]) for i in range(len(mask) + 1)]
    assert seqused.tolist() == lengths
    assert type(max_seqlen) is int and max_seqlen == max(lengths)
    assert (indices.dtype, cu_seqlens.dtype, seqused.dtype) == (
        torch.int64,
        torch.int32,
        torch.int32,
    )


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.int64], ids=str)
def test_unused_rows_are_packed_but_not_counted_as_used(mask_dtype):
    attention = torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).to(mask_dtype)
    unused = torch.tensor([[0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]]).to(mask_dtype)
    hidden = batch_of((3, 4, 2))
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(hidden, attention, unused)
    # The third row's first position is in both masks and counts once.
    assert cu_seqlens.tolist() == [0, 3, 3, 7]
    assert seqused.tolist() == [2, 0, 1]
    assert max_seqlen == 4
    assert indices.tolist() == [0, 1, 2, 8, 9, 10, 11]
    assert_bitwise_equal(packed, hidden.reshape(12, 2)[indices])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("features", [(), (3,), (2, 3)], ids=["b s", "b s d", "b s h d"])
def test_pad_undoes_unpad(mask, dtype, features):
    """There and back: the rows of the mask bit for bit, +0 everywhere else."""
    hidden = batch_of((len(mask), 5, *features), dtype)
    packed, indices, *_ = unpad_input(hidden, torch.tensor(mask))
    padded = pad_input(packed, indices, len(mask), 5)
    assert_bitwise_equal(pad_input(packed, indices.int(), len(mask), 5), padded)
    kept = torch.tensor(mask, dtype=torch.bool)
    expected = torch.zeros_like(hidden)
    expected[kept] = hidden[kept]
    assert_bitwise_equal(padded, expected)


def test_several_sequences_in_a_row_become_sequences_of_their_own():
    lengths = [[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]]
    hidden = batch_of((4, 6, 2))
    packed, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(
        hidden, torch.tensor(lengths)
    )
    assert indices.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10, 12, 13, 14, 15, 16, 17]
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
    assert (indices.dtype, cu_seqlens.dtype) == (torch.int64, torch.int32)
    assert type(max_seqlen) is int and max_seqlen == 6
    assert_bitwise_equal(packed, hidden.reshape(24, 2)[indices])


def test_no_sequence_at_all():
    packed, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(
        batch_of((2, 3, 4)), torch.zeros(2, 3, dtype=torch.int32)
    )
    assert packed.shape == (0, 4) and indices.numel() == 0
    assert cu_seqlens.tolist() == [0] and max_seqlen == 0


def leaf(*shape: int) -> torch.Tensor:
    return batch_of(shape).double().requires_grad_()


def test_gradients():
    """First and second derivatives; an index may be taken twice, and some are never taken."""
    repeated = torch.tensor([4, 0, 4, 2])
    distinct = torch.tensor([3, 0, 5])
    mask = torch.tensor(MASKS["empty row"])
    cases = {
        "take": (lambda x: index_first_axis(x, repeated), leaf(5, 2, 3)),
        "put": (lambda x: index_put_first_axis(x, distinct, 6), leaf(3, 2)),
        "residual": (lambda x: index_first_axis_residual(x, repeated), leaf(5, 2)),
        "residual unused": (lambda x: index_first_axis_residual(x, repeated)[0], leaf(5, 2)),
        "unpad": (lambda x: unpad_input(x, mask)[0], leaf(3, 5, 2)),
        "pad": (lambda x: pad_input(x, distinct, 2, 3), leaf(3, 2)),
    }
    for name, (function, x) in cases.items():
        assert gradcheck(function, (x,)), name
        assert torch.autograd.gradgradcheck(function, (x,)), name


def test_residual_leaves_the_gradient_of_other_branches_alone():
    """The incoming gradient of the residual is shared with `other`, and must not be added to."""
    x, other = leaf(4, 3), leaf(4, 3)
    rows, residual = index_first_axis_residual(x * 1, torch.tensor([0, 2]))
    total = residual + other * 1
    (total.sum() + rows.sum() * 10).backward()
    assert other.grad.tolist() == [[1.0] * 3] * 4
    assert x.grad.tolist() == [[11.0] * 3, [1.0] * 3, [11.0] * 3, [1.0] * 3]


def test_gradients_of_a_repeated_row_add_in_ascending_order():
    """fp32 sums depend on their order: ours is that of a loop, whatever the number of threads."""
    num_rows, taken = 7, 4096
    indices = torch.randint(num_rows, (taken,), generator=torch.Generator().manual_seed(1))
    grad_output = batch_of((taken, 16))
    expected = torch.zeros(num_rows, 16)
    for index, row in zip(indices.tolist(), grad_output, strict=True):
        expected[index] += row

    threads = torch.get_num_threads()
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            x = torch.zeros(num_rows, 16, requires_grad=True)
            index_first_axis(x, indices).backward(grad_output)
            assert_bitwise_equal(x.grad, expected)
    finally:
        torch.set_num_threads(threads)
    in_one_reduction = torch.stack([grad_output[indices == i].sum(0) for i in range(num_rows)])
    assert not torch.equal(in_one_reduction, expected)  # the control: another order, other bits


def test_rows_are_taken_and_put_under_compile():
    def there_and_back(x, indices):
        return index_put_first_axis(index_first_axis(x, indices) * 2, indices, x.shape[0])

    x, indices = batch_of((6, 4)).requires_grad_(), torch.tensor([1, 2, 5])
    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    (eager_grad,) = torch.autograd.grad(there_and_back(x, indices).square().sum(), x)
    (grad,) = torch.autograd.grad(compiled(x, indices).square().sum(), x)
    assert_bitwise_equal(compiled(x, indices), there_and_back(x, indices))
    assert_bitwise_equal(grad, eager_grad)


def test_einops_rearrange_is_importable_from_here():
    assert bert_padding.rearrange is einops.rearrange
