"""Bad input to flash_attn_with_kvcache: a refused call, above all a refused append, writes nothing.

Tools in test_errors.py: every case compares the bytes of both caches before and after.
"""

import math
from typing import Any

import pytest
import torch
from device import DEVICE, page_size
from test_errors import (
    ALIBI,
    BATCH,
    DTYPE,
    HEADS,
    SAME_KEY,
    SAME_VALUE,
    WINDOWS,
    Case,
    Function,
    assert_refused,
    by_id,
    filled,
    half,
    ints,
    ones,
)
from test_errors_varlen import index_cases

from flash_attn import _checks, determinism, flash_attn_with_kvcache
from flash_attn._arguments import Append, Cache, Scoring
from flash_attn.testing import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("contents_are_checked")

# b = 2, s_q = 3, h_q = 4, h_kv = 2, d = 32. Three rows of 20 keys, of which 4 and 10 are in use,
# and 2 new keys. Paged: six pages of 4 keys, three a sequence (capacity 12), 4 and 9 keys in use;
# on a GPU four times as many of each.
X = page_size(4) // 4
Q, NEW = half(2, 3, 4, 32), half(2, 2, 2, 32)
CACHE = torch.randn(3, 20, 2, 32).half().to(DEVICE)
PAGES = torch.randn(6, 4 * X, 2, 32).half().to(DEVICE)
TABLE = ints([5, 0, 3], [1, 2, 4])
APPEND = {"k": NEW, "v": NEW}
ROTARY = {"rotary_cos": half(20, 8), "rotary_sin": half(20, 8)}


def caches(cache: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"k_cache": cache, "v_cache": cache}


def in_deterministic_mode(**arguments: Any) -> torch.Tensor:
    with determinism.deterministic():
        return flash_attn_with_kvcache(**arguments)


ARGUMENTS = {"q": Q, "cache_seqlens": ints(4, 10)} | caches(CACHE)
PAGED_ARGUMENTS = {"q": Q, "cache_seqlens": ints(4 * X, 9 * X), "block_table": TABLE} | caches(
    PAGES
)
decode = Function("decode", flash_attn_with_kvcache, ARGUMENTS)
append = Function("append", flash_attn_with_kvcache, ARGUMENTS | APPEND)
rotated = Function("rotated", flash_attn_with_kvcache, ARGUMENTS | APPEND | ROTARY)
paged = Function("paged", flash_attn_with_kvcache, PAGED_ARGUMENTS | APPEND)
strict = Function("strict", in_deterministic_mode, ARGUMENTS | APPEND)
strict_paged = Function("strict_paged", in_deterministic_mode, PAGED_ARGUMENTS | APPEND)

# ---- The call and its caches ---------------------------------------------------------------------

CACHE_SHAPE = "k_cache must have shape (b_cache, s_cache, h_kv, d)"
STRIDE = "must have contiguous last dimension"
ANY_CALL = [
    ("scale", {"softmax_scale": math.nan}, "softmax_scale is not finite", "softmax_scale=nan"),
    ("softcap", {"softcap": -1.0}, "softcap is out of range", "softcap=-1.0"),
    ("splits_129", {"num_splits": 129}, "num_splits > 128 not supported", "num_splits=129"),
    ("splits_-1", {"num_splits": -1}, "num_splits must not be negative", "num_splits=-1"),
    *((f"window_{i}", changes, *text) for i, (changes, *text) in enumerate(WINDOWS)),
    *((f"alibi_{id}", {"alibi_slopes": slopes}, *text) for id, slopes, *text in ALIBI),
    ("q_dtype", {"q": Q.bfloat16()}, SAME_KEY, "q of torch.bfloat16, k_cache of torch.float16"),
    ("v_cache_dtype", {"v_cache": CACHE.float()}, SAME_VALUE, "v_cache of torch.float32"),
    ("fp64", {"q": Q.double()} | caches(CACHE.double()), DTYPE, "torch.float64"),
    ("q_rank", {"q": half(3, 4, 32)}, "q must have shape (b, s_q, h_q, d)", "(3, 4, 32)"),
    ("k_cache_rank", caches(CACHE[0]), CACHE_SHAPE, "(20, 2, 32)"),
    ("k_cache_d", caches(half(3, 20, 2, 16)), CACHE_SHAPE, "(3, 20, 2, 16)"),
    ("v_cache_shape", {"v_cache": CACHE[:, :-1]}, "v_cache must have shape", "(3, 19, 2, 32)"),
    ("heads", caches(half(3, 20, 3, 32)), HEADS, "h_q=4, h_kv=3"),
    ("no_batch", {"q": Q[:0], "cache_seqlens": None}, BATCH, "b=0"),
    (
        "d_264",
        {"q": half(2, 3, 4, 264)} | caches(half(3, 20, 2, 264)),
        "forward only supports head dimension at most 256",
        "d=264",
    ),
    ("few_rows", caches(CACHE[:1]), CACHE_SHAPE, "k_cache of shape (1, 20, 2, 32) and q with b=2"),
    ("k_cache_stride", {"k_cache": CACHE.mT.contiguous().mT}, f"k_cache {STRIDE}", "strides"),
    ("v_cache_stride", {"v_cache": CACHE.mT.contiguous().mT}, f"v_cache {STRIDE}", "strides"),
    ("too_long", {"cache_seqlens": ints(4, 21)}, "exceeds the capacity of k_cache", "[1] = 21"),
    ("negative", {"cache_seqlens": ints(4, -1)}, "cache_seqlens must not be", "[1] = -1"),
    ("int_negative", {"cache_seqlens": -1}, "cache_seqlens must not be negative", "=-1"),
    ("int_too_long", {"cache_seqlens": 21}, "exceeds the capacity of k_cache", "= 21"),
    ("row", {"cache_batch_idx": ints(0, 3)}, "cache_batch_idx names a row outside", "[1] = 3"),
    ("row_-1", {"cache_batch_idx": ints(-1, 0)}, "cache_batch_idx names a row outside", "[0] = -1"),
    ("leftpad", {"cache_leftpad": ints(4, 11)}, "cache_leftpad is out", "11 where sequence 1 has"),
    ("leftpad_-1", {"cache_leftpad": ints(-1, 0)}, "cache_leftpad is out of range", "[0] = -1"),
    (
        "leftpad_full",
        {"cache_leftpad": ints(20, 21), "cache_seqlens": None},
        "cache_leftpad is out of range",
        "cache_leftpad[1] = 21 where sequence 1 has 20",
    ),
    ("v_alone", {"v": NEW}, "If value is supplied, key must also be passed in", "v without k"),
    (
        "rotary_alone",
        ROTARY,
        r"If rotary cos/sin are provided, new key / value to be appended to KV cache must also be",
        "without k",
    ),
]

# ---- Appends -------------------------------------------------------------------------------------

NEW_SHAPE = "must have shape (b, s_new, h_kv, d)"
APPENDS = [
    ("no_v", {"v": None}, "If key is supplied, value must also be passed in", "k without v"),
    (
        "no_seqlens",
        {"cache_seqlens": None},
        "If key is supplied, seqlens_k must also be passed in",
        "k without cache_seqlens",
    ),
    (
        "s_q",
        {"q": half(2, 21, 4, 32)},
        "If key is supplied, seqlen_q must be <= seqlen_k",
        "s_q=21, capacity=20",
    ),
    ("k_dtype", {"k": NEW.float()}, SAME_KEY, "k of torch.float32"),
    ("v_dtype", {"v": NEW.float()}, SAME_VALUE, "v of torch.float32"),
    ("k_rank", {"k": NEW[0]}, f"k {NEW_SHAPE}", "(2, 2, 32)"),
    ("k_batch", {"k": half(1, 2, 2, 32)}, f"k {NEW_SHAPE}", "(1, 2, 2, 32)"),
    ("k_heads", {"k": half(2, 2, 4, 32)}, f"k {NEW_SHAPE}", "(2, 2, 4, 32)"),
    ("v_length", {"v": half(2, 1, 2, 32)}, f"v {NEW_SHAPE}", "(2, 1, 2, 32)"),
    ("past_end", {"cache_seqlens": ints(4, 19)}, "runs past the end of k_cache", "[1] = 19, s_new"),
    ("int_past_end", {"cache_seqlens": 19}, "runs past the end of k_cache", "= 19, s_new=2"),
    ("negative", {"cache_seqlens": ints(-2, 4)}, "cache_seqlens must not be", "[0] = -2"),
    ("too_many", {n: half(2, 21, 2, 32) for n in "kv"}, "the append of 21 key(s)", "capacity=20"),
    ("row", {"cache_batch_idx": ints(0, 3)}, "cache_batch_idx names a row outside", "[1] = 3"),
    ("leftpad", {"cache_leftpad": ints(7, 0)}, "cache_leftpad is out of range", "7 where sequence"),
]
ROTARY_SHAPE = "must have shape (s_rotary, rotary_dim / 2)"
ROTARIES = [
    ("no_sin", {"rotary_sin": None}, "If rotary cos is provided, rotary sin must", "cos alone"),
    ("no_cos", {"rotary_cos": None}, "rotary sin must also be provided", "rotary_sin alone"),
    ("cos_rank", {"rotary_cos": half(8)}, f"rotary_cos {ROTARY_SHAPE}", "(8,)"),
    ("sin_shape", {"rotary_sin": half(19, 8)}, f"rotary_sin {ROTARY_SHAPE}", "(19, 8)"),
    ("cos_dtype", {"rotary_cos": half(20, 8).float()}, "rotary_cos must have the same", "float32"),
    ("stride", {"rotary_sin": half(8, 20).t()}, "rotary_sin must be contiguous", "strides (1, 20)"),
    (
        "wide",
        {n: half(20, 24) for n in ROTARY},
        "rotary_dim must be <= headdim",
        "rotary_dim=48, d=32",
    ),
    (
        "odd",
        {n: half(20, 4) for n in ROTARY},
        "Only rotary dimensions divisible by 16",
        "rotary_dim=8",
    ),
    (
        "short",
        {n: half(19, 8) for n in ROTARY},
        "cos/sin seqlen must be at least the seqlen of KV cache",
        "19 rows, capacity=20",
    ),
    (
        "query_past_table",  # 2 new keys end at row 19, but the third causal query is at 20
        {"cache_seqlens": ints(4, 18), "causal": True},
        "cos/sin seqlen must reach the last query",
        "20 rows and a query at position 20",
    ),
]

# ---- Pages and determinism -----------------------------------------------------------------------

BAD_PAGE = "block_table names a page outside the cache"
ONE_PLACE = "makes sequences append to one place"
PAGED = [
    (
        "past_table",
        {"cache_seqlens": ints(4, 12 * X - 1)},
        "past the end of block_table",
        f"[1] = {12 * X - 1}, s_new",
    ),
    ("page", {"block_table": ints([5, 6, 3], [1, 2, 4])}, BAD_PAGE, "block_table[0, 1] = 6"),
    ("new_page", {"block_table": ints([5, 9, 3], [1, 2, 4])}, BAD_PAGE, "block_table[0, 1] = 9"),
    ("page_-1", {"block_table": ints([5, 0, 3], [1, 2, -1])}, BAD_PAGE, "block_table[1, 2] = -1"),
    (
        "page_size_0",
        caches(half(6, 0, 2, 32)),
        "Paged KV cache block size must be divisible by 16",
        "page size 0",
    ),
    (
        "batch_idx",
        {"cache_batch_idx": ints(0, 1)},
        "Paged KVcache does not support cache_batch_idx",
        "block_table and cache_batch_idx",
    ),
    (
        "leftpad",
        {"cache_leftpad": ints(0, 0)},
        "We don't support Paged KV and leftpad_k",
        "block_table and left padding",
    ),
    ("cache_rank", caches(half(24, 2, 32)), "shape (num_blocks, page_size, h_kv", "(24, 2, 32)"),
    (
        "int_past",
        {"cache_seqlens": 12 * X - 1},
        "runs past the end of block_table",
        f"capacity={12 * X}",
    ),
]
STRICT_CASES = [
    Case(
        strict,
        "one_row",
        {"cache_batch_idx": ints(1, 1)},
        f"cache_batch_idx {ONE_PLACE}",
        "row 1 of the cache 2 times",
    ),
    Case(
        strict_paged,
        "one_page",  # both write rows 1 and 2 of page 2
        {"block_table": ints([5, 2, 3], [1, 2, 4]), "cache_seqlens": ints(5 * X, 5 * X)},
        f"block_table {ONE_PLACE}",
        f"row {9 * X} of the cache 2 times",
    ),
    Case(
        strict_paged,
        "one_page_int",
        {"block_table": ints([5, 2, 3], [1, 2, 4]), "cache_seqlens": 5 * X},
        f"block_table {ONE_PLACE}",
        f"row {9 * X} of the cache 2 times",
    ),
]

# A tensor without memory stands for one on another device; see test_errors.py.
OPTIONS = {
    "cache_batch_idx": ints(0, 1),
    "cache_leftpad": ints(0, 0),
    "block_table": None,
    "softmax_scale": 0.25,
    "softcap": 0.0,
    "alibi_slopes": ones(4),
    "num_splits": 0,
}


def ask_kvcache(q: torch.Tensor, num_splits: int, **given: Any) -> None:
    cache = Cache(
        given["k_cache"],
        given["v_cache"],
        given["cache_seqlens"],
        given["cache_batch_idx"],
        given["cache_leftpad"],
        given["block_table"],
    )
    _checks.check_kvcache(q, cache, filled(Append, given), filled(Scoring, given), num_splits)


check_kvcache = Function("check_kvcache", ask_kvcache, OPTIONS | ARGUMENTS | APPEND | ROTARY)
DEVICES = [
    Case(check_kvcache, name, {name: x.to("meta")}, f"{name} is not on the device of q", "on meta")
    for name, x in check_kvcache.arguments.items()
    if isinstance(x, torch.Tensor) and name != "q"
]

CASES = [
    *(Case(decode, *row) for row in ANY_CALL),
    *(Case(append, *row) for row in APPENDS),
    *(Case(rotated, *row) for row in ROTARIES),
    *(Case(paged, *row) for row in PAGED),
    *index_cases(decode, "cache_seqlens", "b", ints(4, 10)),
    *index_cases(append, "cache_batch_idx", "b", ints(0, 1)),
    *index_cases(append, "cache_leftpad", "b", ints(0, 1)),
    *index_cases(paged, "block_table", "b, max_blocks", TABLE),
    *STRICT_CASES,
    *DEVICES,
]


@pytest.mark.parametrize("case", by_id(CASES))
def test_refused(case: Case):
    """Each message says what was wrong, what came and the rule; the caches keep every byte."""
    assert_refused(case)


# ---- Controls ------------------------------------------------------------------------------------

EVERY = (decode, append, rotated, paged, strict, strict_paged, check_kvcache)
SINGLES = torch.arange(60, dtype=torch.int32, device=DEVICE).reshape(2, 30)
CONTROLS = [
    *(Case(function, "unchanged", {}) for function in EVERY),
    Case(decode, "full", {"cache_seqlens": ints(20, 0)}),
    Case(decode, "int_full", {"cache_seqlens": 20}),
    Case(decode, "no_seqlens", {"cache_seqlens": None, "cache_leftpad": ints(20, 0)}),
    Case(decode, "splits_128", {"num_splits": 128}),
    Case(decode, "one_row_twice", {"cache_batch_idx": ints(2, 2)}),
    Case(decode, "leftpad_all", {"cache_leftpad": ints(4, 10)}),
    Case(decode, "long_query", {"q": half(2, 21, 4, 32)}),
    Case(append, "to_the_end", {"cache_seqlens": ints(18, 0)}),
    Case(append, "int_to_the_end", {"cache_seqlens": 18}),
    Case(append, "s_q_capacity", {"q": half(2, 20, 4, 32)}),
    # A prompt that is padded at its left lies in the new keys, all of them padding at most.
    Case(append, "leftpad_in_new_keys", {"cache_leftpad": ints(6, 1)}),
    Case(append, "one_row", {"cache_batch_idx": ints(1, 1)}),  # standard mode: one of them wins
    Case(append, "no_new_keys", {n: half(2, 0, 2, 32) for n in "kv"} | {"cache_seqlens": 20}),
    Case(rotated, "dim_is_d", {n: half(20, 16) for n in ROTARY}),
    Case(rotated, "causal_to_the_end", {"cache_seqlens": ints(4, 17), "causal": True}),
    # Without a mask all queries are rotated to cache_seqlens, here 18.
    Case(rotated, "to_the_end", {"cache_seqlens": ints(4, 18)}),
    Case(paged, "to_the_end", {"cache_seqlens": ints(4, 12 * X - 2)}),
    Case(paged, "unused_pages", {"block_table": ints([5, 0, -1], [1, 2, 4])}),
    Case(
        paged,
        "smallest_pages",
        caches(half(60, page_size(1), 2, 32) + 1) | {"block_table": SINGLES},
    ),
    Case(strict, "rows", {"cache_batch_idx": ints(2, 0)}),
    # Sharing pages of a common prefix is fine, as long as each appends to pages of its own.
    Case(strict_paged, "prefix", {"block_table": ints([5, 0, 3], [5, 2, 4])}),
]


@pytest.mark.parametrize("case", by_id(CONTROLS))
def test_control_is_accepted(case: Case):
    """At the edge of each rule a call goes through, and an append that is accepted is written."""
    arguments = case.arguments()
    before = arguments["k_cache"].clone()
    case.function.call(**arguments)
    new = arguments.get("k")
    if new is None or new.numel() == 0 or case.function is check_kvcache:
        assert_bitwise_equal(arguments["k_cache"], before)
    else:
        assert not torch.equal(arguments["k_cache"], before)
