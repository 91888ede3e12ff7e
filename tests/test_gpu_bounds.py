"""Index tensors on a GPU that hold nonsense: nobody reads them on the host, the kernels bound them.

Without FLASH_ATTN_CHECK such a call returns something, and writes to nothing but its own tensors:
each of them lies between two fences. A later call, or check_device, raises what was wrong. With
FLASH_ATTN_CHECK=1 the rule that it breaks refuses it.
"""

import re
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest
import torch
from device import DEVICE
from strategies import autograd

from flash_attn import (
    check_device,
    determinism,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward
from flash_attn.testing import assert_bitwise_equal

pytestmark = pytest.mark.gpu

STRIP = 1 << 20  # bytes of a fence; an index that is off by little ends in one
FENCE = 0xFF  # as 16 and as 32 bits: NaN, which shows in a result that it was read into
FAR, LAST, FIRST = 1 << 30, 2**31 - 1, -(2**31)  # off by much: an unbounded address would fault


class Fences:
    """Tensors between strips of FENCE bytes, and whether those are still whole."""

    def __init__(self) -> None:
        self.buffers: list[torch.Tensor] = []

    def around(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of x between two strips."""
        size = x.numel() * x.element_size()
        buffer = x.new_full((STRIP + size + STRIP,), FENCE, dtype=torch.uint8)
        self.buffers.append(buffer)
        return buffer[STRIP : STRIP + size].view(x.dtype).view(x.shape).copy_(x)

    @contextmanager
    def around_what_is_allocated(self):
        """Results and scratch memory, too: whatever the package asks PyTorch for."""
        names = ("empty", "empty_like", "zeros", "zeros_like", "full")

        def fenced(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
            def allocate(*shape: Any, **options: Any) -> torch.Tensor:
                x = make(*shape, **options)
                return self.around(x) if x.device.type == DEVICE.type and x.numel() else x

            return allocate

        with pytest.MonkeyPatch.context() as patch:
            for name in names:
                patch.setattr(torch, name, fenced(getattr(torch, name)))
            yield

    def assert_whole(self) -> None:
        for n, buffer in enumerate(self.buffers):
            for side, strip in (("before", buffer[:STRIP]), ("behind", buffer[-STRIP:])):
                assert (strip == FENCE).all(), f"{side} tensor {n} of {buffer.numel()} bytes"


class Bad(NamedTuple):
    """A call that is valid but for `changes`."""

    name: str
    call: Callable[..., Any]
    arguments: dict[str, Any]
    changes: dict[str, Any]
    rule: str  # words of the message
    first_is_good: bool  # the first sequence of the batch is untouched by the changes

    def late_words(self) -> str:
        """What the late message says: it names the tensor, if not which rule was first seen."""
        if "page" in self.rule or "capacity of block_table" in self.rule:
            return "block_table"
        name = next(iter(self.changes))
        return {"cache_seqlens": "cache_seqlens|cos/sin seqlen"}.get(name, name)

    def tensors(self, fences: Fences, changed: bool) -> dict[str, Any]:
        chosen = self.arguments | (self.changes if changed else {})
        drawn = {n: x() if callable(x) else x for n, x in chosen.items()}
        return {n: fences.around(x) if torch.is_tensor(x) else x for n, x in drawn.items()}


def rows(*shape: int, seed: int = 0):
    """Normal numbers, drawn when the call is made."""
    generator = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=generator.clone_state()).bfloat16().to(DEVICE)


def ints(*values: Any):
    return lambda: torch.tensor(values, dtype=torch.int32, device=DEVICE)


def there_and_back(q, k, v, **options):
    """(out, dq, dk, dv) of the varlen function."""

    def attend(q, k, v):
        return flash_attn_varlen_func(q, k, v, causal=True, **options)

    return attend(q, k, v), *autograd(attend, (q, k, v), torch.ones_like(q))


H_Q, H_KV, D = 4, 2, 64
# Packed: lengths 40, 70, 20 and 300, 64, 200; the packs end with rows that belong to nobody.
PACK = {
    "q": rows(140, H_Q, D),
    "k": rows(580, H_KV, D, seed=1),
    "v": rows(580, H_KV, D, seed=2),
    "cu_seqlens_q": ints(0, 40, 110, 130),
    "cu_seqlens_k": ints(0, 300, 364, 564),
    "max_seqlen_q": 70,
    "max_seqlen_k": 300,
}
# Five pages of 64 keys a sequence make a capacity of 320.
TABLE = ints((0, 3, 6, 9, 12), (1, 4, 7, 10, 13), (2, 5, 8, 11, 14))
PAGES = {"k": rows(15, 64, H_KV, D, seed=1), "v": rows(15, 64, H_KV, D, seed=2)}
PAGED = PACK | PAGES | {"block_table": TABLE}
LOW_LEVEL = PACK | {"dropout_p": 0.0, "softmax_scale": 0.125, "causal": True}
# Caches of 600 rows each for three sequences, of which 500, 70 and 0 are in use.
CACHE = {
    "q": rows(3, 5, H_Q, D),
    "k_cache": rows(4, 600, H_KV, D, seed=1),
    "v_cache": rows(4, 600, H_KV, D, seed=2),
    "cache_seqlens": ints(500, 70, 0),
    "causal": True,
}
APPEND = CACHE | {"k": rows(3, 5, H_KV, D, seed=3), "v": rows(3, 5, H_KV, D, seed=4)}
ROTATED = APPEND | {"rotary_cos": rows(600, 16, seed=5), "rotary_sin": rows(600, 16, seed=6)}
PAGED_CACHE = {
    "k_cache": PAGES["k"],
    "v_cache": PAGES["v"],
    "block_table": TABLE,
    "cache_seqlens": ints(310, 70, 0),
}


def table(row: int, column: int, page: int):
    def spoilt() -> torch.Tensor:
        good = TABLE()
        good[row, column] = page
        return good

    return {"block_table": spoilt}


def bad_calls() -> list[Any]:
    cases = []

    def add(title, call, arguments, name_of_changed, value, rule, first_is_good=False):
        changes = value if isinstance(value, dict) else {name_of_changed: value}
        name = f"{title}-{name_of_changed}-{rule.replace(' ', '_')}-{len(cases)}"
        bad = Bad(name, call, arguments, changes, rule, first_is_good)
        cases.append(pytest.param(bad, id=name))

    for name, ends, total in (("cu_seqlens_q", (40, 110), 130), ("cu_seqlens_k", (300, 364), 564)):
        for offsets, rule in (
            ((0, ends[1], ends[0], total), "must not decrease"),
            ((0, LAST, FIRST, total), "must not decrease"),
            ((0, *ends, FIRST), "must not decrease"),
            ((0, *ends, total + 77), "points outside its pack"),
            ((0, *ends, FAR), "points outside its pack"),
            ((-9, *ends, total), "must start at 0"),
            ((FIRST, *ends, total), "must start at 0"),
            ((FAR, FAR + 9, FAR + 9, FAR + 9), "must start at 0"),
        ):
            add("pack", there_and_back, PACK, name, ints(*offsets), f"{name} {rule}")
    for name, longest in (("max_seqlen_q", 16), ("max_seqlen_k", 64)):
        add("pack", there_and_back, PACK, name, longest, f"exceeds {name}")

    no_page = "block_table names a page outside the cache"
    for page in (-1, 15, FAR, FIRST):
        add("pages", flash_attn_varlen_func, PAGED, f"page {page}", table(1, 0, page), no_page)
    beyond = {"cu_seqlens_k": ints(0, 300, 5300, 5500), "max_seqlen_k": 5000}
    capacity = "a sequence exceeds the capacity of block_table"
    add("pages", flash_attn_varlen_func, PAGED, "lengths", beyond, capacity)

    for name, good in (("seqused_k", 300), ("leftpad_k", 0)):
        for value in (-1, 100, FAR, FIRST):
            lengths = ints(good, value, good and 200)
            rule = f"{name} is out of range"
            add("low level", _flash_attn_varlen_forward, LOW_LEVEL, name, lengths, rule)

    negative, too_long = "cache_seqlens must not be negative", "cache_seqlens exceeds the capacity"
    for title, arguments in (("cache", CACHE), ("paged cache", CACHE | PAGED_CACHE)):
        good = 310 if "paged" in title else 500
        for value, rule in ((-1, negative), (FIRST, negative), (601, too_long), (FAR, too_long)):
            lengths = ints(good, value, 0)
            call = flash_attn_with_kvcache
            add(title, call, arguments, "cache_seqlens", lengths, rule, first_is_good=True)
    past_end = r"the append of 5 key\(s\) at cache_seqlens runs past the end"
    for title, arguments in (
        ("append", APPEND),
        ("rotated", ROTATED),
        ("paged append", APPEND | PAGED_CACHE),
    ):
        good = 310 if "paged" in title else 500
        end = 320 if "paged" in title else 600
        for value, rule in (
            *((-1, negative), (FIRST, negative)),
            *((end - 3, past_end), (end, past_end), (FAR, past_end), (LAST, past_end)),
        ):
            lengths = ints(good, value, 0)
            call = flash_attn_with_kvcache
            add(title, call, arguments, "cache_seqlens", lengths, rule, first_is_good=True)
    for title, arguments in (("cache", CACHE), ("append", APPEND)):
        for value in (-1, 4, FAR, FIRST):
            index, call = ints(0, value, 1), flash_attn_with_kvcache
            rule = "cache_batch_idx names a row outside the cache"
            add(title, call, arguments, "cache_batch_idx", index, rule, first_is_good=True)
        for value in (-1, 90, FAR, FIRST):
            pad, call = ints(0, value, 0), flash_attn_with_kvcache
            rule = "cache_leftpad is out of range"
            add(title, call, arguments, "cache_leftpad", pad, rule, first_is_good=True)
    for title, arguments in (("paged cache", CACHE), ("paged append", APPEND)):
        for page in (-1, 15, FAR, FIRST):
            paged, call = arguments | PAGED_CACHE, flash_attn_with_kvcache
            spoilt = table(1, 1, page)
            add(title, call, paged, f"page {page}", spoilt, no_page, first_is_good=True)
    return cases


def faults_left() -> list[str]:
    """What check_device raises until it is silent: one fault, or one more that came late."""
    messages: list[str] = []
    while len(messages) < 4:
        try:
            check_device()
        except RuntimeError as error:
            messages.append(str(error))
        else:
            break
    return messages


every_bad_call = pytest.mark.parametrize("bad", bad_calls())
modes = pytest.mark.parametrize("deterministic", [True, False], ids=["deterministic", "standard"])


def first_result(results):
    return results[0] if isinstance(results, tuple) else results


@every_bad_call
@modes
def test_a_bad_call_stays_inside_its_tensors(bad, deterministic, monkeypatch):
    """Every fence is whole, a good neighbour keeps its bytes, and the fault is raised, late."""
    monkeypatch.delenv("FLASH_ATTN_CHECK", raising=False)
    fences = Fences()
    determinism.set_deterministic(deterministic)
    good, spoilt = (bad.tensors(fences, changed) for changed in (False, True))
    expected = first_result(bad.call(**good))
    check_device()  # the control: a good call leaves nothing to raise
    out, raised = None, ""
    try:
        with fences.around_what_is_allocated():
            out = first_result(bad.call(**spoilt))
    except RuntimeError as error:  # by a later one of the calls that this call consists of
        raised = str(error)
    torch.cuda.synchronize()
    fences.assert_whole()
    found = faults_left()
    for message in [raised] if raised else found:
        assert re.search(bad.late_words(), message), message
    assert raised or found, "nobody learns of it"
    if bad.first_is_good and deterministic:
        assert_bitwise_equal(out[0], expected[0], "out of the sequence that is well")


@every_bad_call
def test_asked_to_check_it_is_refused(bad, contents_are_checked):
    """By name, and before anything is written."""
    arguments = bad.tensors(Fences(), changed=True)
    before = {n: x.clone() for n, x in arguments.items() if torch.is_tensor(x)}
    with pytest.raises(RuntimeError, match=bad.rule):
        bad.call(**arguments)
    for name, x in before.items():
        assert_bitwise_equal(arguments[name], x, name)


@pytest.mark.parametrize("arguments", [CACHE, APPEND, ROTATED, CACHE | PAGED_CACHE])
def test_control_a_good_call_is_accepted(arguments, contents_are_checked):
    """What the bad calls change is all that is wrong with them, and results are fenced in."""
    fences = Fences()
    good = Bad("", flash_attn_with_kvcache, arguments, {}, "", True).tensors(fences, False)
    given = len(fences.buffers)
    with fences.around_what_is_allocated():
        out = flash_attn_with_kvcache(**good)
    assert out.isfinite().all() and len(fences.buffers) >= given + 2  # out and lse at least
    fences.assert_whole()


@pytest.mark.parametrize("at", [-1, 10], ids=["before", "behind"])
def test_control_a_write_outside_is_seen(at):
    """One element before or behind a tensor of ten."""
    fences = Fences()
    x = fences.around(torch.zeros(10, device=DEVICE))
    fences.assert_whole()
    x.as_strided((1,), (1,), x.storage_offset() + at).fill_(1.0)
    with pytest.raises(AssertionError, match="before tensor" if at < 0 else "behind tensor"):
        fences.assert_whole()
