"""Bad input to the backward ops and to the reduction of partials. Tools in test_errors.py."""

from typing import Any

import pytest
import torch
from device import DEVICE, page_size
from test_errors import (
    BATCH,
    CU,
    DTYPE,
    HEADS,
    KV,
    MAX,
    PACKED_KV,
    PACKED_Q,
    SCALARS,
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
)

from flash_attn import (
    _checks,
    determinism,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn._arguments import Gradients, Inputs, Outputs, Scoring
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_varlen_backward
from flash_attn.layers.rotary import apply_rotary_emb

pytestmark = pytest.mark.usefixtures("contents_are_checked")

OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": 0.25,
    "causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "rng_state": None,
}


def zeros(*shape: int) -> torch.Tensor:
    """fp32, as lse and partials are."""
    return torch.zeros(shape, device=DEVICE)


def saved(q: torch.Tensor, kv: torch.Tensor, lse: torch.Tensor) -> dict[str, torch.Tensor]:
    """What a backward takes; the buffers for gradients hold a value that no refusal may change."""
    buffers = {"dq": q + 7, "dk": kv + 7, "dv": kv + 7}
    return {"dout": q, "q": q, "k": kv, "v": kv, "out": q, "softmax_lse": lse} | buffers


dense = Function("dense", _flash_attn_backward, saved(Q, KV, zeros(2, 4, 5)) | OPTIONS)
varlen = Function(
    "varlen",
    _flash_attn_varlen_backward,
    saved(PACKED_Q, PACKED_KV, zeros(4, 10)) | CU | MAX | OPTIONS,
)

RNG = "rng_state must be passed to a backward with dropout"
MAX_D = "FlashAttention backward only supports head dimension at most 256"
OF_D_264 = saved(half(2, 5, 4, 264), half(2, 7, 2, 264), zeros(2, 4, 5))
OF_D_12 = saved(half(2, 5, 4, 12), half(2, 7, 2, 12), zeros(2, 4, 5))


def like_cases(function: Function, name: str, shape_of: str) -> list[Case]:
    """dtype and shape of a tensor that is shaped as another one."""
    good = function.arguments[name]
    shape, pair = f"{name} must have shape (the shape of {shape_of})", f"query and {name}"
    cut = good[:, :, :-1]
    return [
        Case(function, f"{name}_dtype", {name: good.float()}, f"{pair} must have", "torch.float32"),
        Case(function, f"{name}_rank", {name: good[None]}, shape, f"{tuple(good[None].shape)}"),
        Case(function, f"{name}_shape", {name: cut}, shape, f"{name} of shape {tuple(cut.shape)}"),
    ]


SHAPED_AS = {"dout": "out", "out": "q", "dq": "q", "dk": "k", "dv": "v"}
SHARED = [
    case
    for function in (dense, varlen)
    for case in (
        *(case for name, of in SHAPED_AS.items() for case in like_cases(function, name, of)),
        *(
            Case(function, " ".join(f"{n}={x}" for n, x in changes.items()), changes, *text)
            for changes, *text in SCALARS
        ),
        Case(function, "no_rng_state", {"dropout_p": 0.5}, RNG, "rng_state=None, dropout_p=0.5"),
        Case(function, "rng_dtype", {"rng_state": ints(1, 2)}, "must have dtype int64", "int32"),
        Case(function, "rng_shape", {"rng_state": ones(3).long()}, "must have shape", "(3,)"),
        Case(
            function,
            "lse_dtype",
            {"softmax_lse": function.arguments["softmax_lse"].half()},
            "softmax_lse must have dtype fp32",
            "torch.float16",
        ),
        Case(
            function,
            "alibi",
            {"alibi_slopes": ones(3)},
            "alibi_slopes must have shape (h_q) or (b, h_q)",
            "(3,)",
        ),
        Case(function, "fp64", {"q": function.arguments["q"].double()}, DTYPE, "torch.float64"),
    )
]
DENSE = [
    ("lse", {"softmax_lse": zeros(2, 5, 4)}, "shape (b, h_q, s_q)", "(2, 5, 4)"),
    ("k_batch", both(half(3, 7, 2, 16)), "k must have shape (b, s_k, h_kv, d)", "(3, 7, 2, 16)"),
    ("heads", both(half(2, 7, 3, 16)), HEADS, "h_q=4, h_kv=3"),
    ("d_12", OF_D_12, "head_size should be a multiple of 8", "d=12"),
    ("d_264", OF_D_264, MAX_D, "d=264"),
]
VARLEN = [
    ("lse", {"softmax_lse": zeros(10, 4)}, "shape (h_q, total_q)", "(10, 4)"),
    ("cu_int64", {"cu_seqlens_q": ints(0, 5, 8).long()}, "must have dtype int32", "torch.int64"),
    ("cu_k", {"cu_seqlens_k": ints(0, 9)}, "cu_seqlens_k must have shape (b + 1)", "(2,)"),
    ("decreasing", {"cu_seqlens_q": ints(0, 5, 3)}, "cu_seqlens_q must not decrease", "[5, 3]"),
    ("beyond", {"cu_seqlens_k": ints(0, 7, 12)}, "points outside its pack", "12 for a pack of 11"),
    ("max_q", {"max_seqlen_q": 4}, "exceeds max_seqlen_q", "length 5 of sequence 0"),
    ("max_k", {"max_seqlen_k": 6}, "exceeds max_seqlen_k", "length 7 of sequence 0"),
    ("no_batch", {"cu_seqlens_q": ints(0), "cu_seqlens_k": ints(0)}, BATCH, "b=0"),
]

# Partials of two segments, dense (b=2, s_q=5, h_q=4, d=16).
REDUCED = {"out": zeros(2, 2, 5, 4, 16), "dtype": torch.float16} | {
    name: zeros(2, 2, 4, 5) for name in ("max_log2", "sum")
}


def reduce(dtype: torch.dtype, **tensors: torch.Tensor) -> None:
    determinism.reduce_partials(determinism.Partials(**tensors), dtype)


partials = Function("partials", reduce, REDUCED)
PARTIALS = [
    ("dtype", {"dtype": torch.int32}, DTYPE, "torch.int32"),
    ("out_fp16", {"out": half(2, 2, 5, 4, 16)}, "partials.out must have dtype fp32", "float16"),
    ("sum_fp64", {"sum": zeros(2, 2, 4, 5).double()}, "partials.sum", "torch.float64"),
    ("rank", {"out": zeros(5, 4, 16)}, "partials.out must have shape (n, b", "(5, 4, 16)"),
    ("order", {"max_log2": zeros(2, 2, 5, 4)}, "(n, b, h_q, s_q)", "(2, 2, 5, 4)"),
    ("segments", {"sum": zeros(1, 2, 4, 5)}, "partials.sum must have shape", "(1, 2, 4, 5)"),
    ("packed", {"out": zeros(2, 5, 4, 16)}, "(n, h_q, total_q)", "(2, 2, 4, 5)"),
]

dense_partials = Function("forward_partials", determinism.forward_partials, {"q": Q} | both(KV))
PACKED_ONLY = [
    Case(
        dense_partials,
        name,
        {name: ints(1, 1)},
        f"{name} needs a packed batch",
        "(2,)",
    )
    for name in ("block_table", "seqused_k", "leftpad_k")
]


def there_and_back(**arguments: torch.Tensor) -> None:
    arguments["q"].requires_grad_()
    flash_attn_varlen_func(**arguments).sum().backward()


round_trip = Function("round_trip", there_and_back, {"q": PACKED_Q} | both(PACKED_KV) | CU | MAX)
PAGED = both(half(6, page_size(4), 2, 16)) | {"block_table": ints([5, 0, 3], [1, 2, 4])}
NO_BACKWARD = "the backward pass does not support this forward pass"

# A tensor without memory stands for one on another device; see test_errors.py.
CHECK_OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": 0.25,
    "softcap": 0.0,
    "alibi_slopes": None,
    "rng_state": zeros(2).long(),
}


def ask_backward(**given: Any) -> None:
    kinds = (Inputs, Outputs, Gradients, Scoring)
    _checks.check_backward(*(filled(kind, given) for kind in kinds))


check_dense = Function(
    "check_backward",
    ask_backward,
    saved(Q, KV, zeros(2, 4, 5)) | CHECK_OPTIONS,
)
DEVICES = [
    Case(check_dense, name, {name: x.to("meta")}, f"{name} is not on the device of q", "on meta")
    for name, x in check_dense.arguments.items()
    if isinstance(x, torch.Tensor) and name != "q"
]

derivative = Function(
    "derivative",
    lambda way, q, **others: way(lambda x: flash_attn_func(x, **others), q),
    {"way": lambda f, q: f(q), "q": Q, "k": KV, "v": KV},
)


def second(f, q):
    return torch.func.grad(lambda x: torch.func.grad(lambda y: f(y).sum())(x).sum())(q)


def of_cache(f, q):
    return torch.func.grad(lambda x: flash_attn_with_kvcache(x, q, q).sum())(q)


def vmap_append(f, q):
    return torch.func.vmap(lambda x: flash_attn_with_kvcache(x, x, x, x, x, cache_seqlens=0))(
        q[None]
    )


def of_rotary(f, q):
    return torch.func.grad(lambda x: apply_rotary_emb(x, q[0, :, 0, :8], q[0, :, 0, :8]).sum())(q)


DERIVATIVES = [
    (
        "jvp",
        {"way": lambda f, q: torch.func.jvp(f, (q,), (q,))},
        "forward-mode derivatives (jvp",
        "a tangent of q",
    ),
    ("second", {"way": second}, "second derivatives (double backward", "a backward pass"),
    ("cache", {"way": of_cache}, "flash_attn_with_kvcache has no gradient", "a backward pass"),
    ("vmap", {"way": vmap_append}, "vmap is not supported where", "vmap over q, k_cache, v_cache"),
    ("rotary", {"way": of_rotary}, "the rotary embedding does not run inside", "a transform"),
]

CASES = [
    *SHARED,
    *(Case(dense, *row) for row in DENSE),
    *(Case(varlen, *row) for row in VARLEN),
    *(Case(partials, *row) for row in PARTIALS),
    Case(round_trip, "paged", PAGED, NO_BACKWARD, "block_table in the forward pass"),
    *(Case(derivative, *row) for row in DERIVATIVES),
    *PACKED_ONLY,
    *DEVICES,
]


@pytest.mark.parametrize("case", by_id(CASES))
def test_refused(case: Case):
    """Each message says what was wrong, what came and the rule; dq, dk, dv are untouched."""
    assert_refused(case)


CONTROLS = [
    *(
        Case(function, "unchanged", {})
        for function in (dense, varlen, partials, round_trip, check_dense, derivative)
    ),
    *(
        Case(function, id, changes)
        for function in (dense, varlen)
        for id, changes in (
            ("dropout", {"dropout_p": 0.5, "rng_state": ints(1, 2).long()}),
            ("no_buffers", {"dq": None, "dk": None, "dv": None}),
            ("strided_dout", {"dout": function.arguments["dout"].mT.contiguous().mT}),
            ("strided_dq", {"dq": function.arguments["dq"].mT.contiguous().mT}),
            ("strided_lse", {"softmax_lse": function.arguments["softmax_lse"].mT.contiguous().mT}),
        )
    ),
    Case(dense, "d_256", saved(half(2, 5, 4, 256), half(2, 7, 2, 256), zeros(2, 4, 5))),
    Case(
        partials,
        "packed",
        {"out": zeros(1, 5, 4, 16)} | {n: zeros(1, 4, 5) for n in ("max_log2", "sum")},
    ),
]


@pytest.mark.parametrize("case", by_id(CONTROLS))
def test_control_is_accepted(case: Case):
    """At the edge of each rule a call goes through, and it writes the buffers it was given."""
    arguments = case.arguments()
    before = arguments["dq"].clone() if arguments.get("dq") is not None else None
    case.function.call(**arguments)
    if before is not None and "check" not in case.function.name:
        assert not torch.equal(arguments["dq"], before)
