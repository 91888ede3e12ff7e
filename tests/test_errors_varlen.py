"""Bad input to the varlen functions: offsets, lengths, padding, pages. Tools in test_errors.py."""

from typing import Any

import pytest
import torch
from device import page_size
from test_errors import (
    BATCH,
    CU,
    DTYPE,
    HEADS,
    KV,
    LOW_LEVEL,
    MULTIPLE_OF_8,
    NO_DROPOUT,
    PACKED_KV,
    PACKED_Q,
    SAME_KEY,
    Case,
    Function,
    Q,
    assert_refused,
    both,
    by_id,
    filled,
    half,
    ints,
    ones,
    varlen,
    varlen_kvpacked,
    varlen_qkvpacked,
)

from flash_attn import _checks, flash_attn_varlen_func
from flash_attn._arguments import Inputs, Packing, Scoring
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward
from flash_attn.testing import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("contents_are_checked")

# Six pages of four keys (on a GPU, of four times as many keys, here and below); three pages a
# sequence make a capacity of 12. Lengths 7 and 2 use two pages and one.
X = page_size(4) // 4
PAGES = half(6, 4 * X, 2, 16)
TABLE = ints([5, 0, 3], [1, 2, 4])
TWO_PAGES = {"block_table": ints([5, 0], [1, 2])}

paged = Function(
    "paged",
    flash_attn_varlen_func,
    varlen.arguments
    | both(PAGES)
    | {"block_table": TABLE, "cu_seqlens_k": ints(0, 7 * X, 9 * X), "max_seqlen_k": 7 * X},
)
forward = Function("forward", _flash_attn_varlen_forward, varlen.arguments | LOW_LEVEL)
paged_forward = Function("paged_forward", _flash_attn_varlen_forward, paged.arguments | LOW_LEVEL)

INT32 = "must have dtype int32"
RANGE = "is out of range"
BAD_PAGE = "block_table names a page outside the cache"
CAPACITY = "exceeds the capacity of block_table"


def index_cases(function: Function, name: str, letters: str, good: torch.Tensor) -> list[Case]:
    """dtype and shape of an index tensor."""
    shape = f"{name} must have shape ({letters})"
    long = torch.cat([good, good[-1:]])
    return [
        Case(function, f"{name}_int64", {name: good.long()}, f"{name} {INT32}", "torch.int64"),
        Case(function, f"{name}_float", {name: good.float()}, f"{name} {INT32}", "torch.float32"),
        Case(function, f"{name}_long", {name: long}, shape, f"{name} of shape {tuple(long.shape)}"),
        Case(function, f"{name}_rank", {name: good[None]}, shape, f"{tuple(good[None].shape)}"),
    ]


OFFSETS = [
    ("first", ints(1, 5, 8), "must start at 0", "[0] = 1"),
    ("negative", ints(-1, 5, 8), "must start at 0", "[0] = -1"),
    ("decreasing", ints(0, 5, 3), "must not decrease", "[1:3] = [5, 3]"),
    # In int32 the second length would be 1, and the last offset is below the total.
    ("wrapping", ints(0, 2**31 - 1, -(2**31)), "must not decrease", "[1:3] = [2147483647, -214"),
    ("beyond", ints(0, 5, 12), "points outside its pack", "[2] = 12 for a pack of 1"),
]
LENGTHS = [
    ("cu_rank", {"cu_seqlens_q": ints([0, 5, 8])}, "cu_seqlens_q must have shape", "(1, 3)"),
    ("no_batch", {"cu_seqlens_q": ints(0), "cu_seqlens_k": ints(0)}, BATCH, "b=0"),
    ("max_q", {"max_seqlen_q": 4}, "exceeds max_seqlen_q", "length 5 of sequence 0"),
    ("max_k", {"max_seqlen_k": 6}, "exceeds max_seqlen_k", "length 7 of sequence 0"),
    ("max_q_negative", {"max_seqlen_q": -1}, "must not be negative", "max_seqlen_q=-1"),
    ("max_k_float", {"max_seqlen_k": 7.5}, "max_seqlen_k must hold integers", "7.5"),
    ("max_k_none", {"max_seqlen_k": None}, "max_seqlen_k must hold integers", "None"),
    ("max_k_tensor", {"max_seqlen_k": ints(6)[0]}, "exceeds max_seqlen_k", "max_seqlen_k=6"),
]
TENSORS = [
    ("q_rank", {"q": Q}, "q must have shape (total_q, h_q, d)", "(2, 5, 4, 16)"),
    ("k_rank", both(KV), "k must have shape (total_k, h_kv, d)", "(2, 7, 2, 16)"),
    ("k_d", both(half(11, 2, 8)), "k must have shape (total_k, h_kv, d)", "(11, 2, 8)"),
    ("v_total", {"v": half(9, 2, 16)}, "v must have shape (total_k, h_kv, d)", "(9, 2, 16)"),
    ("heads", both(half(11, 3, 16)), HEADS, "h_q=4, h_kv=3"),
    ("fp64", {"q": PACKED_Q.double()} | both(PACKED_KV.double()), DTYPE, "torch.float64"),
    ("k_dtype", {"k": PACKED_KV.bfloat16()}, SAME_KEY, "k of torch.bfloat16"),
]
VARLEN_CASES = [
    *index_cases(varlen, "cu_seqlens_q", "b + 1", CU["cu_seqlens_q"])[:2],
    *index_cases(varlen, "cu_seqlens_k", "b + 1", CU["cu_seqlens_k"]),
    *(
        Case(varlen, f"{name}_{id}", {name: cu}, f"{name} {what}", f"{name}{received}")
        for name in CU
        for id, cu, what, received in OFFSETS
    ),
    *(Case(varlen, *row) for row in LENGTHS + TENSORS),
    Case(
        varlen,
        "s_dmask",
        {"max_seqlen_q": 2**62, "dropout_p": 0.5, "return_attn_probs": True},
        "S_dmask is too large",
        f"max_seqlen_q={2**62}",
    ),
    Case(varlen_kvpacked, "count", {"kv": half(11, 3, 2, 16)}, "kv must have shape", "(11, 3, 2"),
    Case(varlen_kvpacked, "max_k", {"max_seqlen_k": 6}, "exceeds max_seqlen_k", "max_seqlen_k=6"),
    Case(varlen_qkvpacked, "count", {"qkv": half(10, 2, 2, 16)}, "qkv must have", "(10, 2, 2, 16)"),
    Case(
        varlen_qkvpacked, "max", {"max_seqlen": 4}, "exceeds max_seqlen", "length 5 of sequence 0"
    ),
]

LOW_LEVEL_ROWS = [
    (
        "d_12",
        {"q": half(10, 4, 12)} | both(half(11, 2, 12)),
        MULTIPLE_OF_8,
        "d=12",
    ),
    ("return_softmax", {"return_softmax": True}, NO_DROPOUT, "dropout_p=0.0"),
    ("used_negative", {"seqused_k": ints(7, -1)}, f"seqused_k {RANGE}", "seqused_k[1] = -1"),
    ("used_in_pack", {"seqused_k": ints(7, 3)}, f"seqused_k {RANGE}", "3 where sequence 1 has 2"),
    (
        "used_max",
        {"seqused_k": ints(7, 2), "max_seqlen_k": 6},
        f"seqused_k {RANGE}",
        "seqused_k[0] = 7",
    ),
    (
        "used_decreasing",
        {"seqused_k": ints(0, 0), "cu_seqlens_k": ints(0, 7, 6)},
        "cu_seqlens_k must not decrease",
        "[7, 6]",
    ),
    ("pad_negative", {"leftpad_k": ints(0, -1)}, f"leftpad_k {RANGE}", "leftpad_k[1] = -1"),
    ("pad_length", {"leftpad_k": ints(0, 3)}, f"leftpad_k {RANGE}", "3 where sequence 1 has 2"),
    (
        "pad_used",
        {"leftpad_k": ints(5, 0), "seqused_k": ints(4, 2)},
        f"leftpad_k {RANGE}",
        "leftpad_k[0] = 5 where sequence 0 has 4",
    ),
]
PAGED_ROWS = [
    (
        "leftpad",
        {"leftpad_k": ints(0, 0)},
        "We don't support Paged KV and leftpad_k",
        "block_table",
    ),
    (
        "page_size_0",
        both(half(6, 0, 2, 16)),
        "Paged KV cache block size must be divisible by 16",
        "page size 0",
    ),
    ("k_rank", both(PACKED_KV), "k must have shape (num_blocks, page_size, h_kv", "(11, 2, 16)"),
    ("page", {"block_table": ints([5, 6, 3], [1, 2, 4])}, BAD_PAGE, "block_table[0, 1] = 6"),
    ("negative", {"block_table": ints([5, 0, 3], [-1, 2, 4])}, BAD_PAGE, "block_table[1, 0] = -1"),
    (
        "used_page",
        {"block_table": ints([5, 0, -1], [1, 9, 4]), "seqused_k": ints(7 * X, 5 * X)},
        BAD_PAGE,
        "block_table[1, 1] = 9",
    ),
    (
        "decreasing",
        {"cu_seqlens_k": ints(9 * X, 12 * X, 9 * X)},
        "cu_seqlens_k must not decrease",
        f"cu_seqlens_k[1:3] = [{12 * X}, {9 * X}]",
    ),
    ("max_k", {"max_seqlen_k": 6}, "exceeds max_seqlen_k", "max_seqlen_k=6"),
    (
        "capacity",
        {"cu_seqlens_k": ints(0, 9 * X, 11 * X), "max_seqlen_k": 9 * X} | TWO_PAGES,
        CAPACITY,
        f"keys[0] = {9 * X}",
    ),
    (
        "used_capacity",
        {"seqused_k": ints(1, 9 * X), "max_seqlen_k": 9 * X} | TWO_PAGES,
        CAPACITY,
        f"keys[1] = {9 * X}",
    ),
]
LOW_LEVEL_CASES = [
    *index_cases(paged, "block_table", "b, max_blocks", TABLE),
    *index_cases(forward, "seqused_k", "b", ints(7, 2)),
    *index_cases(forward, "leftpad_k", "b", ints(0, 0)),
    *(Case(forward, *row) for row in LOW_LEVEL_ROWS),
    *(Case(paged_forward, *row) for row in PAGED_ROWS),
]

# A tensor without memory stands for one on another device; see test_errors.py.
OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": 0.25,
    "softcap": 0.0,
    "alibi_slopes": None,
    "leftpad_k": ints(0, 0),
    "seqused_k": ints(7, 2),
    "block_table": None,
    "low_level_head_dim": False,
    "return_softmax": False,
}


def ask_varlen(low_level_head_dim: bool, return_softmax: bool, **given: Any) -> None:
    options = {"low_level_head_dim": low_level_head_dim, "return_softmax": return_softmax}
    objects = (filled(kind, given) for kind in (Inputs, Packing, Scoring))
    _checks.check_varlen(*objects, **options)


check_varlen = Function("check_varlen", ask_varlen, OPTIONS | varlen.arguments)
check_paged = Function("check_paged", ask_varlen, OPTIONS | {"leftpad_k": None} | paged.arguments)


def elsewhere(function: Function, name: str, tensor: Any) -> Case:
    moved = {name: tensor.to("meta")}
    return Case(function, name, moved, f"{name} is not on the device of q", f"{name} on meta")


DEVICE_CASES = [
    *(
        elsewhere(check_varlen, name, check_varlen.arguments[name])
        for name in ("k", "v", "cu_seqlens_q", "cu_seqlens_k", "leftpad_k", "seqused_k")
    ),
    elsewhere(check_varlen, "alibi_slopes", ones(4)),
    elsewhere(check_paged, "block_table", TABLE),
]

CASES = VARLEN_CASES + LOW_LEVEL_CASES + DEVICE_CASES


@pytest.mark.parametrize("case", by_id(CASES))
def test_refused(case: Case):
    """Each message says what was wrong, what was received and the rule."""
    assert_refused(case)


CONTROLS = [
    *(Case(f, "unchanged", {}) for f in (paged, forward, paged_forward, check_varlen, check_paged)),
    Case(varlen, "alibi_batch", {"alibi_slopes": ones(2, 4)}),
    Case(varlen, "whole_pack", {"cu_seqlens_k": ints(0, 4, 11)}),
    Case(varlen, "empty_sequences", {name: ints(0, 0, 0) for name in CU}),
    Case(varlen, "max_tensor", {"max_seqlen_q": ints(5)[0], "max_seqlen_k": ints(7)[0]}),
    Case(varlen, "max_larger", {"max_seqlen_q": 99, "max_seqlen_k": 99}),
    Case(varlen, "strided_offsets", {"cu_seqlens_q": ints(0, 9, 5, 9, 8)[::2]}),
    Case(varlen, "d_1", {"q": half(10, 4, 1)} | both(half(11, 2, 1))),
    Case(forward, "used_and_padded", {"seqused_k": ints(7, 2), "leftpad_k": ints(7, 2)}),
    # What is used is bounded by max_seqlen_k, not what lies in the pack.
    Case(forward, "used_short", {"seqused_k": ints(6, 0), "max_seqlen_k": 6}),
    Case(paged, "only_lengths", {"cu_seqlens_k": ints(100, 100 + 7 * X, 100 + 9 * X)}),
    Case(paged, "unused_pages", {"block_table": ints([5, 0, -1], [0, 77, 2**31 - 1])}),
    Case(paged, "shared_pages", {"block_table": ints([5, 0, 3], [5, 0, 3])}),
    Case(
        paged,
        "smallest_pages",
        both(half(7, page_size(1), 2, 16)) | {"block_table": ints(range(7), range(7))},
    ),
    Case(
        paged,
        "full_table",
        {"cu_seqlens_k": ints(0, 8 * X, 9 * X), "max_seqlen_k": 8 * X} | TWO_PAGES,
    ),
    # With seqused_k in a paged cache, cu_seqlens_k is not read.
    Case(
        paged_forward,
        "only_used",
        {"seqused_k": ints(12 * X, 0), "max_seqlen_k": 12 * X, "cu_seqlens_k": ints(9, 0, -9)},
    ),
]


@pytest.mark.parametrize("case", by_id(CONTROLS))
def test_control_is_accepted(case: Case):
    """At the edge of each rule a call goes through: no rule is stricter than it says."""
    case.function.call(**case.arguments())


def test_a_length_that_only_the_running_graph_knows():
    """Outside the ops nothing asks how large a maximum is: under torch.compile that is unknown."""

    def attend(q, kv, cu_q, cu_k):
        longest_q, longest_k = (int(cu.diff().max()) for cu in (cu_q, cu_k))
        return flash_attn_varlen_func(q, kv, kv, cu_q, cu_k, longest_q, longest_k)

    arguments = (PACKED_Q[:8], PACKED_KV, *CU.values())
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        compiled = torch.compile(attend, backend="eager", fullgraph=True)(*arguments)
    assert_bitwise_equal(compiled, attend(*arguments))
