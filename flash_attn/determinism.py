"""What lies behind the switch: segments, partials, and their reduction in PyTorch.

In deterministic mode a row's bits depend on nothing but the row: SOLUTION.md says how, and
``_mode.py`` when the mode is on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flash_attn import _checks, _native
from flash_attn._arguments import DENSE, Inputs, Packing, Scoring
from flash_attn._mode import (
    ENVIRONMENT_VARIABLE,
    deterministic,
    is_deterministic,
    set_deterministic,
)

if TYPE_CHECKING:
    from flash_attn.verification import Report

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "Partials",
    "deterministic",
    "explain",
    "forward_partials",
    "is_deterministic",
    "reduce_partials",
    "set_deterministic",
    "verify",
]

_FOLD_SLACK = 8.0  # kFoldSlack of csrc/core/contract.h


@dataclass(frozen=True)
class Partials:
    """A forward call cut at its segments: one softmax state per segment and row.

    Attributes:
        out: fp32 (n_segments, *q.shape), sums of p v, relative to max_log2 and not normalised.
        max_log2: fp32 (n_segments, *softmax_lse.shape), the reference of the state, in log2 units:
            an integer where the row's keys lie in several segments; -inf where it sees none of
            this one.
        sum: fp32, as max_log2: the sum of p, relative to max_log2.
    """

    out: Tensor
    max_log2: Tensor
    sum: Tensor


def forward_partials(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    block_table: Tensor | None = None,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    num_splits: int = 0,
) -> Partials:
    """The split partials of a forward call, before they are folded.

    Dense with q (b, s_q, h_q, d); packed with q (t, h_q, d), cu_seqlens and max_seqlen as in
    ``flash_attn_varlen_func``. In deterministic mode the segments are the contract's, whatever
    ``num_splits`` says; in standard mode they are the splits that the call would be cut into.
    """
    _checks.check_tensors(q=q, k=k, v=v)
    _checks.check_options(
        q,
        alibi_slopes=alibi_slopes,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        block_table=block_table,
        seqused_k=seqused_k,
        leftpad_k=leftpad_k,
    )
    scoring = _checks.settle_scoring(q, softmax_scale, causal, window_size, softcap, alibi_slopes)
    num_splits = _checks.check_length("num_splits", num_splits)
    _checks.check_num_splits(num_splits)
    inputs, packing = Inputs(q, k, v), DENSE
    if cu_seqlens_q is None and cu_seqlens_k is None:
        _checks.check_packed_only(block_table=block_table, seqused_k=seqused_k, leftpad_k=leftpad_k)
        _checks.check_dense(inputs, scoring, low_level_head_dim=False, return_softmax=False)
    else:
        packing = Packing(
            cu_seqlens_q,
            cu_seqlens_k,
            _checks.check_length("max_seqlen_q", max_seqlen_q),
            _checks.check_length("max_seqlen_k", max_seqlen_k),
            seqused_k,
            leftpad_k,
            block_table=block_table,
        )
        _checks.check_varlen(
            inputs, packing, scoring, low_level_head_dim=False, return_softmax=False
        )
    out, max_log2, total = _native.forward_partials(
        inputs,
        scoring,
        packing,
        deterministic=is_deterministic(),
        num_splits=num_splits,
    )
    return Partials(_rows_like_q(out), max_log2, total)


def _rows_like_q(x: Tensor) -> Tensor:
    """(..., h, s, d), the order of lse's rows, as (..., s, h, d), the order of q's; and back."""
    return x.transpose(-2, -3)


def reduce_partials(partials: Partials, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Folds partials in ascending order in plain PyTorch, bit for bit as the kernels do.

    Where a row has several segments, their references are integers in log2 units. Weights are then
    powers of two, and a fold rounds once:
    O' = fma(O2, 2^(M2 - M'), O1 2^(M1 - M')), the same for the sums, where M' is M2 if that lies
    more than 8 above M1, else M1. What lies more than 126 below M' counts as nothing.

    Returns:
        out in ``dtype``, shaped as q; softmax_lse fp32, natural log, +inf for a row that sees none.
    """
    _checks.check_partials(partials.out, partials.max_log2, partials.sum, dtype)
    parts = _rows_like_q(partials.out)
    reference = partials.max_log2.new_full(partials.max_log2.shape[1:], -torch.inf)
    total = torch.zeros_like(reference)
    out = parts.new_zeros(parts.shape[1:])
    for part, part_reference, part_sum in zip(parts, partials.max_log2, partials.sum, strict=True):
        moves = part_reference > reference + _FOLD_SLACK
        common = torch.where(moves, part_reference, reference)
        mine, theirs = _weight(reference - common), _weight(part_reference - common)
        out = _multiply_add(part, theirs[..., None], out * mine[..., None])
        total = _multiply_add(part_sum, theirs, total * mine)
        reference = common
    inverse = 1.0 / torch.where(total == 0, 1.0, total)
    rows = out * inverse[..., None] + 0.0  # + 0 gives every zero the same sign
    out = _rows_like_q(rows).to(dtype).contiguous()
    out = torch.where(out.isnan(), torch.nan, out)  # one NaN, whatever made it
    return out, _log_sum_exp(reference, total)


def _multiply_add(x: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    """fma(x, weight, y) of fp32 tensors, weight a power of two: the product is exact in float64,
    whose sum of two fp32 numbers rounds to the same fp32 number as the exact one (53 >= 2 24 + 2,
    Figueroa 1995)."""
    return (x.double() * weight.double() + y.double()).float()


def _weight(difference: Tensor) -> Tensor:
    """2^difference for integers of -126 to 8, built from its bits; zero below and for NaN."""
    exponent = difference.nan_to_num(-126.0).clamp(min=-126.0).to(torch.int32)
    exact = ((exponent + 127) << 23).view(torch.float32)
    return torch.where(difference >= -126.0, exact, 0.0)


def _log_sum_exp(reference: Tensor, total: Tensor) -> Tensor:
    """(reference + log2 total) ln 2 in float64, operation for operation as csrc/core/contract.h."""
    fraction, exponent = torch.frexp(total.double())
    low = fraction < 0.70710678118654752440
    fraction = torch.where(low, fraction * 2.0, fraction)
    exponent = exponent.double() - low.double()
    s = (fraction - 1.0) / (fraction + 1.0)
    square = s * s
    series = torch.zeros_like(s)
    for odd in range(23, 0, -2):
        series = series * square + 1.0 / odd
    log2_total = exponent + (s * series) * 2.88539008177792681472
    log2_total = torch.where(torch.isinf(total), total.double(), log2_total)
    lse = ((reference.double() + log2_total) * 0.69314718055994530942).float()
    lse = torch.where(reference == -torch.inf, torch.inf, lse)
    return torch.where(torch.isnan(total), torch.nan, lse)


@dataclass(frozen=True)
class Explanation:
    """What fixes a call's bits (contract, block, boundaries), and the schedule around it."""

    contract: str  # "cpu" or "gpu"
    kernels: str  # those that take the call, as "avx512" or "sm80 (mma.sync)"
    deterministic: bool
    block: int
    boundaries: list[int]
    tile_rows: int
    num_tiles: int
    parallel_pieces: int
    num_processors: int  # CPU threads, or multiprocessors of a GPU

    def __str__(self) -> str:
        mode = "deterministic" if self.deterministic else "standard"
        processors = "threads" if self.contract == "cpu" else "multiprocessors"
        where = f"chosen for this batch and these {processors}"
        if self.deterministic:
            where = "the contract's ladder"
        shown = [str(x) for x in self.boundaries]
        if len(shown) > 12:
            shown = [*shown[:6], "...", *shown[-5:]]
        return "\n".join(
            [
                f"contract    {self.contract}, {mode} mode",
                "fixes the bits",
                f"  block     {self.block} keys",
                f"  segments  {len(self.boundaries) - 1}, {where}: {', '.join(shown)}",
                "free schedule" if self.deterministic else "schedule",
                f"  kernels   {self.kernels}",
                f"  tiles     {self.num_tiles} of up to {self.tile_rows} rows",
                f"  on        {self.num_processors} {processors}",
                f"  segments  in {self.parallel_pieces} piece(s) side by side",
            ]
        )


def explain(
    s_q: int,
    s_k: int,
    h_q: int,
    h_kv: int,
    d: int,
    dtype: torch.dtype | None = None,
    *,
    b: int = 1,
    device: torch.device | str = "cpu",
    deterministic: bool | None = None,
    num_splits: int = 0,
) -> Explanation:
    """How a dense call of this shape would be computed; ``print`` it.

    Args:
        dtype: None takes float32 on the CPU, and bfloat16 on a GPU.
        deterministic: None takes the mode in force here.
        num_splits: as in ``flash_attn_with_kvcache``.

    Raises:
        RuntimeError: where the call itself would raise it, with the same message.
    """
    device = torch.device(device)
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    sizes = {"b": b, "s_q": s_q, "s_k": s_k, "h_q": h_q, "h_kv": h_kv, "d": d}
    sizes = {name: _checks.check_length(name, size) for name, size in sizes.items()}
    num_splits = _checks.check_length("num_splits", num_splits)
    q, k = _checks.check_sizes(**sizes, dtype=dtype, device=device, num_splits=num_splits)
    if deterministic is None:
        mode = is_deterministic()
    else:
        mode = _checks.check_flag("deterministic", deterministic)
    plan = _native.plan(
        Inputs(q, k, k),
        Scoring(_native.softmax_scale_of(q, None)),
        DENSE,
        device=device,
        deterministic=mode,
        num_splits=num_splits,
    )
    extent = plan.split_extent
    boundaries = [
        segment * extent if extent else _native.segment_begin(segment, device)
        for segment in range(plan.num_segments + 1)
    ]
    return Explanation(
        contract="cpu" if device.type == "cpu" else "gpu",
        kernels=plan.kernels,
        deterministic=mode,
        block=plan.block,
        boundaries=boundaries,
        tile_rows=plan.tile_rows,
        num_tiles=plan.num_tiles,
        parallel_pieces=plan.pieces,
        num_processors=plan.num_processors,
    )


def verify(*arguments: Any, **options: Any) -> Report:
    """Runs the metamorphic suite on shapes of your own: see ``flash_attn.verification.verify``."""
    from flash_attn import verification

    return verification.verify(*arguments, **options)
