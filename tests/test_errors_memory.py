"""What a call writes must not overlap: caches that are appended to, and buffers for gradients.

Tools in test_errors.py. A case lays its caches out in one buffer, whose bytes are compared.
"""

import itertools
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from device import DEVICE
from test_errors import Case, Function, assert_refused, by_id, half, ints

from flash_attn import _check_memory, determinism, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import _flash_attn_backward
from flash_attn.testing import assert_bitwise_equal

pytestmark = pytest.mark.usefixtures("contents_are_checked")

B, ROWS, H, D = 2, 16, 2, 16
Views = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


def append(buffer: torch.Tensor, views: Views, mode: bool = False, **arguments: Any) -> Any:
    """Appends one key to the caches that ``views`` makes in the buffer."""
    k_cache, v_cache = views(buffer)
    new = torch.randn(2, B, 1, H, D).to(buffer)
    given = {"q": new[0], "k": new[0], "v": new[1], "cache_seqlens": 3} | arguments
    given |= {n: x(buffer) for n, x in given.items() if callable(x)}
    with determinism.deterministic(mode):
        return flash_attn_with_kvcache(k_cache=k_cache, v_cache=v_cache, **given)


def separate(buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two caches of B rows, one behind the other."""
    return buffer.view(-1, B, ROWS, H, D)[:2].unbind(0)


def view(offset: int, *strides: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda buffer: buffer.as_strided((B, ROWS, H, D), strides, offset)


def pair(first: Any, second: Any) -> Views:
    return lambda buffer: (first(buffer), second(buffer))


BATCH, ROW = ROWS * H * D, H * D
WHOLE = (BATCH, ROW, D, 1)
FAR = view(8 * BATCH, *WHOLE)  # a place that nothing else of these layouts reaches
BUFFER = torch.randn(16 * BATCH).half().to(DEVICE)
appending = Function("append", append, {"buffer": BUFFER, "views": separate})
strict = Function("strict", append, {"buffer": BUFFER, "views": separate, "mode": True})

ITSELF = "share memory, and {} is written to"
OVERLAPS = [
    ("sequences", pair(view(0, 0, ROW, D, 1), FAR), "elements of k_cache"),
    ("sequences_v", pair(FAR, view(0, 0, ROW, D, 1)), "elements of v_cache"),
    ("rows", pair(view(0, BATCH, 0, D, 1), FAR), "elements of k_cache"),
    ("heads", pair(view(0, BATCH, ROW, 0, 1), FAR), "elements of k_cache"),
    ("rolling", pair(view(0, BATCH, ROW // 2, D, 1), FAR), "elements of k_cache"),
    ("near_sequences", pair(view(0, BATCH - 1, ROW, D, 1), FAR), "elements of k_cache"),
    ("one_cache", pair(view(0, *WHOLE), view(0, *WHOLE)), "k_cache and v_cache"),
    ("one_row_later", pair(view(0, *WHOLE), view(ROW, *WHOLE)), "k_cache and v_cache"),
    ("last_element", pair(view(0, *WHOLE), view(2 * BATCH - 1, *WHOLE)), "k_cache and v_cache"),
    ("before", pair(view(2 * BATCH - 1, *WHOLE), view(0, *WHOLE)), "k_cache and v_cache"),
    (
        "interleaved_by_half",
        pair(view(0, 2 * BATCH, 2 * ROW, D, 1), view(ROW - 1, 2 * BATCH, 2 * ROW, D, 1)),
        "k_cache and v_cache",
    ),
    (
        "columns_and_rows",
        pair(view(0, *WHOLE), view(BATCH, D, 2 * D, BATCH, 1)),
        "k_cache and v_cache",
    ),
]
# New keys, values and queries that lie where the call writes.
CACHE_ROW = view(0, *WHOLE)
INPUTS = {name: lambda buffer: CACHE_ROW(buffer)[:, 3:4] for name in ("k", "v", "q")}
CASES = [
    *(
        Case(function, id, {"views": views}, what, "with strides")
        for function in (appending, strict)
        for id, views, what in OVERLAPS
    ),
    *(
        Case(appending, f"{name}_in_{cache}", {"views": views, name: given}, what, "shape (2, 1, 2")
        for cache, views in (("k", pair(CACHE_ROW, FAR)), ("v", pair(FAR, CACHE_ROW)))
        for name, given in INPUTS.items()
        for what in [f"{cache}_cache and {name} share memory"]
    ),
]


def gradients_in(buffer: torch.Tensor, **places: Any) -> None:
    """A backward whose tensors lie in the buffer where ``places`` says so."""
    x = torch.randn(9, B, ROWS, H, D).to(buffer)
    names = ("dout", "q", "k", "v", "out", "dq", "dk", "dv")
    given = dict(zip(names, x, strict=False)) | {n: at(buffer) for n, at in places.items()}
    lse = torch.zeros(B, H, ROWS, device=buffer.device)
    options = (0.0, 0.25, False, -1, -1, 0.0, None, False)
    tensors = [given[name] for name in names]
    _flash_attn_backward(*tensors[:5], lse, *tensors[5:], *options)


backward = Function("backward", gradients_in, {"buffer": BUFFER})
HERE, EXPANDED = view(0, *WHOLE), view(0, 0, ROW, D, 1)
CASES += [
    Case(backward, "dq_dk", {"dq": HERE, "dk": HERE}, "dq and dk share memory", "strides"),
    Case(backward, "dk_dv", {"dk": HERE, "dv": view(1, *WHOLE)}, "dk and dv share", "strides"),
    Case(backward, "dq_q", {"dq": HERE, "q": HERE}, "dq and q share memory", "strides"),
    Case(backward, "dv_dout", {"dv": HERE, "dout": HERE}, "dv and dout share memory", "strides"),
    Case(backward, "dk_expanded", {"dk": EXPANDED}, "elements of dk share memory", "strides"),
]


@pytest.mark.parametrize("case", by_id(CASES))
def test_refused(case: Case):
    """In both modes, before anything is written: no rule says which of two writes comes last."""
    assert_refused(case)


# ---- Controls: layouts that serving programs use -------------------------------------------------


def packed(dim: int, count: int = 2, first: int = 0) -> Views:
    """k and v out of one tensor that holds ``count`` of them along a dimension."""
    shape = [B, ROWS, H, D]
    shape.insert(dim, count)

    def views(buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = buffer[: count * B * BATCH].view(shape).unbind(dim)[first : first + 2]
        return chosen[0], chosen[1]

    return views


def heads_first(buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(b, h, s, d), as Transformers keeps its caches."""
    k, v = buffer[: 2 * B * BATCH].view(2, B, H, ROWS, D).transpose(2, 3).unbind(0)
    return k, v


def columns(buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v of a head side by side."""
    k, v = buffer[: 2 * B * BATCH].view(B, ROWS, H, 2 * D).split(D, dim=-1)
    return k, v


def shard(buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two heads of six, and rows 2 to 17 of 20."""
    whole = buffer[: 2 * B * 20 * 6 * D].view(2, B, 20, 6, D)[:, :, 2:18, 2:4]
    return whole[0], whole[1]


TABLE = {"block_table": ints([1, 0], [0, 1])}
ACCEPTED = [
    ("separate", separate, {}),
    ("whole_pack", packed(0), {}),
    ("by_sequence", packed(1), {}),
    ("by_row", packed(2), {}),
    ("by_head", packed(3), {}),
    ("columns", columns, {}),
    ("heads_first", heads_first, {}),
    ("shard", shard, {}),
    # q and the new keys out of the tensor that holds the caches, beside them.
    ("qkv", packed(2, 4, 1), {"q": lambda b: b[: 4 * B * BATCH].view(B, ROWS, 4, H, D)[:, :1, 0]}),
    ("pages_by_block", packed(1), {"block_table": ints([0], [1])}),
    ("pages_whole", packed(0), {"block_table": ints([1], [0])}),
    ("no_new_keys", pair(EXPANDED, EXPANDED), {n: half(B, 0, H, D) for n in "kv"}),
    ("read_only", pair(EXPANDED, EXPANDED), {"k": None, "v": None}),
    ("one_input_twice", separate, {n: half(B, 1, H, D) for n in "kvq"}),
]


@pytest.mark.parametrize(("id", "views", "options"), ACCEPTED, ids=[row[0] for row in ACCEPTED])
def test_control_layouts_are_accepted(id, views, options):
    """An append into views of one buffer leaves there what separate caches get."""
    buffer = BUFFER.clone()
    caches = [cache.clone() for cache in views(buffer)]
    torch.manual_seed(1)
    out = append(buffer, views, **options)
    torch.manual_seed(1)
    fixed = {n: x(BUFFER) if callable(x) else x for n, x in options.items()}
    alone = append(BUFFER, lambda _: (caches[0], caches[1]), **fixed)
    assert_bitwise_equal(out, alone)
    for cache, expected in zip(views(buffer), caches, strict=True):
        assert_bitwise_equal(cache, expected)


def test_control_interleaved_gradients_are_accepted():
    """dq, dk and dv out of one packed tensor, as upstream's qkvpacked functions pass them."""

    def third(i: int) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda buffer: buffer[: 3 * B * BATCH].view(B, ROWS, 3, H, D)[:, :, i]

    gradients_in(BUFFER.clone(), dq=third(0), dk=third(1), dv=third(2))


# ---- The decision itself, against the addresses one by one ---------------------------------------


def addresses(shape: tuple[int, ...], strides: tuple[int, ...], item: int) -> list[int]:
    """Every byte of every element."""
    places = itertools.product(*(range(n) for n in shape))
    return [
        item * sum(i * s for i, s in zip(place, strides, strict=True)) + byte
        for place in places
        for byte in range(item)
    ]


def test_the_decision_is_that_of_comparing_every_byte():
    draw = random.Random(0)
    found = {(kind, answer): 0 for kind in ("itself", "two") for answer in (False, True)}
    for _ in range(3000):
        layouts = []
        item = draw.choice([1, 2, 4])
        for _ in range(2):
            rank = draw.randint(0, 4)
            shape = tuple(draw.choice([1, 2, 3, 5]) for _ in range(rank))
            layouts.append((shape, tuple(draw.choice([0, 1, 2, 3, 4, 7, 12, 30]) for _ in shape)))
        offset = draw.randint(-40, 40)
        bytes_of = [addresses(*layout, item) for layout in layouts]
        boxes = [_check_memory._box(*layout, item) for layout in layouts]
        itself = len(set(bytes_of[0])) < len(bytes_of[0])
        two = not {x + offset for x in bytes_of[1]}.isdisjoint(bytes_of[0])
        assert _check_memory._overlaps_itself(boxes[0]) is itself, layouts[0]
        assert _check_memory._share_a_byte(*boxes, offset) is two, (layouts, offset)
        found["itself", itself] += 1
        found["two", two] += 1
    assert min(found.values()) > 300, found


def test_what_takes_too_long_to_compare_is_taken_to_overlap(monkeypatch):
    boxes = [_check_memory._box((2, 40), strides, 2) for strides in ((1000, 4), (1000, 6))]
    assert not _check_memory._share_a_byte(*boxes, 2)
    monkeypatch.setattr(_check_memory, "MAX_STEPS", 3)
    _check_memory._share_a_byte.cache_clear()
    assert _check_memory._share_a_byte(*boxes, 2)
    _check_memory._share_a_byte.cache_clear()


def test_compiled_appends_keep_the_rule():
    """A compiler makes the writes visible in its own way; what overlaps does so there too."""

    def step(new, k_cache, v_cache):
        return flash_attn_with_kvcache(new, k_cache, v_cache, new, new, cache_seqlens=3)

    torch.compiler.reset()
    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    new, buffer = half(B, 1, H, D), BUFFER.clone()
    caches = packed(2)(buffer)
    out = compiled(new, *caches)
    assert_bitwise_equal(out, step(new, *packed(2)(BUFFER.clone())))
    for views in (pair(CACHE_ROW, CACHE_ROW), pair(CACHE_ROW, view(ROW, *WHOLE))):
        with pytest.raises(RuntimeError, match="k_cache and v_cache share memory"):
            compiled(new, *views(buffer))
