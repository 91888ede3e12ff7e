"""Between padded batches (b, s, ...) and the packed rows (nnz, ...) that the varlen functions take.

`unpad_input` keeps the rows that a mask selects, `pad_input` puts rows back and fills the rest with
zeros.  Both are copies of rows, so values pass through bit for bit, and both are differentiable.
"""

from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

__all__ = [
    "IndexFirstAxis",
    "IndexFirstAxisResidual",
    "IndexPutFirstAxis",
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "rearrange",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def _add_rows_(total: Tensor, indices: Tensor, rows: Tensor) -> Tensor:
    """`total[indices[i]] += rows[i]` for ascending `i`, whatever the device and the thread count.

    On the CPU index_add_ takes the rows one after another.  On a GPU it uses atomics, so that rows
    with the same index would add in any order; an accumulating index_put_ sorts the indices first.
    """
    if total.is_cuda:
        return total.index_put_((indices,), rows, accumulate=True)
    return total.index_add_(0, indices, rows)


class IndexFirstAxis(torch.autograd.Function):
    """`input[indices]` along the first axis.  An index may occur more than once."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> Tensor:
        ctx.save_for_backward(indices)
        ctx.num_rows = input.shape[0]
        return input.index_select(0, indices)  # (nnz, ...)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        grad_input = grad_output.new_zeros(ctx.num_rows, *grad_output.shape[1:])
        return _add_rows_(grad_input, indices, grad_output), None


class IndexPutFirstAxis(torch.autograd.Function):
    """`first_axis_dim` rows of zeros, but `values[i]` in row `indices[i]`; the indices differ."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
        ctx.save_for_backward(indices)
        output = values.new_zeros(first_axis_dim, *values.shape[1:])
        return output.index_copy_(0, indices.long(), values)  # (first_axis_dim, ...)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        (indices,) = ctx.saved_tensors
        return grad_output.index_select(0, indices), None, None


class IndexFirstAxisResidual(torch.autograd.Function):
    """`(input[indices], input)`: the rows for a layer, and the input for the residual beside it.

    Taking both from one node means one gradient buffer: the gradient of the residual, with the
    gradients of the selected rows added to it.
    """

    @staticmethod
    def forward(ctx: Any, input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(indices)
        return input.index_select(0, indices), input.detach()

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor, grad_residual: Tensor) -> tuple[Tensor, None]:
        (indices,) = ctx.saved_tensors
        # A copy: autograd may have given the very same tensor to another branch of the graph.
        return _add_rows_(grad_residual.clone(), indices, grad_output), None


index_first_axis = IndexFirstAxis.apply
index_put_first_axis = IndexPutFirstAxis.apply
index_first_axis_residual = IndexFirstAxisResidual.apply


def _cumulative(seqlens: Tensor) -> Tensor:
    """Lengths (b,) to offsets (b + 1,) that start at 0, int32."""
    return F.pad(torch.cumsum(seqlens, dim=0, dtype=torch.int32), (1, 0))


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the rows of a padded batch that are in use, or only allocated.

    Args:
        hidden_states: (b, s, ...).
        attention_mask: (b, s), bool or integer; True or nonzero where a row is valid.
        unused_mask: (b, s), like it; where a row is kept although it takes no part in attention.

    Returns:
        hidden_states: (nnz, ...), the rows selected by either mask, sequence after sequence.
        indices: (nnz,) int64, where each row stood in the batch flattened to (b * s, ...).
        cu_seqlens: (b + 1,) int32, offsets of the sequences, counting rows of either mask.
        max_seqlen: the longest sequence, counted the same way.
        seqused: (b,) int32, rows of `attention_mask` alone in each sequence.
    """
    valid = attention_mask != 0  # (b, s)
    kept = valid if unused_mask is None else valid | (unused_mask != 0)
    seqlens = kept.sum(dim=-1, dtype=torch.int32)  # (b,)
    indices = kept.flatten().nonzero().flatten()  # (nnz,)
    return (
        index_first_axis(rearrange(hidden_states, "b s ... -> (b s) ..."), indices),
        indices,
        _cumulative(seqlens),
        max(seqlens.tolist(), default=0),
        valid.sum(dim=-1, dtype=torch.int32),
    )


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Packs a padded batch whose every row holds several short sequences, one after another.

    Args:
        hidden_states: (b, s, ...).
        attention_mask_in_length: (b, s), integer.  The nonzero entries of a row are the lengths of
            the sequences in that batch row, in order; they fill its first positions.  With s = 6,
            `[2, 3, 0, 0, 0, 0]` is a sequence of 2, one of 3, and one position of padding.

    Returns:
        hidden_states (nnz, ...), indices (nnz,) int64, cu_seqlens (sequences + 1,) int32, and the
        length of the longest sequence, each as `unpad_input` gives it.
    """
    filled = attention_mask_in_length.sum(dim=-1, keepdim=True)  # (b, 1)
    position = torch.arange(attention_mask_in_length.shape[1], device=filled.device)
    indices = (position < filled).flatten().nonzero().flatten()  # (nnz,)
    seqlens = attention_mask_in_length[attention_mask_in_length != 0]  # (sequences,)
    return (
        index_first_axis(rearrange(hidden_states, "b s ... -> (b s) ..."), indices),
        indices,
        _cumulative(seqlens),
        max(seqlens.tolist(), default=0),
    )


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """Puts packed rows (nnz, ...) back at `indices` of a batch (batch, seqlen, ...) of zeros."""
    padded = index_put_first_axis(hidden_states, indices, batch * seqlen)
    return rearrange(padded, "(b s) ... -> b s ...", b=batch)
