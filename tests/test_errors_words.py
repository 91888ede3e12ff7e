"""Arguments of a wrong type meet this package's words, not those of PyTorch's schemas or worse.

Tools in test_errors.py. Every rule is asked of every function that takes the argument.
"""

import math
from typing import Any

import numpy
import pytest
import torch
from device import DEVICE
from test_errors import (
    CU,
    MAX,
    PACKED_KV,
    PACKED_Q,
    PUBLIC,
    Case,
    Function,
    Q,
    assert_refused,
    by_id,
    dense,
    half,
    ints,
    kvpacked,
    qkvpacked,
    raw,
    varlen,
    varlen_kvpacked,
    varlen_qkvpacked,
)
from test_errors_backward import dense as backward
from test_errors_backward import varlen as varlen_backward
from test_errors_kvcache import append, decode, paged, rotated
from test_errors_varlen import forward as varlen_forward
from test_errors_varlen import paged as paged_varlen

import flash_attn_2_cuda
from flash_attn import determinism
from flash_attn.testing import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("contents_are_checked")

NAMES = {"p_dropout": "dropout_p", "is_causal": "causal"}  # of the raw entry points


def raw_arguments(function: Function) -> dict[str, Any]:
    """Those of a low-level op, by the raw entry point's names."""
    names = {ours: theirs for theirs, ours in NAMES.items()}
    return {names.get(name, name): value for name, value in function.arguments.items()}


partials = Function(
    "forward_partials",
    determinism.forward_partials,
    {"q": PACKED_Q, "k": PACKED_KV, "v": PACKED_KV} | CU | MAX,
)
raw_varlen = Function(
    "raw_varlen",
    flash_attn_2_cuda.varlen_fwd,
    raw_arguments(varlen_forward)
    | {"out": None, "seqused_k": None, "leftpad_k": None, "block_table": None}
    | {"zero_tensors": False},
)
raw_backward = Function("raw_backward", flash_attn_2_cuda.bwd, raw_arguments(backward))
raw_varlen_backward = Function(
    "raw_varlen_backward",
    flash_attn_2_cuda.varlen_bwd,
    raw_arguments(varlen_backward) | {"zero_tensors": False},
)
RAW = [raw, raw_varlen, raw_backward, raw_varlen_backward]
EVERY = [*PUBLIC, append, partials, *RAW]

# ---- Numbers and switches ------------------------------------------------------------------------

NO_NUMBERS = [None, "0.5", 1j, [0.5], (0.5,), numpy.zeros(2), numpy.bool_(True), object()]
NO_NUMBERS += [torch.tensor(x) for x in (True, 1j, [0.5, 0.5])]
NO_NUMBERS += [torch.zeros((), device="meta"), torch.zeros(0)]
NO_FLAGS = [None, "yes", 0.5, [True], numpy.zeros(2), torch.zeros(2), torch.tensor(0.5)]
NO_INTEGERS = [None, "5", 5.0, 1j, [5], (5,), numpy.array([5]), torch.tensor([5, 5])]
NO_INTEGERS += [torch.tensor(5.0), torch.tensor(True)]
NUMBER, FLAG = "must be a number", "must be True or False"

FLAGS = {
    **{function.name: ["causal", "deterministic", "return_attn_probs"] for function in PUBLIC},
    "append": ["causal", "rotary_interleaved"],
    "forward_partials": ["causal"],
    "raw": ["is_causal", "return_softmax"],
    "raw_varlen": ["is_causal", "return_softmax", "zero_tensors"],
    "raw_backward": ["is_causal", "deterministic"],
    "raw_varlen_backward": ["is_causal", "deterministic", "zero_tensors"],
}
LENGTHS = [
    (varlen, "max_seqlen_q"),
    (varlen, "max_seqlen_k"),
    (varlen_kvpacked, "max_seqlen_k"),
    (varlen_qkvpacked, "max_seqlen"),
    (partials, "max_seqlen_q"),
    (partials, "max_seqlen_k"),
    (partials, "num_splits"),
    (append, "num_splits"),
    (raw_varlen, "max_seqlen_k"),
    (raw_varlen_backward, "max_seqlen_q"),
]


def numbers_of(function: Function) -> list[str]:
    if function in RAW:
        return ["p_dropout", "softmax_scale", "softcap"]
    dropout = [] if function in (append, partials) else ["dropout_p"]
    return [*dropout, "softmax_scale", "softcap"]


def words(
    function: Function, name: str, values: list[Any], what: str, skip_none: bool = False
) -> list[Case]:
    return [
        Case(function, f"{name}_{i}", {name: value}, f"{name} {what}", repr(value))
        for i, value in enumerate(values)
        if not (skip_none and value is None)
    ]


def none_is_default(function: Function, name: str) -> bool:
    return name == "softmax_scale" and function not in RAW


SCALARS = [
    case
    for function in EVERY
    for name in numbers_of(function)
    for case in words(function, name, NO_NUMBERS, NUMBER, none_is_default(function, name))
] + [
    case
    for function in EVERY
    for name in FLAGS[function.name]
    for case in words(function, name, NO_FLAGS, FLAG)
]
INTEGERS = [
    case
    for function, name in LENGTHS
    for case in words(function, name, NO_INTEGERS, "must hold integers")
]
TOO_LARGE = [
    Case(function, f"{name}_{bits}", {name: sign * 2**bits}, f"{name} is out of range", "bits")
    for function, name in LENGTHS
    for bits, sign in ((63, 1), (70, 1), (70, -1), (20_000, 1))
]
NO_WINDOWS = [None, 4, "ab", (1,), [1, 2, 3], {1, 2}, numpy.array(3)]
NO_SIDES = [
    (None, 1),
    ("1", 1),
    (1.0, 1),
    [[1], [2]],
    numpy.zeros((2, 2), int),
    numpy.array([0.5, 1.0]),
    (1, 1j),
]
WINDOWS = [
    Case(function, f"window_{i}_{what[-8:]}", {"window_size": value}, f"window_size {what}")
    for function in (*PUBLIC, append, partials)
    for values, what in ((NO_WINDOWS, "must have two entries"), (NO_SIDES, "must hold integers"))
    for i, value in enumerate(values)
]

# cache_seqlens: one int for all, or a tensor. A list would be neither.
CACHE_LENGTHS = [
    *words(
        append, "cache_seqlens", [[4, 10], (4, 10), numpy.array([4, 10]), "4", 4.0], "must hold"
    ),
    Case(decode, "seqlens_2**33", {"cache_seqlens": 2**33}, "cache_seqlens is out of", f"={2**33}"),
    Case(decode, "seqlens_2**31", {"cache_seqlens": 2**31}, "cache_seqlens is out of", f"={2**31}"),
    Case(decode, "seqlens_2**70", {"cache_seqlens": 2**70}, "cache_seqlens is out of", "71 bits"),
    Case(decode, "seqlens_-2**40", {"cache_seqlens": -(2**40)}, "must not be negative", "=-1099"),
    Case(append, "seqlens_max", {"cache_seqlens": 2**31 - 1}, "runs past the end", "2147483647"),
]

# ---- Tensors -------------------------------------------------------------------------------------

TENSORS = [
    (dense, "q k v", "alibi_slopes"),
    (kvpacked, "q kv", "alibi_slopes"),
    (qkvpacked, "qkv", "alibi_slopes"),
    (varlen, "q k v cu_seqlens_q cu_seqlens_k", "alibi_slopes"),
    (paged_varlen, "q k v cu_seqlens_q cu_seqlens_k", "block_table"),
    (varlen_kvpacked, "q kv cu_seqlens_q cu_seqlens_k", ""),
    (varlen_qkvpacked, "qkv cu_seqlens", ""),
    (rotated, "q k_cache v_cache", "k v rotary_cos rotary_sin cache_batch_idx cache_leftpad"),
    (paged, "q k_cache v_cache", "block_table"),
    (partials, "q k v", "cu_seqlens_q cu_seqlens_k seqused_k leftpad_k alibi_slopes"),
    (raw, "q k v", "out alibi_slopes"),
    (raw_varlen, "q k v cu_seqlens_q cu_seqlens_k", "out seqused_k leftpad_k block_table"),
    (raw_backward, "dout q k v out softmax_lse", "dq dk dv alibi_slopes rng_state"),
    (raw_varlen_backward, "dout q k v out softmax_lse cu_seqlens_q cu_seqlens_k", "dq rng_state"),
]
NO_TENSORS = [([[0.5]], "list"), (numpy.zeros((2, 2)), "ndarray"), (7, "int")]
IS_TENSOR = "must be a tensor"
TENSOR_CASES = [
    Case(function, f"{name}_{kind}", {name: value}, f"{name} {IS_TENSOR}", kind)
    for function, needed, optional in TENSORS
    for name in f"{needed} {optional}".split()
    for value, kind in (*NO_TENSORS, *([(None, "NoneType")] if name in needed.split() else []))
]
NESTED = [half(5, 4, 16), half(3, 4, 16)]
DENSE = "q must be a dense tensor"
LAYOUTS = [
    Case(dense, "sparse", {"q": Q.cpu().to_sparse().to(DEVICE)}, DENSE, "layout torch.sparse_coo"),
    Case(append, "sparse", {"q": Q.cpu().to_sparse().to(DEVICE)}, DENSE, "torch.sparse_coo"),
    Case(
        dense,
        "jagged",
        {"q": torch.nested.nested_tensor(NESTED, layout=torch.jagged)},
        DENSE,
        "a nested tensor",
    ),
    Case(dense, "complex", {"q": Q.to(torch.complex64)}, "fp16 and bf16", "torch.complex64"),
    Case(varlen_forward, "cu_none", {"cu_seqlens_k": None}, f"cu_seqlens_k {IS_TENSOR}", "None"),
    Case(varlen_backward, "cu_none", {"cu_seqlens_q": None}, f"cu_seqlens_q {IS_TENSOR}", "None"),
    Case(partials, "cu_none", {"cu_seqlens_k": None}, f"cu_seqlens_k {IS_TENSOR}", "None"),
    # Ranks that must hold before anyone asks for the batch and the capacity.
    Case(decode, "q_0d", {"q": half(1)[0], "cache_seqlens": 3}, "q must have shape", "()"),
    Case(decode, "cache_1d", {"k_cache": half(7)}, "k_cache must have shape", "(7,)"),
    Case(paged, "table_1d", {"block_table": ints(0, 1)}, "block_table must have shape", "(2,)"),
]

# A tensor without memory beside others made PyTorch answer, with bytes that nobody had computed.
ELSEWHERE = [
    Case(
        function,
        f"{name}_meta",
        {name: value.to("meta")},
        "is not on the device of q",
        "on meta",
    )
    for function, names in (
        (dense, "k v"),
        (varlen, "cu_seqlens_k k"),
        (paged_varlen, "block_table"),
        (rotated, "k_cache v_cache k v rotary_cos rotary_sin cache_seqlens"),
        (paged, "block_table"),
        (raw, "k out"),
    )
    for name in names.split()
    if (value := function.arguments[name]) is not None
]
TRAINED = torch.tensor(0.25, requires_grad=True)
GRADIENTS = [
    Case(function, f"{name}_trained", {name: TRAINED}, f"no gradient flows into {name}", "=True")
    for function, name in ((dense, "softmax_scale"), (varlen, "softmax_scale"), (dense, "softcap"))
]

CASES = [
    *SCALARS,
    *INTEGERS,
    *TOO_LARGE,
    *WINDOWS,
    *CACHE_LENGTHS,
    *TENSOR_CASES,
    *LAYOUTS,
    *ELSEWHERE,
    *GRADIENTS,
]


@pytest.mark.parametrize("case", by_id(CASES))
def test_refused(case: Case):
    """Each message names the argument, what came, and the rule."""
    assert_refused(case)


@pytest.mark.parametrize("case", by_id(GRADIENTS))
def test_control_a_trained_scalar_is_a_number_without_autograd(case: Case):
    """With it, its gradient would be missing without a word."""
    with torch.no_grad():
        case.function.call(**case.arguments())


# ---- What is a number all the same ---------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


AS_NUMBER = [numpy.float32(0.25), numpy.float16(0.25), numpy.array(0.25), torch.tensor([0.25])]
AS_NUMBER += [torch.tensor(0.25, dtype=torch.bfloat16), torch.tensor([[0.25]])]
EQUAL = [
    *((dense, {"softmax_scale": 0.25}, {"softmax_scale": x}) for x in AS_NUMBER),
    *((append, {"softcap": 0.25}, {"softcap": x}) for x in AS_NUMBER),
    (dense, {"softcap": 2.0}, {"softcap": 2}),
    (dense, {"softcap": 1.0}, {"softcap": True}),
    (dense, {"softmax_scale": 3.0}, {"softmax_scale": torch.tensor(3)}),
    (dense, {"causal": True}, {"causal": 1}),
    (dense, {"causal": True}, {"causal": numpy.bool_(True)}),
    (dense, {"causal": True}, {"causal": torch.tensor(True)}),
    *(
        (function, {"window_size": (3, 1)}, {"window_size": x})
        for function in (dense, varlen, append)
        for x in (numpy.array([3, 1]), numpy.array([3, 1], numpy.int32), (numpy.int8(3), 1))
    ),
    (dense, {"window_size": (1, 0)}, {"window_size": (True, False)}),
    (varlen, {}, {"max_seqlen_q": numpy.int32(5), "max_seqlen_k": ints(7)}),
    (append, {"cache_seqlens": 1}, {"cache_seqlens": True}),
    (append, {"cache_seqlens": 4}, {"cache_seqlens": numpy.int64(4)}),
    (append, {}, {"num_splits": numpy.int64(0)}),
    (dense, {}, {"q": Q.as_subclass(Subclass)}),
]


@pytest.mark.parametrize(
    ("function", "plain", "other"), EQUAL, ids=[f"{e[0].name}-{e[2]}"[:60] for e in EQUAL]
)
def test_control_a_number_in_another_dress_is_that_number(function, plain, other):
    out = function.call(**Case(function, "", other).arguments())
    expected = function.call(**Case(function, "", plain).arguments())
    assert_bitwise_equal(out.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("name", ["dropout_p", "softmax_scale", "softcap"])
@pytest.mark.parametrize(
    "value", [math.nan, math.inf, -math.inf, 10**400, -(10**400)], ids=["nan", *["+", "-"] * 2]
)
def test_numbers_without_a_size(name, value):
    """NaN and infinities, of Python, of a tensor, or as an integer beyond every float."""
    for form in (value, *([] if isinstance(value, int) else [torch.tensor(value)])):
        assert_refused(Case(dense, "", {name: form}, name, name))
