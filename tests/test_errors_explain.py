"""``explain`` refuses what the call that it explains refuses, with the words of that call."""

from typing import Any

import numpy as np
import pytest
import torch
from device import DEVICE, DTYPES, ON_GPU
from hypothesis import given
from hypothesis import strategies as st

from flash_attn import explain, flash_attn_func, flash_attn_with_kvcache

WHERE = torch.empty(0, device=DEVICE).device  # with its index, as a call's messages have it
VALID: dict[str, Any] = {
    "b": 2,
    "s_q": 3,
    "s_k": 70,
    "h_q": 4,
    "h_kv": 2,
    "d": 16,
    "dtype": DTYPES[0],
    "num_splits": 0,
}


def attend(
    b: int,
    s_q: int,
    s_k: int,
    h_q: int,
    h_kv: int,
    d: int,
    dtype: torch.dtype,
    num_splits: int,
) -> None:
    """The dense call; by way of a cache where it has splits, which the other has no word for."""
    q = torch.ones((b, s_q, h_q, d), dtype=dtype, device=DEVICE)
    kv = [torch.ones((b, s_k, h_kv, d), dtype=dtype, device=DEVICE) for _ in "kv"]
    if num_splits:
        flash_attn_with_kvcache(q, *kv, num_splits=num_splits)
    else:
        flash_attn_func(q, *kv)


def refusal_of(call: Any, **arguments: Any) -> str:
    """The message, empty for a call that is accepted."""
    try:
        call(**arguments)
    except RuntimeError as error:
        return str(error)
    return ""


REFUSED = [
    ({"h_q": 3}, "Number of heads in key/value must divide number of heads in query"),
    ({"h_q": 0}, "Number of heads in key/value must divide number of heads in query"),
    ({"h_kv": 0}, "Number of heads in key/value must divide number of heads in query"),
    ({"h_kv": 8}, "Number of heads in key/value must divide number of heads in query"),
    ({"d": 0}, "head dimension must be positive"),
    ({"d": 257}, "FlashAttention forward only supports head dimension at most 256"),
    ({"b": 0}, "batch size must be positive"),
    ({"dtype": torch.float64}, "FlashAttention only support fp16 and bf16 data type"),
    ({"dtype": torch.int8}, "FlashAttention only support fp16 and bf16 data type"),
    ({"num_splits": 129}, "num_splits > 128 not supported"),
    ({"num_splits": -1}, "num_splits must not be negative"),
]
if ON_GPU:
    REFUSED.append(({"dtype": torch.float32}, "FlashAttention only support fp16 and bf16"))


@pytest.mark.parametrize("changes, what", REFUSED, ids=lambda x: str(x)[:40])
def test_explain_has_the_message_of_the_call(changes, what):
    message = refusal_of(explain, **VALID | changes, device=WHERE)
    assert message.startswith(f"flash_attn: {what}")
    assert message == refusal_of(attend, **VALID | changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        *(
            (
                {name: -1},
                f"flash_attn: {name} must not be negative; received {name}=-1; rule: {name} >= 0",
            )
            for name in ("b", "s_q", "s_k", "h_q", "h_kv", "d")
        ),
        *(
            (
                {name: value},
                f"flash_attn: {name} must hold integers; received {value!r}; "
                "rule: an int, or an integer tensor with one element",
            )
            for name, value in (("s_q", 1.5), ("s_k", None), ("d", "64"), ("num_splits", 2.0))
        ),
        (
            {"deterministic": "yes"},
            "flash_attn: deterministic must be True or False; received 'yes'; rule: a bool",
        ),
        (
            {"dtype": "float16"},
            f"flash_attn: FlashAttention only support fp16 and bf16 data type (on the CPU fp32 as "
            f"well); received float16 on {WHERE}; rule: float16, bfloat16, on the CPU float32",
        ),
        (
            {"device": "meta"},
            "flash_attn: this installation holds no META kernels; received a tensor on meta; "
            "rule: all tensors are on the CPU or on a NVIDIA GPU",
        ),
    ],
    ids=lambda x: str(x)[:30],
)
def test_what_no_tensor_can_be_is_refused_too(changes, message):
    assert refusal_of(explain, **{**VALID, "device": WHERE} | changes) == message


@pytest.mark.cpu_only
def test_a_device_without_kernels_is_refused():
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    message = refusal_of(explain, **{**VALID, "device": "cuda"})
    assert message.startswith("flash_attn: this installation holds no CUDA kernels; received ")


@pytest.mark.parametrize(
    "changes",
    [
        *({"s_q": 0}, {"s_k": 0}, {"s_q": 0, "s_k": 0}, {"d": 1}, {"d": 256}, {"h_q": 2}),
        *({"num_splits": 1}, {"num_splits": 128}, {"h_q": 7, "h_kv": 1}, {"b": 1}),
        *({"dtype": dtype} for dtype in DTYPES),
    ],
    ids=str,
)
def test_controls_are_explained(changes):
    assert refusal_of(attend, **VALID | changes) == ""
    assert "segments" in str(explain(**VALID | changes, device=WHERE))


def test_processors_have_the_name_of_what_they_are():
    """A CPU schedules threads, a GPU its multiprocessors."""
    explained = explain(3, 70, 4, 2, 16, device=WHERE)
    kind, count = "threads", torch.get_num_threads()
    if ON_GPU:
        kind = "multiprocessors"
        count = torch.cuda.get_device_properties(WHERE).multi_processor_count
    assert explained.num_processors == count
    assert f"  on        {count} {kind}\n" in str(explained)


def test_integers_of_other_libraries_and_a_default_dtype():
    plain = explain(3, 70, 4, 2, 16, device=WHERE)
    assert explain(np.int64(3), torch.tensor(70), 4, np.int32(2), 16, device=WHERE) == plain


SIZES = st.fixed_dictionaries(
    {
        "b": st.integers(0, 2),
        "s_q": st.sampled_from([0, 1, 5]),
        "s_k": st.sampled_from([0, 1, 65]),
        "h_q": st.integers(0, 4),
        "h_kv": st.integers(0, 4),
        "d": st.sampled_from([0, 1, 33, 256, 257]),
        "dtype": st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]),
        "num_splits": st.sampled_from([0, 1, 128, 129, -1]),
    }
)


@given(SIZES)
def test_explain_accepts_what_the_call_accepts(sizes):
    assert refusal_of(explain, **sizes, device=WHERE) == refusal_of(attend, **sizes)
