"""flash_attn_with_kvcache: what it appends, what it leaves alone, and what it attends to.

`CacheCall` states one call and its expected effect on the caches, row by row. Unused cache rows,
left padding and page tails hold NaN throughout.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from device import DEVICE, DTYPES, page_size
from hypothesis import example, given
from hypothesis import strategies as st
from strategies import (
    BUDGET,
    HEAD_DIMS,
    LENGTHS,
    SEGMENT,
    SHORT,
    Problem,
    assert_forward_accurate,
    heads,
    laid_out,
    options,
)

from flash_attn import determinism, flash_attn_func, flash_attn_with_kvcache
from flash_attn.layers.rotary import apply_rotary_emb
from flash_attn.reference import attention_varlen
from flash_attn.testing import (
    assert_bitwise_equal,
    cumulative_lengths,
    padded_rows,
    page_table,
    paged_rows,
    random_normal,
)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


@dataclasses.dataclass(frozen=True)
class CacheCall:
    """One call. `problem.seqlens_k` are the cache rows in use before it, left padding included."""

    problem: Problem
    s_new: int = 0
    capacity_beyond: int = 0
    page: int | None = None
    leftpad: tuple[int, ...] | None = None
    shuffled: bool = False  # cache_batch_idx: sequences lie in other rows of a larger cache
    rotary_dim: int = 0
    interleaved: bool = True
    lengths_as: str = "tensor"
    num_splits: int = 0

    @property
    def capacity(self) -> int:
        """Rows that one sequence can hold: of the cache, or in the pages that its table names."""
        rows = max(self.problem.seqlens_k) + self.s_new + self.capacity_beyond
        return rows if self.page is None else max(1, -(-rows // self.page)) * self.page

    def normal(self, *shape: int, stream: int) -> torch.Tensor:
        p = self.problem
        values = random_normal(shape, seed=p.seed * 16 + stream) * p.amplitude
        return laid_out(values.to(DEVICE, p.dtype), p.layout)

    def new_rows(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """k and v to append, (b, s_new, h_kv, d)."""
        if not self.s_new:
            return None, None
        shape = (self.problem.batch, self.s_new, self.problem.h_kv, self.problem.d)
        return self.normal(*shape, stream=3), self.normal(*shape, stream=4)

    def cache_batch_idx(self) -> torch.Tensor | None:
        """Row 0 of the cache belongs to nobody, the sequences lie backwards from the end."""
        return int32(*range(self.problem.batch, 0, -1)) if self.shuffled else None

    def caches(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """k_cache, v_cache and the block table if there are pages."""
        p = self.problem
        pads = self.leftpad or (0,) * p.batch
        rows = []
        for stream in (1, 2):
            packed = self.normal(sum(p.seqlens_k), p.h_kv, p.d, stream=stream)
            parts = [part.clone() for part in packed.split(p.seqlens_k)]
            for part, pad in zip(parts, pads, strict=True):
                part[:pad] = torch.nan
            rows.append(parts)
        if self.page is not None:
            grown = [length + self.s_new for length in p.seqlens_k]
            table, num_pages = page_table(grown, self.page, seed=p.seed, device=DEVICE)
            k_cache, v_cache = (paged_rows(x, table, num_pages, self.page) for x in rows)
            return laid_out(k_cache, p.layout), laid_out(v_cache, p.layout), table
        if self.shuffled:
            nobody = rows[0][0].new_empty(0, p.h_kv, p.d)
            rows = [[nobody, *reversed(parts)] for parts in rows]
        k_cache, v_cache = (padded_rows(x, self.capacity) for x in rows)
        return laid_out(k_cache, p.layout), laid_out(v_cache, p.layout), None

    def cos_sin(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(capacity + s_q, rotary_dim / 2) each, in q's dtype."""
        if not self.rotary_dim:
            return None, None
        rows = self.capacity + self.problem.seqlens_q[0]
        frequencies = 10000.0 ** -(torch.arange(self.rotary_dim // 2) / (self.rotary_dim // 2))
        angles = torch.arange(rows)[:, None] * frequencies
        cos, sin = (x.to(DEVICE, self.problem.dtype) for x in (angles.cos(), angles.sin()))
        return cos, sin

    def cache_seqlens(self) -> torch.Tensor | int | None:
        lengths = self.problem.seqlens_k
        if self.lengths_as == "tensor":
            return int32(*lengths)
        return lengths[0] if self.lengths_as == "int" else None

    def rotated(self, q: torch.Tensor, k_new: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k as they enter the scores, by the layer's own rotation."""
        cos, sin = self.cos_sin()
        starts = int32(*self.problem.seqlens_k)
        turn = {"interleaved": self.interleaved, "seqlen_offsets": starts}
        window = self.problem.window_size
        by_position = self.problem.causal or any(0 <= side < self.capacity for side in window)
        if by_position:
            turned_q = apply_rotary_emb(q, cos, sin, **turn)
        else:  # every row of a sequence turns by the same angle
            side_by_side = q.flatten(1, 2).unsqueeze(1)  # (b, 1, s_q * h_q, d)
            turned_q = apply_rotary_emb(side_by_side, cos, sin, **turn).view_as(q.contiguous())
        return turned_q, apply_rotary_emb(k_new, cos, sin, **turn)


def rows_of(cache, table, cache_batch_idx, b: int, length: int) -> tuple[torch.Tensor, ...]:
    """Index of the first `length` cache rows of sequence b: usable to read and to write."""
    positions = torch.arange(length, device=DEVICE)
    if table is None:
        row = b if cache_batch_idx is None else int(cache_batch_idx[b])
        return torch.full_like(positions, row), positions
    page = cache.shape[1]
    return table[b].long()[positions // page], positions % page


def verify(call: CacheCall) -> None:
    """Run one call; hold caches to the byte, out and lse to the float64 reference."""
    p = call.problem
    q = call.normal(p.batch, p.seqlens_q[0], p.h_q, p.d, stream=0)
    k_new, v_new = call.new_rows()
    k_cache, v_cache, table = call.caches()
    cos, sin = call.cos_sin()
    index = call.cache_batch_idx()
    expected_k, expected_v, q_before = k_cache.clone(), v_cache.clone(), q.clone()
    with determinism.deterministic(p.deterministic):
        out, lse = flash_attn_with_kvcache(
            q,
            k_cache,
            v_cache,
            k_new,
            v_new,
            rotary_cos=cos,
            rotary_sin=sin,
            cache_seqlens=call.cache_seqlens(),
            cache_batch_idx=index,
            cache_leftpad=None if call.leftpad is None else int32(*call.leftpad),
            block_table=table,
            rotary_interleaved=call.interleaved,
            num_splits=call.num_splits,
            return_softmax_lse=True,
            **p.options(),
        )
    assert_bitwise_equal(q, q_before, "q is an input")
    seen_q, turned_k = call.rotated(q, k_new) if call.rotary_dim else (q, k_new)
    keys, values, lengths = [], [], []
    for b, length in enumerate(p.seqlens_k):
        rows = rows_of(k_cache, table, index, b, length + call.s_new)
        if call.s_new:
            new = tuple(x[length:] for x in rows)
            expected_k[new], expected_v[new] = turned_k[b], v_new[b]
        first = 0 if call.leftpad is None else call.leftpad[b]
        keys.append(expected_k[rows][first:])
        values.append(expected_v[rows][first:])
        lengths.append(len(keys[-1]))
    assert_bitwise_equal(k_cache, expected_k, "k_cache")
    assert_bitwise_equal(v_cache, expected_v, "v_cache")
    cu_q, cu_k = (cumulative_lengths(x, DEVICE) for x in (p.seqlens_q, lengths))
    assert out.shape == q.shape and lse.shape == (p.batch, p.h_q, p.seqlens_q[0])
    assert_forward_accurate(
        (out.flatten(0, 1), lse.transpose(0, 1).flatten(1)),
        attention_varlen,
        (seen_q.flatten(0, 1), torch.cat(keys), torch.cat(values), cu_q, cu_k),
        p.options(),
        p.dtype,
    )


@st.composite
def cache_calls(draw: st.DrawFn) -> CacheCall:
    d = draw(HEAD_DIMS)
    lengths_as = draw(st.sampled_from(["tensor", "tensor", "int", "none"]))
    s_new = 0 if lengths_as == "none" else draw(st.one_of(st.just(0), SHORT, st.integers(1, 80)))
    lengths = draw(st.lists(st.one_of(LENGTHS, st.just(0)), min_size=1, max_size=3))
    if lengths_as != "tensor":
        lengths = [lengths[0]] * len(lengths)
    where = draw(st.sampled_from(["cache", "leftpad", "shuffled", "both", "paged", "paged"]))
    if lengths_as == "none" and where == "paged":
        where = "cache"  # the capacity is a whole number of pages then: a test of its own
    beyond = 0 if lengths_as == "none" or where == "paged" else draw(st.integers(0, 40))
    capacity = max(lengths) + s_new + beyond
    if capacity == 0:
        lengths, capacity = [1] * len(lengths), 1
    s_q = min(draw(st.one_of(st.just(1), SHORT, LENGTHS)), max(1, BUDGET // (capacity * d)))
    rotary_dims = [n for n in (16, 32, 64, 128) if n <= d] if s_new else []
    return CacheCall(
        problem=Problem(
            seqlens_q=(min(s_q, capacity),) * len(lengths),
            seqlens_k=tuple(lengths),
            d=d,
            **draw(heads(max(1, BUDGET // (len(lengths) * s_q * capacity * d)))),
            **draw(options(capacity)),
        ),
        s_new=s_new,
        capacity_beyond=beyond,
        page=page_size(draw(st.sampled_from([1, 2, 7, 16, 64, 256]))) if where == "paged" else None,
        leftpad=tuple(draw(st.integers(0, min(n, 70))) for n in lengths)
        if where in ("leftpad", "both")
        else None,
        shuffled=where in ("shuffled", "both"),
        rotary_dim=draw(st.sampled_from([0, *rotary_dims])),
        interleaved=draw(st.booleans()),
        lengths_as=lengths_as,
        num_splits=draw(st.sampled_from([0, 0, 1, 3, 128])),
    )


@example(
    CacheCall(
        Problem(
            *((9, 9, 9), (530, 0, 64), 6, 2, 40, torch.bfloat16),
            layout="gapped",
            causal=True,
            window_size=(200, -1),
            alibi="batch",
        ),
        s_new=9,
        page=page_size(7),
        rotary_dim=32,
    )
)
@given(cache_calls())
def test_random_calls(call: CacheCall):
    """Any combination of append, rotation, padding, batch index, pages and masks."""
    verify(call)


# Seven queries after 130 and 5 used rows: ragged, across two blocks; d = 40 is no multiple of 16.
RAGGED = Problem((7, 7), (130, 5), h_q=4, h_kv=2, d=40, dtype=torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(
    "mask", [{}, {"causal": True}, {"window_size": (9, -1)}, {"window_size": (-1, 3)}], ids=str
)
def test_rotation(dtype, interleaved, mask):
    """Causal and local queries turn by cache_seqlens + i, all others by cache_seqlens."""
    problem = dataclasses.replace(RAGGED, dtype=dtype, **mask)
    verify(CacheCall(problem, s_new=7, rotary_dim=32, interleaved=interleaved))


def test_rotation_positions_matter():
    """Control for the test above: a mask that lets every row see all still moves the angles."""
    call = CacheCall(RAGGED, s_new=7, rotary_dim=32)
    local = CacheCall(dataclasses.replace(RAGGED, window_size=(9, -1)), s_new=7, rotary_dim=32)
    q, (k_new, _) = call.normal(2, 7, 4, 40, stream=0), call.new_rows()
    still, turning = call.rotated(q, k_new)[0], local.rotated(q, k_new)[0]
    assert torch.equal(still[:, 0], turning[:, 0]) and not torch.equal(still[:, 1], turning[:, 1])


def test_rotation_is_interleaved_by_default():
    """rotary_interleaved defaults to True here (and to False in flash_attn.layers.rotary)."""
    call = CacheCall(RAGGED, s_new=2, rotary_dim=32)
    results = []
    for choice in ({}, {"rotary_interleaved": True}, {"rotary_interleaved": False}):
        k_cache, v_cache, _ = call.caches()
        q, (k_new, v_new), (cos, sin) = RAGGED.dense_queries(), call.new_rows(), call.cos_sin()
        lengths = call.cache_seqlens()
        flash_attn_with_kvcache(q, k_cache, v_cache, k_new, v_new, cos, sin, lengths, **choice)
        results.append(k_cache[0, 130:132])
    assert_bitwise_equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.parametrize("s_q", [1, 3, 66])
@pytest.mark.parametrize("s_new", [1, 5, 70])
@pytest.mark.parametrize("page", [None, page_size(1), 48])
def test_append_length_differs_from_queries(s_q, s_new, page):
    """s_new and s_q are independent; the mask is aligned to the cache's end after the append."""
    problem = dataclasses.replace(RAGGED, seqlens_q=(s_q, s_q), causal=True)
    verify(CacheCall(problem, s_new=s_new, page=page))


@pytest.mark.parametrize("d", [1, 20, 33, 255])
@pytest.mark.parametrize("page", [None, 16])
def test_head_dims_that_need_padding(d, page):
    """d % 8 != 0: what is appended still lands in the caller's cache, not in a padded copy."""
    verify(CacheCall(dataclasses.replace(RAGGED, d=d), s_new=3, page=page))


def test_no_lengths_means_the_full_capacity():
    """cache_seqlens=None attends to every row, also of a paged cache (max_blocks * page rows)."""
    problem = dataclasses.replace(RAGGED, seqlens_k=(96, 96))
    verify(CacheCall(problem, lengths_as="none"))
    verify(CacheCall(problem, lengths_as="none", page=32))
    verify(CacheCall(problem, lengths_as="none", shuffled=True, leftpad=(0, 17)))


@pytest.mark.parametrize("where", ["cache", "shuffled", "paged"])
def test_one_length_for_all(where):
    """An int counts for each of q's sequences, however many rows or pages the cache has."""
    problem = dataclasses.replace(RAGGED, seqlens_k=(77, 77))
    page = 16 if where == "paged" else None
    verify(CacheCall(problem, 3, 30, page, shuffled=where == "shuffled", lengths_as="int"))


def test_padding_may_reach_into_the_appended_rows():
    """A sequence whose whole past is padding sees only what the call appends."""
    verify(CacheCall(RAGGED, s_new=4, leftpad=(130, 5)))


def test_everything_is_padding():
    """No key is left: out is zero and lse is +inf, and only for that sequence."""
    call = CacheCall(RAGGED, leftpad=(130, 0))
    verify(call)
    k_cache, v_cache, _ = call.caches()
    out, lse = flash_attn_with_kvcache(
        RAGGED.dense_queries(),
        k_cache,
        v_cache,
        cache_seqlens=call.cache_seqlens(),
        cache_leftpad=int32(*call.leftpad),
        return_softmax_lse=True,
    )
    assert torch.count_nonzero(out[0]) == 0 and torch.count_nonzero(out[1]) > 0
    assert lse[0].isposinf().all() and lse[1].isfinite().all()


def test_empty_cache():
    """Nothing in the cache and nothing appended: zero and +inf; with an append, only that."""
    problem = dataclasses.replace(RAGGED, seqlens_k=(0, 0))
    verify(CacheCall(problem, capacity_beyond=20))
    verify(CacheCall(problem, s_new=7, rotary_dim=16))


@pytest.mark.parametrize("deterministic", [False, True])
def test_num_splits_is_accurate_at_any_count(deterministic):
    """0 to 128 splits over 4 segments of keys: every fold is within the bound."""
    lengths = (3 * SEGMENT + 70, 40)
    problem = dataclasses.replace(RAGGED, seqlens_k=lengths, deterministic=deterministic)
    for num_splits in (0, 1, 2, 3, 7, 64, 128):
        verify(CacheCall(problem, s_new=7, num_splits=num_splits))


def test_arguments_are_left_alone():
    """Index tensors, new rows and rotary tables keep their bytes; there is no gradient."""
    call = CacheCall(RAGGED, s_new=3, rotary_dim=32, shuffled=True, leftpad=(2, 1))
    k_cache, v_cache, _ = call.caches()
    k_new, v_new = call.new_rows()
    inputs = {
        "k": k_new,
        "v": v_new,
        "rotary_cos": call.cos_sin()[0],
        "rotary_sin": call.cos_sin()[1],
        "cache_seqlens": call.cache_seqlens(),
        "cache_batch_idx": call.cache_batch_idx(),
        "cache_leftpad": int32(*call.leftpad),
    }
    before = {name: x.clone() for name, x in inputs.items()}
    q = RAGGED.dense_queries().requires_grad_()
    out = flash_attn_with_kvcache(q, k_cache, v_cache, **inputs)
    assert isinstance(out, torch.Tensor) and not out.requires_grad
    for name, x in inputs.items():
        assert_bitwise_equal(x, before[name], name)


@pytest.mark.parametrize("page", [None, page_size(1), page_size(24)])
def test_decoding_token_by_token_is_the_prefill(page):
    """140 appends of one row, from an empty cache: each output has the causal prefill's bytes."""
    problem = Problem((140,), (140,), h_q=4, h_kv=2, d=32, dtype=torch.float16, causal=True)
    q, k, v = problem.dense()
    blank = CacheCall(dataclasses.replace(problem, seqlens_k=(0,)), s_new=140, page=page)
    k_cache, v_cache, table = blank.caches()
    with determinism.deterministic():
        prefill = flash_attn_func(q, k, v, causal=True)
        for i in range(140):
            now = slice(i, i + 1)
            out = flash_attn_with_kvcache(
                q[:, now],
                k_cache,
                v_cache,
                k[:, now],
                v[:, now],
                cache_seqlens=int32(i),
                block_table=table,
                causal=True,
            )
            assert_bitwise_equal(out, prefill[:, now], f"token {i}")
