"""Calls into the native library: allocates results and hands plain tensors to the kernels.

Everything here runs eagerly on real tensors whose contents ``_checks.py`` has already accepted.
Letters: b batch, s_q queries, s_k keys, h_q query heads, h_kv key heads, d head dim, t tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_attn._arguments import (
    DENSE,
    Append,
    Cache,
    Inputs,
    Outputs,
    Packing,
    Scoring,
)

_LIBRARY_FILE = Path(__file__).with_name("_C.abi3.so")
if not _LIBRARY_FILE.exists():
    raise ImportError(
        f"flash_attn: {_LIBRARY_FILE} has not been built; in a source tree run `make build`, or "
        "install the package with `pip install --no-build-isolation .`"
    )
torch.ops.load_library(_LIBRARY_FILE)
_library = torch.ops.flash_attn_native
_forward = _library.forward.default
_backward = _library.backward.default
_append = _library.append.default
_plan = _library.plan.default
_check_device = _library.check_device.default
_cuda_archs = _library.cuda_archs.default
_segment_begin = _library.segment_begin.default
_cpu_isa = _library.cpu_isa.default

# In rng_state's offset: the forward pass ran in deterministic mode. Offsets stay below it.
DETERMINISTIC_BIT = 1 << 62

# softmax_d and S_dmask are padded to this many rows, as callers of the low-level ops expect.
ROW_PADDING = 128


def round_up(value: int, multiple: int) -> int:
    """The smallest multiple of ``multiple`` that is not below ``value``."""
    return (value + multiple - 1) // multiple * multiple


def softmax_scale_of(q: Tensor, softmax_scale: float | None) -> float:
    """The scale given, else d ** -0.5; a q without columns is left for the checks to refuse."""
    if softmax_scale is not None:
        return softmax_scale
    return max(q.shape[-1], 1) ** -0.5 if q.dim() > 0 else 1.0


def contiguous_columns(x: Tensor) -> Tensor:
    """``x`` itself when its last dimension is contiguous, else a contiguous copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _entries(index: Tensor | None) -> Tensor | None:
    """An index tensor as the kernels read it: one entry after another."""
    return None if index is None else index.contiguous()


def _rows(table: Tensor | None) -> Tensor | None:
    """A block table as the kernels read it: the entries of a row one after another."""
    return None if table is None else contiguous_columns(table)


def _indices(packing: Packing) -> tuple[Tensor | None, ...]:
    """The index tensors of a forward call, in the order of the native ops."""
    return (
        _entries(packing.cu_seqlens_q),
        _entries(packing.cu_seqlens_k),
        _entries(packing.seqused_k),
        _entries(packing.leftpad_k),
        _entries(packing.cache_batch_idx),
        _rows(packing.block_table),
    )


def lse_shape(q: Tensor, packing: Packing) -> tuple[int, ...]:
    """(b, h_q, s_q), or (h_q, t) of a packed batch."""
    if packing.cu_seqlens_q is None:
        return (q.shape[0], q.shape[2], q.shape[1])
    return (q.shape[1], q.shape[0])


def s_dmask_shape(q: Tensor, k: Tensor, packing: Packing) -> tuple[int, int, int, int]:
    """(b, h_q, s_q, s_k) with both lengths rounded up to 128."""
    s_q, s_k = packing.lengths(q, k)
    return (packing.batch(q), q.shape[-2], round_up(s_q, ROW_PADDING), round_up(s_k, ROW_PADDING))


def softmax_d_shape(q: Tensor, packing: Packing) -> tuple[int, ...]:
    """(b, h_q, s_q rounded up to 128), or (h_q, t + 128 b) of a packed batch."""
    if packing.cu_seqlens_q is None:
        return (q.shape[0], q.shape[2], round_up(q.shape[1], ROW_PADDING))
    return (q.shape[1], q.shape[0] + ROW_PADDING * packing.batch(q))


def draw_seed(device: torch.device) -> Tensor:
    """int64 (2,): seed and offset, from the generator that ``torch.manual_seed`` sets."""
    return torch.randint(0, DETERMINISTIC_BIT, (2,), dtype=torch.int64, device=device)


def forward(
    inputs: Inputs,
    scoring: Scoring,
    packing: Packing = DENSE,
    *,
    deterministic: bool,
    seed: Tensor | None = None,
    return_softmax: bool = False,
    num_splits: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out as q, softmax_lse fp32, S_dmask (empty unless asked for), rng_state.

    ``seed`` is what ``draw_seed`` drew, None without dropout. rng_state, int64 (2,), is what the
    backward pass needs to know: seed and offset, and in the latter's bit 62 the mode.
    """
    q = inputs.q
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(lse_shape(q, packing), dtype=torch.float32, device=q.device)
    s_dmask = torch.zeros(
        s_dmask_shape(q, inputs.k, packing) if return_softmax else (0,),
        dtype=q.dtype,
        device=q.device,
    )
    rng_state = torch.empty(2, dtype=torch.int64, device=q.device)
    _call_forward(
        inputs,
        scoring,
        packing,
        (out, lse, s_dmask if return_softmax else None, None, None, None),
        (seed, rng_state),
        num_splits,
        deterministic,
    )
    if packing.cu_seqlens_q is not None and q.device.type == "cpu":
        _define_uncovered_rows(out, lse, packing.cu_seqlens_q)
    return out, lse, s_dmask, rng_state


def _define_uncovered_rows(out: Tensor, lse: Tensor, cu_seqlens_q: Tensor) -> None:
    """Tokens after the last sequence of a pack see nothing: out is zero, lse is +inf."""
    covered = int(cu_seqlens_q[-1])
    if covered < out.shape[0]:
        out[covered:] = 0
        lse[:, covered:] = torch.inf


def forward_partials(
    inputs: Inputs,
    scoring: Scoring,
    packing: Packing,
    *,
    deterministic: bool,
    num_splits: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """A partial per segment and row (as lse): out (n, *lse, d), max_log2 and sum (n, *lse)."""
    q = inputs.q
    schedule: dict[str, Any] = {"deterministic": deterministic, "num_splits": num_splits}
    n = plan(inputs, scoring, packing, device=q.device, **schedule).num_segments
    rows = lse_shape(q, packing)
    # A kernel may leave out segments of which a row sees nothing.
    out = torch.zeros((n, *rows, q.shape[-1]), dtype=torch.float32, device=q.device)
    max_log2 = torch.full((n, *rows), -torch.inf, dtype=torch.float32, device=q.device)
    total = torch.zeros_like(max_log2)
    unused_out, lse = q, torch.empty(rows, dtype=torch.float32, device=q.device)
    _call_forward(
        inputs,
        scoring,
        packing,
        (unused_out, lse, None, out, max_log2, total),
        (None, None),
        num_splits,
        deterministic,
    )
    return out, max_log2, total


def _call_forward(
    inputs: Inputs,
    scoring: Scoring,
    packing: Packing,
    results: tuple[Tensor | None, ...],  # out, lse, S_dmask; partials: out, max_log2, sum
    randomness: tuple[Tensor | None, Tensor | None],  # seed, and rng_state to be written
    num_splits: int,
    deterministic: bool,
) -> None:
    s_q, s_k = packing.lengths(inputs.q, inputs.k)
    _forward(
        contiguous_columns(inputs.q),
        contiguous_columns(inputs.k),
        contiguous_columns(inputs.v),
        *results,
        *_indices(packing),
        scoring.alibi_slopes,
        *randomness,
        s_q,
        s_k,
        scoring.softmax_scale,
        scoring.causal,
        scoring.window_left,
        scoring.window_right,
        scoring.softcap,
        scoring.dropout_p,
        num_splits,
        deterministic,
    )


def backward(
    inputs: Inputs,
    outputs: Outputs,
    gradients: tuple[Tensor, Tensor, Tensor],
    scoring: Scoring,
    packing: Packing = DENSE,
) -> Tensor:
    """Writes dq, dk, dv and returns softmax_d, the row sums of dout * out (fp32).

    One order of arithmetic serves both modes: it costs nothing here, so standard mode keeps it.
    """
    q = inputs.q
    written = [contiguous_columns(x) for x in gradients]
    softmax_d = torch.zeros(softmax_d_shape(q, packing), dtype=torch.float32, device=q.device)
    s_q, s_k = packing.lengths(q, inputs.k)
    _backward(
        contiguous_columns(outputs.dout),
        contiguous_columns(q),
        contiguous_columns(inputs.k),
        contiguous_columns(inputs.v),
        contiguous_columns(outputs.out),
        outputs.softmax_lse.contiguous(),
        *written,
        softmax_d,
        _entries(packing.cu_seqlens_q),
        _entries(packing.cu_seqlens_k),
        scoring.alibi_slopes,
        outputs.rng_state,
        s_q,
        s_k,
        scoring.softmax_scale,
        scoring.causal,
        scoring.window_left,
        scoring.window_right,
        scoring.softcap,
        scoring.dropout_p,
    )
    for asked, buffer in zip(gradients, written, strict=True):
        if asked is not buffer:
            asked.copy_(buffer)
    return softmax_d


def append(
    q: Tensor, cache: Cache, new: Append, lengths: Tensor, *, rotate_by_position: bool
) -> Tensor:
    """Writes new keys (rotated) and values behind ``lengths`` (b,) keys of each sequence.

    Returns q, rotated if ``new`` has a table: row i to its own position, or all to ``lengths``.
    """
    assert new.k is not None and new.v is not None
    q = contiguous_columns(q)
    rotated = None
    if new.rotary_cos is not None:
        rotated = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    _append(
        q,
        rotated,
        contiguous_columns(new.k),
        contiguous_columns(new.v),
        cache.k,
        cache.v,
        lengths.contiguous(),
        _entries(cache.batch_idx),
        _rows(cache.block_table),
        new.rotary_cos,
        new.rotary_sin,
        new.interleaved,
        rotate_by_position,
    )
    return q if rotated is None else rotated


@dataclass(frozen=True)
class Plan:
    """The schedule of a forward call; in deterministic mode none of it can change a bit."""

    kernels: str  # the set that takes the call: "avx512", or "sm80 (mma.sync)"
    tile_rows: int  # rows (queries x heads of a group) that share a tile
    num_tiles: int
    num_segments: int  # of the longest sequence
    pieces: int  # parts of a tile's segments that run side by side
    split_extent: int  # keys a split in standard mode; 0: the contract's ladder
    num_processors: int  # CPU threads, or multiprocessors of a GPU
    block: int  # N, keys a block


def plan(
    inputs: Inputs,
    scoring: Scoring,
    packing: Packing,
    *,
    device: torch.device,
    deterministic: bool,
    num_splits: int,
) -> Plan:
    """The schedule that ``forward`` would choose on ``device``; q, k and v may be meta tensors."""
    q = inputs.q
    fields = torch.zeros(7, dtype=torch.int64, device="cpu")
    kernels = _plan(
        fields,
        contiguous_columns(q),
        contiguous_columns(inputs.k),
        contiguous_columns(inputs.v),
        torch.empty(lse_shape(q, packing), dtype=torch.float32, device="meta"),
        *_indices(packing),
        scoring.alibi_slopes,
        *packing.lengths(q, inputs.k),
        scoring.softmax_scale,
        scoring.softcap,
        scoring.dropout_p,
        num_splits,
        deterministic,
        _index_of(device),
    )
    return Plan(kernels, *fields.tolist())


def _index_of(device: torch.device) -> int:
    """Which GPU; below zero for the CPU."""
    if device.type != "cuda":
        return -1
    return torch.cuda.current_device() if device.index is None else device.index


def check_device(index: int) -> None:
    """Raises what the kernels of a GPU have noted as wrong, and forgets it; does not wait."""
    _check_device(index)


def cuda_archs() -> list[str]:
    """The NVIDIA architectures that this library holds kernels for, as "80"."""
    return [arch for arch in str(_cuda_archs()).split(";") if arch]


def segment_begin(segment: int, device: torch.device) -> int:
    """First key of a segment, on the ladder of the contract that holds on ``device``."""
    return int(_segment_begin(segment, device.type == "cuda"))


def cpu_isa() -> str:
    """The instruction set that the CPU kernels run on here: avx512, avx2 or generic."""
    return str(_cpu_isa())
