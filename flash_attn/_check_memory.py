"""The rule for memory that a call writes: no two elements of it share a byte, nor does an input.

Else the bytes would depend on which write comes last, and no rule says which does. Views of one
buffer that lie beside or between each other (k and v of one packed cache, page by page or row by
row) share no byte; so where the ranges of two tensors meet, their elements are compared. A decode
call asks this once per layer, and lays its tensors out alike each time: answers are remembered.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

from torch import Tensor

from flash_attn._refusal import refuse

# Comparisons of two boxes. Views of one buffer need a few dozen; what needs more interlocks in ways
# that nobody lays a cache out in, and is taken to overlap.
MAX_STEPS = 10_000

Box = tuple[tuple[int, int], ...]  # (stride in bytes, size) of each dimension, widest stride first


def written(outputs: Mapping[str, Tensor], inputs: Mapping[str, Tensor | None]) -> None:
    """``outputs`` are written while ``inputs`` are read; no element of them shares memory."""
    for name, x in outputs.items():
        if not x.is_contiguous() and _overlaps_itself(_box_of(x)):
            received = f"{name} of shape {tuple(x.shape)} with strides {x.stride()}"
            rule = "each element of a tensor that a call writes has memory of its own"
            refuse(f"elements of {name} share memory, and {name} is written to", received, rule)
    spans = [(name, x, *_span(x)) for name, x in {**outputs, **inputs}.items() if x is not None]
    spans = [span for span in spans if span[2] < span[3]]  # an empty tensor meets nothing
    for i, (name, x, begin, end) in enumerate(spans):
        if name not in outputs:
            break  # they come first
        for other_name, other, other_begin, other_end in spans[i + 1 :]:
            if end <= other_begin or other_end <= begin:
                continue
            if _share_a_byte(_box_of(x), _box_of(other), other_begin - begin):
                what = f"{name} and {other_name} share memory, and {name} is written to"
                received = (
                    f"{name} of shape {tuple(x.shape)} with strides {x.stride()}, {other_name} of "
                    f"shape {tuple(other.shape)} with strides {other.stride()}"
                )
                refuse(what, received, "what a call writes shares no byte with its other tensors")


def _span(x: Tensor) -> tuple[int, int]:
    """Address of the first byte, and of the one behind the last."""
    begin = x.data_ptr()
    if x.is_contiguous():
        return begin, begin + x.nbytes
    return begin, begin + _extent(x.shape, x.stride()) * x.element_size()


@lru_cache(maxsize=1024)
def _extent(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last one; 0 of an empty tensor."""
    if 0 in shape:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _box_of(x: Tensor) -> Box:
    return _box(x.shape, x.stride(), x.element_size())


@lru_cache(maxsize=1024)
def _box(shape: tuple[int, ...], strides: tuple[int, ...], element_size: int) -> Box:
    """The bytes of a tensor that has any; dimensions that continue one another are one."""
    dims = [(s * element_size, n) for n, s in zip(shape, strides, strict=True)]
    merged: list[tuple[int, int]] = []
    for stride, size in sorted(dim for dim in (*dims, (1, element_size)) if dim[1] > 1):
        if merged and stride == merged[-1][0] * merged[-1][1]:
            merged[-1] = (merged[-1][0], merged[-1][1] * size)
        else:
            merged.append((stride, size))
    return tuple(reversed(merged))


def _reach(box: Box) -> int:
    return sum(stride * (size - 1) for stride, size in box)


@lru_cache(maxsize=1024)
def _overlaps_itself(box: Box) -> bool:
    """Two elements of the box share a byte: an outer dimension steps onto what lies within it."""
    for i, (stride, size) in enumerate(box):
        within = box[i + 1 :]
        if stride == 0:
            return True
        steps = min(size - 1, _reach(within) // stride)
        if any(_share_a_byte(within, within, step * stride) for step in range(1, steps + 1)):
            return True
    return False


@lru_cache(maxsize=1024)
def _share_a_byte(a: Box, b: Box, offset: int) -> bool:
    """Whether two boxes meet, where b begins ``offset`` bytes behind a."""
    a, b = (tuple(dim for dim in box if dim[0] > 0) for box in (a, b))
    steps = 0

    def meet(a: Box, b: Box, offset: int) -> bool:
        nonlocal steps
        steps += 1
        if offset > _reach(a) or -offset > _reach(b):
            return False
        if (not a and not b) or steps > MAX_STEPS:
            return True
        # Take the widest stride out of both: a's index less b's can be whatever leaves their
        # remainders a chance to meet.
        stride = max(box[0][0] for box in (a, b) if box)
        sizes = [box[0][1] if box and box[0][0] == stride else 1 for box in (a, b)]
        inner_a = a[1:] if sizes[0] > 1 else a
        inner_b = b[1:] if sizes[1] > 1 else b
        first = -((_reach(inner_a) - offset) // stride)
        last = (_reach(inner_b) + offset) // stride
        between = range(max(first, 1 - sizes[1]), min(last, sizes[0] - 1) + 1)
        return any(meet(inner_a, inner_b, offset - step * stride) for step in between)

    return meet(a, b, offset)
