"""Bad input to the forward functions, and the tools that the other files on errors share.

A case changes a valid call in one place. Whatever the case is about, the bytes of every argument
are compared before and after: a refusal comes before anything is written. Controls are calls at the
very edge of a rule; they must be accepted, or the rule is too strict.
"""

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from device import DEVICE, DTYPES

import flash_attn_2_cuda
from flash_attn import (
    _check_contents,
    _check_rules,
    _checks,
    _native,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn._arguments import Inputs, Scoring
from flash_attn.flash_attn_interface import _flash_attn_forward
from flash_attn.testing import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("contents_are_checked")


class Function(NamedTuple):
    """A function under test with valid arguments."""

    name: str
    call: Callable[..., Any]
    arguments: dict[str, Any]


class Case(NamedTuple):
    function: Function
    id: str
    changes: dict[str, Any]
    what: str = ""  # words of the message; a control has none
    received: str = ""

    def arguments(self) -> dict[str, Any]:
        """Tensors are copied, so that no call can spoil the next one."""
        chosen = self.function.arguments | self.changes
        return {n: x.clone() if isinstance(x, torch.Tensor) else x for n, x in chosen.items()}


def by_id(cases: list[Case]) -> list[Any]:
    return [pytest.param(case, id=f"{case.function.name}-{case.id}") for case in cases]


def assert_refused(case: Case) -> None:
    """The call raises the three parts of a message, and its arguments keep every byte."""
    arguments, before = case.arguments(), case.arguments()
    with pytest.raises(RuntimeError) as caught:
        case.function.call(**arguments)
    message = str(caught.value)
    parts = re.fullmatch(r"flash_attn: (.+); received (.+); rule: (.+)", message, re.DOTALL)
    assert parts, message
    assert case.what in parts[1], message
    assert case.received in parts[2], message
    for name, value in before.items():
        if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
            continue
        if value.device.type != "meta":
            assert_bitwise_equal(arguments[name], value, name)


def filled(kind: type, arguments: dict[str, Any]) -> Any:
    """An object of ``_arguments``, of those arguments that have the name of a field."""
    names = {field.name for field in dataclasses.fields(kind)}
    return kind(**{name: x for name, x in arguments.items() if name in names})


def half(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.full(shape, 0.5, dtype=dtype, device=DEVICE)


def ones(*shape: int) -> torch.Tensor:
    """fp32, as ALiBi slopes are."""
    return torch.ones(shape, device=DEVICE)


def ints(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def both(kv: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"k": kv, "v": kv}


# b = 2, s_q = 5, s_k = 7, h_q = 4, h_kv = 2, d = 16.
Q, KV = half(2, 5, 4, 16), half(2, 7, 2, 16)
# Lengths 5 and 3 in a pack of 10 rows, 7 and 2 in a pack of 11.
PACKED_Q, PACKED_KV = half(10, 4, 16), half(11, 2, 16)
CU = {"cu_seqlens_q": ints(0, 5, 8), "cu_seqlens_k": ints(0, 7, 9)}
MAX = {"max_seqlen_q": 5, "max_seqlen_k": 7}
LOW_LEVEL = {
    "dropout_p": 0.0,
    "softmax_scale": 0.25,
    "causal": False,
    "window_size_left": -1,
    "window_size_right": -1,
    "softcap": 0.0,
    "alibi_slopes": None,
    "return_softmax": False,
}

dense = Function("dense", flash_attn_func, {"q": Q, "k": KV, "v": KV})
kvpacked = Function("kvpacked", flash_attn_kvpacked_func, {"q": Q, "kv": half(2, 7, 2, 2, 16)})
qkvpacked = Function("qkvpacked", flash_attn_qkvpacked_func, {"qkv": half(2, 5, 3, 2, 16)})
varlen = Function(
    "varlen", flash_attn_varlen_func, {"q": PACKED_Q, "k": PACKED_KV, "v": PACKED_KV} | CU | MAX
)
varlen_kvpacked = Function(
    "varlen_kvpacked",
    flash_attn_varlen_kvpacked_func,
    {"q": PACKED_Q, "kv": half(11, 2, 2, 16)} | CU | MAX,
)
varlen_qkvpacked = Function(
    "varlen_qkvpacked",
    flash_attn_varlen_qkvpacked_func,
    {"qkv": half(10, 3, 2, 16), "cu_seqlens": ints(0, 5, 8), "max_seqlen": 5},
)
forward = Function("forward", _flash_attn_forward, dense.arguments | LOW_LEVEL)
raw = Function(
    "raw",
    flash_attn_2_cuda.fwd,
    dense.arguments
    | {"out": Q + 7, "alibi_slopes": None, "p_dropout": 0.0, "softmax_scale": 0.25}
    | {"is_causal": False, "window_size_left": -1, "window_size_right": -1, "softcap": 0.0}
    | {"return_softmax": False, "gen": None},
)
PUBLIC = [dense, kvpacked, qkvpacked, varlen, varlen_kvpacked, varlen_qkvpacked]


# ---- Scalars, windows, slopes: the same rules in every function ----------------------------------

SCALARS = [
    ({"dropout_p": 1.0}, "p_dropout", "dropout_p=1.0"),
    ({"dropout_p": -0.1}, "dropout_p", "dropout_p=-0.1"),
    ({"dropout_p": math.nan}, "dropout_p", "dropout_p=nan"),
    ({"softmax_scale": math.nan}, "softmax_scale is not finite", "softmax_scale=nan"),
    ({"softmax_scale": -math.inf}, "softmax_scale is not finite", "softmax_scale=-inf"),
    ({"softcap": -1.0}, "softcap is out of range", "softcap=-1.0"),
    ({"softcap": math.nan}, "softcap is out of range", "softcap=nan"),
    ({"softcap": math.inf}, "softcap is out of range", "softcap=inf"),
    (
        {"softcap": 3.0, "dropout_p": 0.1},
        "Softcapping does not support dropout for now",
        "softcap=3.0, dropout_p=0.1",
    ),
]
TWO_ENTRIES, INTEGERS = "window_size must have two entries", "window_size must hold integers"
WINDOWS = [
    ({"window_size": (1,)}, TWO_ENTRIES, "(1,)"),
    ({"window_size": [1, 2, 3]}, TWO_ENTRIES, "[1, 2, 3]"),
    ({"window_size": 4}, TWO_ENTRIES, "4"),
    ({"window_size": ints(3, 2, 1)}, TWO_ENTRIES, "tensor([3, 2, 1]"),
    ({"window_size": (1.5, 0)}, INTEGERS, "1.5"),
    ({"window_size": (None, 0)}, INTEGERS, "None"),
    ({"window_size": torch.tensor([0.5, 1])}, INTEGERS, "0.5"),
]
ALIBI_SHAPE = "alibi_slopes must have shape (h_q) or (b, h_q)"
ALIBI = [
    ("dtype", half(4), "ALiBi slopes must have dtype fp32", "torch.float16"),
    ("heads", ones(3), ALIBI_SHAPE, "(3,)"),
    ("batch", ones(1, 4), ALIBI_SHAPE, "(1, 4)"),
    ("rank", ones(2, 4, 1), ALIBI_SHAPE, "(2, 4, 1)"),
    (
        "stride",
        ones(4, 2).t(),
        "ALiBi slopes tensor must have contiguous last dimension",
        "strides (1, 2)",
    ),
]
SHARED = [
    Case(function, " ".join(f"{n}={x}" for n, x in changes.items()), changes, what, received)
    for function in PUBLIC
    for changes, what, received in SCALARS + WINDOWS
] + [
    Case(function, f"alibi_{id}", {"alibi_slopes": slopes}, what, received)
    for function in (dense, varlen)
    for id, slopes, what, received in ALIBI
]


# ---- Tensors of the dense functions --------------------------------------------------------------

Q_SHAPE = "q must have shape (b, s_q, h_q, d)"
K_SHAPE = "k must have shape (b, s_k, h_kv, d)"
V_SHAPE = "v must have shape (b, s_k, h_kv, d)"
DTYPE = "only support fp16 and bf16"
SAME_KEY = "query and key must have the same dtype"
SAME_VALUE = "query and value must have the same dtype"
HEADS = "Number of heads in key/value must divide number of heads in query"
BATCH = "batch size must be positive"
MAX_D = "FlashAttention forward only supports head dimension at most 256"
MULTIPLE_OF_8 = "query, key, value, and out_ must have a head_size that is a multiple of 8"
NO_DROPOUT = "return_softmax is only supported when p_dropout > 0.0"


def of_d(d: int) -> dict[str, torch.Tensor]:
    return {"q": half(2, 5, 4, d)} | both(half(2, 7, 2, d))


DENSE = [
    ("fp64", {"q": Q.double()} | both(KV.double()), DTYPE, "torch.float64"),
    ("int", {"q": Q.int()}, DTYPE, "torch.int32"),
    ("k_dtype", {"k": KV.bfloat16()}, SAME_KEY, "q of torch.float16, k of torch.bfloat16"),
    ("v_dtype", {"v": KV.float()}, SAME_VALUE, "q of torch.float16, v of torch.float32"),
    ("q_rank", {"q": PACKED_Q}, Q_SHAPE, "q of shape (10, 4, 16)"),
    ("k_rank", {"k": PACKED_KV}, K_SHAPE, "k of shape (11, 2, 16)"),
    ("v_rank", {"v": half(16)}, V_SHAPE, "v of shape (16,)"),
    ("k_batch", both(half(3, 7, 2, 16)), K_SHAPE, "k of shape (3, 7, 2, 16)"),
    ("k_d", both(half(2, 7, 2, 8)), K_SHAPE, "k of shape (2, 7, 2, 8)"),
    ("v_d", {"v": half(2, 7, 2, 8)}, V_SHAPE, "v of shape (2, 7, 2, 8)"),
    ("v_length", {"v": half(2, 6, 2, 16)}, V_SHAPE, "v of shape (2, 6, 2, 16)"),
    ("v_heads", {"v": half(2, 7, 1, 16)}, V_SHAPE, "v of shape (2, 7, 1, 16)"),
    ("heads", both(half(2, 7, 3, 16)), HEADS, "h_q=4, h_kv=3"),
    ("more_kv_heads", both(half(2, 7, 8, 16)), HEADS, "h_q=4, h_kv=8"),
    ("no_kv_heads", both(half(2, 7, 0, 16)), HEADS, "h_q=4, h_kv=0"),
    ("no_q_heads", {"q": half(2, 5, 0, 16)}, HEADS, "h_q=0, h_kv=2"),
    ("no_batch", {"q": half(0, 5, 4, 16)} | both(half(0, 7, 2, 16)), BATCH, "b=0"),
    ("d_257", of_d(257), MAX_D, "d=257"),
    ("d_0", of_d(0), "head dimension must be positive", "d=0"),
]
DENSE_CASES = [Case(dense, *row) for row in DENSE] + [
    Case(forward, "d_12", of_d(12), MULTIPLE_OF_8, "d=12"),
    Case(forward, "return_softmax", {"return_softmax": True}, NO_DROPOUT, "dropout_p=0.0"),
    Case(raw, "gen", {"gen": torch.Generator()}, "`generator` argument is no longer", "Generator"),
    Case(raw, "out_dtype", {"out": Q.float()}, "query and out must have the same dtype", "float32"),
    Case(raw, "out_shape", {"out": half(2, 4, 4, 16)}, "out must have shape", "(2, 4, 4, 16)"),
    Case(raw, "dropout", {"p_dropout": 1.0}, "p_dropout", "dropout_p=1.0"),
    Case(raw, "k_batch", both(half(3, 7, 2, 16)), K_SHAPE, "k of shape (3, 7, 2, 16)"),
    Case(kvpacked, "count", {"kv": half(2, 7, 3, 2, 16)}, "kv must have shape (b, s, 2", "7, 3, 2"),
    Case(kvpacked, "rank", {"kv": half(7, 2)}, "kv must have shape (b, s, 2, h, d)", "(7, 2)"),
    Case(qkvpacked, "count", {"qkv": half(2, 7, 2, 2, 16)}, "qkv must have shape", "(2, 7, 2, 2"),
    Case(qkvpacked, "rank", {"qkv": half(3, 2, 16)}, "qkv must have shape", "(3, 2, 16)"),
    Case(qkvpacked, "varlen", {"qkv": half(9, 3, 2, 16)}, Q_SHAPE, "(9, 2, 16)"),
]


# ---- Devices -------------------------------------------------------------------------------------
# A tensor without memory stands for one elsewhere; PyTorch would answer a call with such tensors
# itself (that is how it infers shapes), so the rules are asked directly.


def check_gpu(capability: tuple[int, int], archs: list[str]) -> None:
    """A card of this capability, and a library with kernels for these architectures."""
    _check_rules._gpu.cache_clear()
    card = {"is_available": lambda: True, "get_device_capability": lambda device: capability}
    with (
        mock.patch.multiple(torch.cuda, **card),
        mock.patch.object(_native, "cuda_archs", lambda: archs),
    ):
        _check_rules.device(torch.device("cuda:1"))
    _check_rules._gpu.cache_clear()


def check_in_capture(capturing: bool) -> None:
    with mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: capturing):
        assert _check_contents.reads_contents(torch.device("cuda"))


def check_without_gpu(**arguments: Any) -> None:
    _check_rules._gpu.cache_clear()
    with mock.patch.object(torch.cuda, "is_available", lambda: False):
        _check_rules.device(**arguments)
    _check_rules._gpu.cache_clear()


def ask_dense(low_level_head_dim: bool, return_softmax: bool, **given: Any) -> None:
    options = {"low_level_head_dim": low_level_head_dim, "return_softmax": return_softmax}
    _checks.check_dense(filled(Inputs, given), filled(Scoring, given), **options)


META_KV = KV.to("meta")
DENSE_OPTIONS = {
    "dropout_p": 0.0,
    "softmax_scale": 0.25,
    "softcap": 0.0,
    "alibi_slopes": None,
    "low_level_head_dim": False,
    "return_softmax": False,
}
check_dense = Function("check_dense", ask_dense, dense.arguments | DENSE_OPTIONS)
check_device = Function("device", check_without_gpu, {"wanted": torch.device("cpu")})
gpu = Function("gpu", check_gpu, {"capability": (9, 0), "archs": ["80", "90"]})
capture = Function("capture", check_in_capture, {"capturing": False})
page = Function("page", _check_rules.page, {"size": 256, "on": torch.device("cuda")})
dtype = Function("dtype", _check_rules.dtype, {"wanted": torch.half, "on": torch.device("cuda")})
NO_CUDA = "this installation holds no CUDA kernels"
OTHER_GPUS = "this installation's CUDA kernels are for other GPUs"
PAGE_RULE = "Paged KV cache block size must be divisible by 16"

DEVICE_CASES = [
    Case(check_device, "cuda", {"wanted": torch.device("cuda:0")}, NO_CUDA, "a tensor on cuda:0"),
    Case(gpu, "sm_75", {"capability": (7, 5)}, "only supports Ampere GPUs", "capability (7, 5)"),
    Case(gpu, "no_kernels", {"archs": []}, NO_CUDA, "a tensor on cuda:1"),
    Case(gpu, "newer_kernels", {"archs": ["100", "120"]}, OTHER_GPUS, "kernels for 100;120"),
    Case(gpu, "newer_minor", {"capability": (8, 0), "archs": ["86"]}, OTHER_GPUS, "for 86"),
    # The PTX is that of the last one; a letter ties an architecture's code to its own cards.
    Case(gpu, "ptx_of_the_last", {"archs": ["80", "100"]}, OTHER_GPUS, "for 80;100"),
    Case(gpu, "letter", {"capability": (10, 0), "archs": ["90a"]}, OTHER_GPUS, "for 90a"),
    Case(gpu, "older_letter", {"capability": (8, 9), "archs": ["90a"]}, OTHER_GPUS, "for 90a"),
    Case(gpu, "ptx_of_none", {"capability": (12, 0), "archs": ["90a", "100f"]}, OTHER_GPUS, "100f"),
    Case(capture, "capture", {"capturing": True}, "while a CUDA graph is captured", "in a capture"),
    Case(check_dense, "all_meta", {"q": Q.to("meta")} | both(META_KV), "no META kernels", "meta"),
    Case(
        check_dense,
        "k",
        {"k": META_KV},
        "k is not on the device of q",
        f"q on {Q.device}, k on meta",
    ),
    Case(
        check_dense,
        "v",
        {"v": META_KV},
        "v is not on the device of q",
        f"q on {Q.device}, v on meta",
    ),
    Case(
        check_dense,
        "alibi",
        {"alibi_slopes": torch.ones(4, device="meta")},
        "alibi_slopes is not on the device of q",
        "alibi_slopes on meta",
    ),
    Case(page, "cuda_24", {"size": 24}, PAGE_RULE, "page size 24 on cuda"),
    Case(dtype, "cuda_fp32", {"wanted": torch.float32}, DTYPE, "torch.float32 on cuda"),
]

CASES = SHARED + DENSE_CASES + DEVICE_CASES


@pytest.mark.parametrize("case", by_id(CASES))
def test_refused(case: Case):
    """Each message says what was wrong, what was received and the rule."""
    assert_refused(case)


# ---- Controls ------------------------------------------------------------------------------------

CONTROLS = [
    *(
        Case(function, "unchanged", {})
        for function in (*PUBLIC, forward, raw, check_dense, page, dtype, gpu, capture)
    ),
    *(Case(dense, str(dtype), {"q": Q.to(dtype)} | both(KV.to(dtype))) for dtype in DTYPES),
    Case(dense, "d_256", of_d(256)),
    Case(dense, "d_1", of_d(1)),
    Case(dense, "last_stride", {"q": half(2, 5, 16, 4).mT} | both(half(2, 7, 16, 2).mT)),
    Case(dense, "no_keys", both(half(2, 0, 2, 16))),
    Case(dense, "no_queries", {"q": half(2, 0, 4, 16)}),
    Case(dense, "dropout_0.999", {"dropout_p": 0.999}),
    Case(dense, "scale_0", {"softmax_scale": 0.0}),
    Case(dense, "scale_negative", {"softmax_scale": -1.0}),
    Case(dense, "softcap", {"softcap": 1e-3}),
    Case(dense, "window_list", {"window_size": [3, 0]}),
    Case(dense, "window_tensor", {"window_size": torch.tensor([3, 0])}),
    Case(dense, "window_of_tensors", {"window_size": (ints(3)[0], ints(0)[0])}),
    Case(dense, "alibi_heads", {"alibi_slopes": ones(4)}),
    Case(dense, "alibi_batch", {"alibi_slopes": ones(2, 4)}),
    Case(page, "cpu_1", {"size": 1, "on": torch.device("cpu")}),
    Case(gpu, "older_minor", {"capability": (8, 9), "archs": ["80"]}),
    Case(gpu, "letter", {"archs": ["90a"]}),
    Case(gpu, "family", {"capability": (10, 3), "archs": ["100f"]}),
    Case(gpu, "ptx", {"capability": (12, 0), "archs": ["80"]}),
    Case(gpu, "ptx_before_a_letter", {"capability": (12, 0), "archs": ["80", "90a"]}),
]


@pytest.mark.parametrize("case", by_id(CONTROLS))
def test_control_is_accepted(case: Case):
    """At the edge of each rule a call goes through: no rule is stricter than it says."""
    case.function.call(**case.arguments())


@pytest.mark.parametrize("what", ["nvcc", "CUDA_HOME", "FLASH_ATTN_FORCE_CUDA=1", "isolation"])
def test_a_library_without_gpu_kernels_names_the_cure(what):
    with pytest.raises(RuntimeError, match=NO_CUDA) as caught:
        check_gpu((9, 0), [])
    assert what in str(caught.value).split("rule:")[1]


def test_a_library_for_other_gpus_names_the_architecture_to_build():
    with pytest.raises(RuntimeError, match='FLASH_ATTN_CUDA_ARCHS="90"'):
        check_gpu((9, 0), ["100"])


def test_contents_are_not_read_on_a_gpu_unless_asked(monkeypatch):
    """Then a capture is nobody's business either."""
    monkeypatch.setenv("FLASH_ATTN_CHECK", "0")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not _check_contents.reads_contents(torch.device("cuda"))
