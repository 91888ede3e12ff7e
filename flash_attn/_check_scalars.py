"""The rules for numbers, switches and windows: of which type they are, and of which size.

Types are settled where a call comes in, before PyTorch's schema of an op sees the arguments and
refuses them in words of its own. Sizes are looked at inside the ops: under torch.compile nothing
may be known about them earlier.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, maybe_current_level, maybe_get_level
from torch._compile import _disable_dynamo
from torch._functorch.pyfunctorch import temporarily_pop_interpreter_stack
from torch.autograd import forward_ad

from flash_attn._arguments import Scoring
from flash_attn._refusal import refuse

MAX_NUM_SPLITS = 128
INT32_MAX = 2**31 - 1
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
# Elements that no machine has memory for; beyond it PyTorch fails on the number itself.
MAX_ELEMENTS = 2**48
INTEGER_RULE = "an int, or an integer tensor with one element"


# ---- Types ---------------------------------------------------------------------------------------


def window(window_size: Sequence[int] | Tensor) -> tuple[int, int]:
    """The window as two ints; callers pass a tuple, a list, a tensor or a NumPy array."""
    entries = window_size.tolist() if hasattr(window_size, "tolist") else window_size
    if not isinstance(entries, (tuple, list)) or len(entries) != 2:
        rule = "(left, right), two integers, where a negative one means unlimited"
        refuse("window_size must have two entries", f"{window_size!r}", rule)
    return _side(entries[0]), _side(entries[1])


def _side(value: Any) -> int:
    """A side that no 64 bits hold is farther than any key, like a negative one."""
    side = any_integer("window_size", value)
    return side if _fits_64_bits(side) else -1


def integer(name: str, value: Any, rule: str = INTEGER_RULE) -> int:
    """``value`` as an int that 64 bits hold."""
    value = any_integer(name, value, rule)
    if not _fits_64_bits(value):
        received = f"an integer of {value.bit_length()} bits"
        refuse(f"{name} is out of range", received, "64 bits hold the number and its sign")
    return value


def _fits_64_bits(value: int) -> bool:
    """A compiler may know nothing of a number but that, and must not be asked."""
    return torch.compiler.is_compiling() or INT64_MIN <= value <= INT64_MAX


def any_integer(name: str, value: Any, rule: str = INTEGER_RULE) -> int:
    """``value`` as an int of any size, for a caller whose own bounds are below 64 bits."""
    if isinstance(value, (int, torch.SymInt)):
        return value  # type: ignore[return-value]  # a SymInt stands for an int
    try:  # integers of NumPy, and integer tensors with one element; a float has no __index__
        if not (isinstance(value, Tensor) and value.dtype == torch.bool):
            return operator.index(value)
    except (TypeError, RuntimeError):
        pass
    refuse(f"{name} must hold integers", f"{value!r}", rule)


def cache_length(value: Any) -> int:
    """cache_seqlens as one int for all sequences, which a tensor of int32 can hold."""
    rule = "an int for all sequences, or an int32 tensor (b) with one length for each"
    used = integer("cache_seqlens", value, rule)
    if torch.compiler.is_compiling():  # a graph cannot refuse; the op can, and must not see it wrap
        return max(min(used, INT32_MAX), -1)
    not_negative("cache_seqlens", used)
    if used > INT32_MAX:
        refuse("cache_seqlens is out of range", f"cache_seqlens={used}", f"at most {INT32_MAX}")
    return used


def number(name: str, value: Any) -> float:
    """``value`` as a float: a number of Python, or the one in a tensor or a NumPy scalar."""
    if isinstance(value, float):  # first, since nearly every call stops here
        return value
    if isinstance(value, (torch.SymFloat, torch.SymInt)):
        return torch.sym_float(value)
    if isinstance(value, int):
        return _as_float(value)
    if isinstance(value, Tensor):
        received = None
        if value.requires_grad and torch.is_grad_enabled():
            received = f"{name} with requires_grad=True"
        elif forward_ad._current_level >= 0 and _has_tangent(value):
            received = f"a tangent of {name}"
        if received is not None:
            rule = f"a number or {name}.detach(); to train a scale, multiply q by it"
            refuse(f"no gradient flows into {name}", received, rule)
    held = _held(value)
    if isinstance(held, (float, int)) and not isinstance(held, bool):
        return _as_float(held)
    refuse(f"{name} must be a number", f"{value!r}", "a float, or a real tensor with one element")


@_disable_dynamo  # its stand-in for x has no tangent; torch.compiler.disable would import it now
def _has_tangent(x: Tensor) -> bool:
    """Whether forward mode differentiates x, by a dual level or at any level of ``torch.func``."""
    if torch._VF._unpack_dual(x, level=0)[1] is not None:
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    inner = get_unwrapped(x) if maybe_get_level(x) == maybe_current_level() else x
    with temporarily_pop_interpreter_stack():  # a transform hides the tangents of those around it
        return _has_tangent(inner)


def optional_number(name: str, value: Any) -> float | None:
    return None if value is None else number(name, value)


def flag(name: str, value: Any) -> bool:
    """``value`` as a bool: True or False, an integer as Python takes it, or one element of both."""
    if isinstance(value, (bool, torch.SymBool)):
        return value  # type: ignore[return-value]  # a SymBool stands for a bool
    held = value if isinstance(value, int) else _held(value)
    if isinstance(held, int):
        return bool(held)
    refuse(f"{name} must be True or False", f"{value!r}", "a bool")


def _as_float(value: Any) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond every float, whose sign is all that the rules ask for
        return math.inf if value > 0 else -math.inf


def _held(value: Any) -> Any:
    """The Python number in a tensor or a NumPy value of one element; None where there is none."""
    if not hasattr(value, "item"):
        return None
    try:
        return value.item()
    except (TypeError, ValueError, RuntimeError):  # several elements, or no memory
        return None


def generator_is_none(gen: object) -> None:
    if gen is not None:
        what = "The `generator` argument is no longer supported"
        refuse(what, f"a {type(gen).__name__}", "pass None and seed PyTorch's default generator")


# ---- Sizes ---------------------------------------------------------------------------------------


def not_negative(name: str, value: int) -> None:
    if value < 0:
        refuse(f"{name} must not be negative", f"{name}={value}", f"{name} >= 0")


def scoring(given: Scoring, return_softmax: bool = False) -> None:
    dropout_p, softmax_scale, softcap = given.dropout_p, given.softmax_scale, given.softcap
    if not 0.0 <= dropout_p < 1.0:  # true for NaN as well, like the tests below
        refuse("dropout_p (p_dropout) is out of range", f"{dropout_p=}", "0 <= dropout_p < 1")
    if not math.isfinite(softmax_scale):
        refuse("softmax_scale is not finite", f"{softmax_scale=}", "a finite number")
    if not 0.0 <= softcap < math.inf:
        refuse("softcap is out of range", f"{softcap=}", "finite and >= 0, where 0 means off")
    if softcap > 0.0 and dropout_p > 0.0:
        what = "Softcapping does not support dropout for now"
        refuse(what, f"{softcap=}, {dropout_p=}", "at most one of the two is above 0")
    if return_softmax and dropout_p == 0.0:
        what = "return_softmax is only supported when p_dropout > 0.0"
        refuse(what, f"{return_softmax=}, {dropout_p=}", "S_dmask exists only under dropout")


def splits(num_splits: int) -> None:
    not_negative("num_splits", num_splits)
    if num_splits > MAX_NUM_SPLITS:
        what = f"num_splits > {MAX_NUM_SPLITS} not supported"
        refuse(what, f"{num_splits=}", f"0 (automatic) to {MAX_NUM_SPLITS}")


def s_dmask(b: int, h_q: int, max_seqlen_q: int, max_seqlen_k: int) -> None:
    """S_dmask has a row and a column for every token that the maxima allow, used or not."""
    if b * h_q * max_seqlen_q * max_seqlen_k > MAX_ELEMENTS:
        received = f"{b=}, {h_q=}, {max_seqlen_q=}, {max_seqlen_k=}"
        rule = f"b * h_q * max_seqlen_q * max_seqlen_k <= {MAX_ELEMENTS} with return_attn_probs"
        refuse("S_dmask is too large", received, rule)
