"""Slow attention by the book, for tests and for anybody who doubts a result.

One formula, written with plain PyTorch operations, serves two purposes:

* in float64 it is the truth that a kernel is compared with;
* in the tensors' own dtype it is the yardstick: what PyTorch itself would have lost on the way.

`assert_accurate` puts the two together: our largest error may be at most twice the yardstick's.
Everything here is differentiable. Memory is O(s_q * s_k) per head: keep the problems small.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def visible_keys(
    s_q: int,
    s_k: int,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    device: torch.device | str = "cpu",
) -> Tensor:
    """Which keys each query row sees: bool (s_q, s_k).

    The last query stands beside the last key (bottom-right alignment): query i is at key position
    i + s_k - s_q. A negative side of the window is unlimited; causal closes the right side.
    """
    left, right = int(window_size[0]), int(window_size[1])
    if causal:
        right = 0
    ahead = _keys_ahead(s_q, s_k, device)
    seen = torch.ones(s_q, s_k, dtype=torch.bool, device=device)
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    dtype: torch.dtype = torch.float64,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: Sequence[int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    dropout_p: float = 0.0,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over a dense batch, every operation in `dtype`.

    Args:
        q: (b, s_q, h_q, d).
        k, v: (b, s_k, h_kv, d); query head h reads key head h // (h_q / h_kv).
        alibi_slopes: (h_q,) or (b, h_q); adds -slope * |i + s_k - s_q - j| after the softcap.
        keep: bool (b, h_q, >= s_q, >= s_k), the dropout mask; kept weights are divided by 1 - p.

    Returns:
        out (b, s_q, h_q, d) and lse (b, h_q, s_q), the natural logarithm of the sum of exponentials
        (dropout does not enter it). A row that sees no key has out = 0 and lse = +inf.
    """
    s_q, s_k, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    rows = q.to(dtype).transpose(1, 2)  # (b, h_q, s_q, d)
    keys = k.to(dtype).repeat_interleave(group, dim=2).permute(0, 2, 3, 1)  # (b, h_q, d, s_k)
    values = v.to(dtype).repeat_interleave(group, dim=2).transpose(1, 2)  # (b, h_q, s_k, d)

    scores = torch.matmul(rows, keys) * scale  # (b, h_q, s_q, s_k)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        distance = _keys_ahead(s_q, s_k, q.device).abs()
        scores = scores - alibi_slopes.to(dtype)[..., None, None] * distance.to(dtype)

    hidden = ~visible_keys(s_q, s_k, causal, window_size, q.device)  # (s_q, s_k)
    blind = hidden.all(dim=-1, keepdim=True)  # (s_q, 1)
    # A blind row gets finite scores, so that neither its softmax nor its gradient makes a NaN.
    scores = scores.masked_fill(hidden, -math.inf).masked_fill(blind, 0.0)
    lse = torch.logsumexp(scores, dim=-1).masked_fill(blind[:, 0], math.inf)  # (b, h_q, s_q)
    weights = torch.softmax(scores, dim=-1).masked_fill(hidden, 0.0)
    if keep is not None:
        weights = weights * keep[..., :s_q, :s_k].to(dtype) / (1.0 - dropout_p)
    return torch.matmul(weights, values).transpose(1, 2), lse


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    seqused_k: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    block_table: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    keep: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Attention over a pack of sequences, one after the other; `options` as for `attention`.

    Args:
        q: (total_q, h_q, d).
        k, v: (total_k, h_kv, d), or pages (num_pages, page, h_kv, d) together with `block_table`.
        seqused_k: (b,), keys in use where that is less than cu_seqlens_k says.
        leftpad_k: (b,), unused keys before the first one of each sequence.

    Returns:
        out (total_q, h_q, d) and lse (h_q, total_q).
    """
    outs, lses = [], []
    for b, (begin, end) in enumerate(itertools.pairwise(cu_seqlens_q.tolist())):
        first, last = cu_seqlens_k[b : b + 2].tolist()
        used = last - first if seqused_k is None else int(seqused_k[b])
        pad = 0 if leftpad_k is None else int(leftpad_k[b])
        if block_table is None:
            keys, values = (x[first + pad : first + used] for x in (k, v))
        else:
            keys, values = (pages_of(x, block_table[b], used)[pad:] for x in (k, v))
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b : b + 1]
        out, lse = attention(
            q[None, begin:end],
            keys[None],
            values[None],
            alibi_slopes=slopes,
            keep=None if keep is None else keep[b : b + 1],
            **options,
        )
        outs.append(out[0])
        lses.append(lse[0])
    return torch.cat(outs), torch.cat(lses, dim=-1)


def pages_of(cache: Tensor, block_table_row: Tensor, length: int) -> Tensor:
    """The first `length` rows of one sequence in a paged cache: (length, h_kv, d)."""
    page = cache.shape[1]
    num_pages = -(-length // page)
    return cache[block_table_row[:num_pages].long()].flatten(0, 1)[:length]


def assert_accurate(
    actual: Tensor, truth: Tensor, plain: Tensor, *, atol: float = 0.0, label: str = "result"
) -> None:
    """Fail unless `actual` errs at most twice as much as `plain` PyTorch does, against `truth`.

    Non-finite values are compared first, position by position: an infinity or a NaN in the wrong
    place must not hide behind a maximum. One rounding of the largest value to the dtype of `actual`
    is always granted: a result that is exact up to its last rounding is right, however lucky
    `plain` may have been. `atol` is for what the caller can justify beyond that.
    """
    assert actual.shape == truth.shape, f"{label}: shape {actual.shape}, expected {truth.shape}"
    actual64, plain64 = actual.detach().double(), plain.detach().double()
    truth = truth.detach()
    wrong = torch.where(truth.isfinite(), ~actual64.isfinite(), actual64 != truth)
    wrong &= ~(truth.isnan() & actual64.isnan())
    if wrong.any():
        at = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{label}: {actual64[at]} for {truth[at]} at {at}, one of {int(wrong.sum())} such"
        )
    finite = truth.isfinite()
    if not finite.any():
        return
    error = torch.where(finite, (actual64 - truth).abs(), 0.0)
    yardstick = torch.where(finite & plain64.isfinite(), (plain64 - truth).abs(), 0.0).max().item()
    rounding = torch.finfo(actual.dtype).eps * truth[finite].abs().max().item()
    allowed = 2.0 * yardstick + rounding + atol
    if error.max().item() > allowed:
        at = tuple((error == error.max()).nonzero()[0].tolist())
        raise AssertionError(
            f"{label}: error {error.max().item():.3e} at {at} ({actual64[at]} for {truth[at]}); "
            f"allowed {allowed:.3e} (2 x {yardstick:.3e} of plain PyTorch, "
            f"rounding {rounding:.3e}, atol {atol:.3e})"
        )


def _keys_ahead(s_q: int, s_k: int, device: torch.device | str) -> Tensor:
    """How far key j lies beyond query i: int64 (s_q, s_k), negative for the past."""
    rows = torch.arange(s_q, device=device)[:, None] + (s_k - s_q)
    return torch.arange(s_k, device=device)[None, :] - rows
