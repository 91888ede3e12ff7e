"""Random attention problems for hypothesis, and the accuracy that their results are held to.

hypothesis draws a `Problem`, a handful of small numbers, and shrinks those; the tensors follow from
its seed. Lengths come in clusters around the edges of the order of arithmetic, 64 keys a block and
512 keys a segment, because that is where a kernel goes wrong; a budget on multiply-adds trades long
sequences against many heads, so that the float64 reference stays quick.

Everything that a tensor holds beside the problem (the gaps between rows and heads) is NaN: a kernel
that reads it as data, even times zero, shows.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from device import BLOCK, DEVICE, DTYPES, FINEST, ON_GPU, SEGMENT
from hypothesis import example
from hypothesis import strategies as st

from flash_attn import verification
from flash_attn.reference import assert_accurate
from flash_attn.testing import cumulative_lengths

LAYOUTS = ("contiguous", "heads_first", "gapped")
BUDGET = 1 << 24  # multiply-adds of q.k, over all heads and sequences

# float32 rounds a score by up to half an ulp of |q| |k| scale in the dot product, and of itself
# when it enters exp(s - max). PyTorch is as exposed, but may be lucky on a tiny problem: an ulp is
# always granted. The NVIDIA kernels take powers of two and tanh from the special function unit,
# which gives 2^-22 of its result away, once for a probability and once at the end of a segment.
SCORE_NOISE = 2.0**-20 if ON_GPU else 2.0**-23

SHORT = st.integers(1, 9)
AROUND_BLOCKS = st.builds(lambda n, e: n * BLOCK + e, st.integers(1, 5), st.integers(-1, 1))
AROUND_SEGMENTS = st.builds(lambda n, e: n * SEGMENT + e, st.integers(1, 3), st.integers(-1, 2))
LENGTHS = st.one_of(SHORT, AROUND_BLOCKS, st.integers(1, 3 * SEGMENT), AROUND_SEGMENTS)
HEAD_DIMS = st.one_of(st.sampled_from([32, 64, 96, 128, 192, 256]), st.integers(1, 256))


@dataclasses.dataclass(frozen=True)
class Problem(verification.Problem):
    """A problem of the verification as hypothesis draws it: its tensors on the tests' device, in a
    layout, and of one seed for all sequences."""

    causal: bool = False
    alibi: str | None = None  # None, "heads": slopes (h_q,), or "batch": slopes (b, h_q)
    device: str = str(DEVICE)
    layout: str = "contiguous"
    amplitude: float = 1.0
    deterministic: bool = False

    def options(self) -> dict[str, Any]:
        """Keyword arguments that the public functions and the reference have in common."""
        slopes = None
        if self.alibi is not None:
            shape = (self.batch, self.h_q) if self.alibi == "batch" else (self.h_q,)
            slopes = torch.rand(shape, generator=self._generator(3)) * 0.5 + 2.0**-8
            slopes = slopes.to(DEVICE)
        return {
            "softmax_scale": self.softmax_scale,
            "causal": self.causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "alibi_slopes": slopes,
        }

    def dense(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (b, s_q, h_q, d), k and v (b, s_k, h_kv, d) of a problem with equal lengths."""
        assert len(set(self.seqlens_q)) == len(set(self.seqlens_k)) == 1
        q_shape = (self.batch, self.seqlens_q[0], self.h_q, self.d)
        k_shape = (self.batch, self.seqlens_k[0], self.h_kv, self.d)
        return self._tensor(q_shape, 0), self._tensor(k_shape, 1), self._tensor(k_shape, 2)

    def dense_queries(self) -> torch.Tensor:
        """q alone, (b, s_q, h_q, d), for calls whose keys lie in a ragged cache."""
        assert len(set(self.seqlens_q)) == 1
        return self._tensor((self.batch, self.seqlens_q[0], self.h_q, self.d), 0)

    def packed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q (total_q, h_q, d), k and v (total_k, h_kv, d): the sequences one after the other."""
        q_shape = (sum(self.seqlens_q), self.h_q, self.d)
        k_shape = (sum(self.seqlens_k), self.h_kv, self.d)
        return self._tensor(q_shape, 0), self._tensor(k_shape, 1), self._tensor(k_shape, 2)

    def cu_seqlens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where each sequence of the pack starts: cu_seqlens_q and cu_seqlens_k."""
        lengths = (self.seqlens_q, self.seqlens_k)
        return tuple(cumulative_lengths(x, DEVICE) for x in lengths)

    def upstream_gradient(self, out: torch.Tensor) -> torch.Tensor:
        """A gradient for `out`, in the problem's layout."""
        return self._tensor(tuple(out.shape), 4)

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed * 8 + stream)

    def _tensor(self, shape: tuple[int, ...], stream: int) -> torch.Tensor:
        """Normal numbers of the problem's dtype and layout; shape (..., rows, heads, d)."""
        values = torch.randn(shape, generator=self._generator(stream)) * self.amplitude
        return laid_out(values.to(DEVICE, self.dtype), self.layout)


def laid_out(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values (..., rows, heads, d) under other strides; only the last stride stays 1."""
    if layout == "contiguous":
        return values
    if layout == "heads_first":
        return values.transpose(-3, -2).contiguous().transpose(-3, -2)
    rows, heads, d = values.shape[-3:]
    roomy = values.new_full((*values.shape[:-3], rows + 1, heads + 1, d + 3), math.nan)
    view = roomy[..., :rows, 1:, 1 : d + 1]
    view.copy_(values)
    return view


def assert_forward_accurate(actual, reference, arguments, options, dtype, label=""):
    """Hold (out, lse) to twice plain PyTorch's error against `reference` in float64.

    The yardstick for out is PyTorch in `dtype`; for lse it is PyTorch in float32, whatever the
    inputs, because lse leaves the kernel in float32.
    """
    out, lse = actual
    true_out, true_lse = reference(*arguments, **options)
    plain_out, _ = reference(*arguments, dtype=dtype, **options)
    _, plain_lse = reference(*arguments, dtype=torch.float32, **options)
    assert lse.dtype == torch.float32 and out.dtype == dtype
    noise = score_noise(*arguments[:2], true_lse, options.get("softmax_scale"))
    largest = true_out.abs().max().item() if true_out.numel() else 0.0
    assert_accurate(lse, true_lse, plain_lse, atol=noise, label=f"{label} lse")
    assert_accurate(out, true_out, plain_out, atol=noise * largest, label=f"{label} out")


def score_noise(q, k, lse, softmax_scale) -> float:
    """SCORE_NOISE times the largest magnitude that a score passes through."""
    longest = [
        x.double().norm(dim=-1).nan_to_num().max().item() if x.numel() else 0.0 for x in (q, k)
    ]
    finite = lse[lse.isfinite()].abs()
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else abs(softmax_scale)
    largest = longest[0] * longest[1] * scale + (finite.max().item() if finite.numel() else 0.0)
    return SCORE_NOISE * (1.0 + largest)


def assert_gradients_accurate(actual, function, problem: Problem, tensors, dout, label=""):
    """Hold (dq, dk, dv) to twice plain PyTorch's error against autograd in float64.

    `function(q, k, v, dtype=...)` is the reference. Plain PyTorch keeps P and may be exact where a
    row sees a single key: P = 1, dS = 0. A flash backward recomputes P = exp(s - lse) from a stored
    lse, and subtracts delta, made from the stored out, from dP. What a row can lose by these
    roundings is granted: P is off by the noise of one score, dP and delta (each at most
    |dout| * |v|) by one rounding of their own. Where many rows crowd on one key, their losses add
    up like random numbers, by the root of their weights' sum.
    """
    truth = autograd(lambda *x: function(*x, dtype=torch.float64)[0], tensors, dout)
    plain = autograd(lambda *x: function(*x, dtype=problem.dtype)[0], tensors, dout)
    q, k, v = (x.detach().double() for x in tensors)
    if min(q.numel(), k.numel()) == 0:
        assert all(torch.count_nonzero(x) == 0 for x in actual)
        return
    v.requires_grad_()
    out, lse = function(q, k, v, dtype=torch.float64)
    weights = torch.autograd.grad(out, v, torch.ones_like(out))[0]  # of each key, over all rows
    crowd = max(1.0, weights.max().item()) ** 0.5
    noise = score_noise(q, k, lse, problem.softmax_scale)
    scale = abs(problem.softmax_scale or problem.d**-0.5)
    loss = (dout.double().norm(dim=-1).max() * v.norm(dim=-1).max()).item() * scale
    roundings = 2 if ON_GPU else 1  # there dS is rounded too, before it meets keys and queries
    loss *= roundings * torch.finfo(problem.dtype).eps + noise
    atols = (loss * k.abs().max(), crowd * loss * q.abs().max(), crowd * noise * dout.abs().max())
    for name, ours, true, yard, atol in zip(
        ("dq", "dk", "dv"), actual, truth, plain, atols, strict=True
    ):
        assert ours.dtype == problem.dtype
        assert_accurate(ours, true, yard, atol=float(atol), label=f"{label} {name}")


def autograd(function, tensors, dout):
    """(dq, dk, dv) of function(q, k, v) for the gradient `dout` of its output."""
    leaves = [x.detach().requires_grad_() for x in tensors]
    out = function(*leaves)
    return torch.autograd.grad(out, leaves, dout.to(out.dtype))


def with_examples(problems, *others):
    """Explicit examples for a @given test: these problems, each with the same other arguments."""

    def decorate(test):
        for problem in problems:
            test = example(problem, *others)(test)
        return test

    return decorate


def without_softcap(problems):
    return [dataclasses.replace(problem, softcap=0.0) for problem in problems]


# Many features at once, so that a short run meets them too: grouped heads, a window that opens
# inside a segment, blind rows, slopes per batch entry, every layout.
RICH_DENSE = (
    Problem(
        *((200, 200), (600, 600), 6, 2, 40, FINEST),
        layout="gapped",
        causal=True,
        window_size=(300, -1),
        softcap=1.5,
        alibi="batch",
        deterministic=True,
    ),
    Problem(
        (90,), (70,), 4, 2, 33, torch.float16, layout="heads_first", window_size=(5, 60), seed=1
    ),
    Problem((3, 3), (1100, 1100), 8, 2, 128, torch.bfloat16, window_size=(-1, 0), alibi="heads"),
)
RICH_PACKS = (
    Problem(
        *((70, 0, 3, 130), (600, 64, 0, 65), 6, 2, 40, FINEST),
        layout="gapped",
        causal=True,
        window_size=(300, -1),
        softcap=1.5,
        alibi="batch",
    ),
    Problem(
        *((5, 90), (1100, 70), 4, 2, 33, torch.float16),
        layout="heads_first",
        window_size=(5, 60),
        deterministic=True,
        seed=1,
    ),
    Problem((1, 1, 1), (64, 513, 1), 8, 2, 128, torch.bfloat16, causal=True, alibi="heads"),
)


@st.composite
def options(draw: st.DrawFn, s_k: int, softcap: bool = True) -> dict[str, Any]:
    """Masks and score modifications, each about half of the time."""
    side = st.one_of(st.integers(0, 4), st.integers(0, s_k + 3), st.just(-1))
    return {
        "dtype": draw(st.sampled_from(DTYPES)),
        "layout": draw(st.sampled_from(LAYOUTS)),
        "amplitude": draw(st.sampled_from([1.0, 0.25, 3.0])),
        "causal": draw(st.booleans()),
        "window_size": draw(st.one_of(st.just((-1, -1)), st.tuples(side, side))),
        "softcap": draw(st.sampled_from([0.0, 0.0, 1.5, 30.0] if softcap else [0.0])),
        "alibi": draw(st.sampled_from([None, None, "heads", "batch"])),
        "softmax_scale": draw(st.sampled_from([None, None, 0.3])),
        "deterministic": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


@st.composite
def heads(draw: st.DrawFn, most: int) -> dict[str, int]:
    """Multi-head, grouped and multi-query: at most `most` query heads."""
    h_kv = draw(st.integers(1, min(3, most)))
    return {"h_kv": h_kv, "h_q": h_kv * draw(st.integers(1, max(1, min(4, most // h_kv))))}


@st.composite
def dense_problems(draw: st.DrawFn, budget: int = BUDGET, softcap: bool = True) -> Problem:
    """A batch of equal lengths."""
    d = draw(HEAD_DIMS)
    s_k = draw(LENGTHS)
    s_q = min(draw(LENGTHS), max(1, budget // (s_k * d)))
    b = draw(st.integers(1, max(1, min(3, budget // (s_q * s_k * d)))))
    return Problem(
        seqlens_q=(s_q,) * b,
        seqlens_k=(s_k,) * b,
        d=d,
        **draw(heads(max(1, budget // (b * s_q * s_k * d)))),
        **draw(options(s_k, softcap)),
    )


@st.composite
def varlen_problems(draw: st.DrawFn, budget: int = BUDGET, softcap: bool = True) -> Problem:
    """A pack of up to five ragged sequences, some of them empty on either side."""
    d = draw(HEAD_DIMS)
    length = st.one_of(LENGTHS, SHORT, st.just(0))
    pairs = []
    left = budget // d
    for s_q, s_k in draw(st.lists(st.tuples(length, length), min_size=1, max_size=5)):
        s_q = min(s_q, max(1, left // max(1, s_k)))
        left = max(0, left - s_q * s_k)
        pairs.append((s_q, s_k))
    work = sum(s_q * s_k for s_q, s_k in pairs) * d
    return Problem(
        seqlens_q=tuple(s_q for s_q, _ in pairs),
        seqlens_k=tuple(s_k for _, s_k in pairs),
        d=d,
        **draw(heads(max(1, budget // max(1, work)))),
        **draw(options(max(s_k for _, s_k in pairs), softcap)),
    )
