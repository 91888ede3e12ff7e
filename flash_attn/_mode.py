"""The switch: whether a call made here and now is deterministic.

The mode is, in this order,

1. what the innermost ``with deterministic():`` of this thread or task says;
2. on, in a thread that runs a backward graph, while any thread or task of the process is inside a
   ``with deterministic():``. Autograd computes on threads of its own, and what is recomputed there
   belongs to a step that such a block surrounds; ``deterministic(False)`` does not reach them;
3. on, when ``torch.use_deterministic_algorithms(True)`` is in force;
4. what ``set_deterministic`` was last told, in any thread of this process;
5. on, when the environment variable FLASH_ATTENTION_DETERMINISTIC is 1.

It is read when an op runs. A call's own ``deterministic=True`` turns it on for that call. Inside a
compiled function ``is_deterministic()`` is guarded: the function is compiled once for each answer.
``set_deterministic`` and ``deterministic()`` break the graph there, and ``fullgraph=True`` refuses
them: call them outside.

A thread starts outside every block, and a task inside those of the code that starts it. A generator
that yields inside a block leaves its consumer inside that block until the generator is closed.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token

import torch

ENVIRONMENT_VARIABLE = "FLASH_ATTENTION_DETERMINISTIC"

_process_default: bool | None = None


class _Block:
    """One ``with deterministic()``; a class of its own, for two of them are never the same."""

    __slots__ = ("enabled", "is_over")

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.is_over = False  # closed by a context that is not the one that opened it


# What this thread or task is inside, outermost first. A tuple: a task shares it with its parent.
_inside: ContextVar[tuple[_Block, ...]] = ContextVar("flash_attn_deterministic", default=())

# The open blocks of all threads that turn the mode on. A set and no counter under a lock: a garbage
# collection may close a generator's block at any instruction, also of the thread that holds the
# lock, while adding to a set and discarding from it are one step each.
_enabling: set[_Block] = set()


def _open_blocks() -> tuple[_Block, ...]:
    """Those that this thread or task is inside, without what another context has closed."""
    return tuple(block for block in _inside.get() if not block.is_over)


class _Mode:
    """The mode in force here and now: the truth of its one instance."""

    def __bool__(self) -> bool:
        if _inside.get():  # seldom, and a call asks this each time
            open_here = _open_blocks()
            if open_here:
                return open_here[-1].enabled
        # The graph task is the backward pass that this thread works for: the thread that called
        # backward(), or a device's thread of the engine, which no context variable reaches. -1: it
        # works for none. Threads that a backward function starts by itself work for none either.
        if _enabling and torch._C._current_graph_task_id() != -1:
            return True
        if torch.are_deterministic_algorithms_enabled():
            return True
        if _process_default is not None:
            return _process_default
        value = os.environ.get(ENVIRONMENT_VARIABLE)
        return value is not None and value.strip().lower() in ("1", "true", "on", "yes")

    # PyTorch's compiler does not trace a property whose getter is a builtin function: it reads the
    # value, and a guard reads it again before each call of what it compiled with that value.
    in_force = property(operator.truth)


_mode = _Mode()


def set_deterministic(enabled: bool) -> None:
    """Turns determinism on or off for the process; ``with deterministic():`` takes precedence."""
    global _process_default
    # A compiled graph would set it only after it has run. (torch.compiler.disable says the same and
    # loads the whole compiler when this module is imported.)
    if torch.compiler.is_compiling():
        torch._dynamo.graph_break()
    _process_default = bool(enabled)


def is_deterministic() -> bool:
    """Whether a call made here and now, by this thread, would be deterministic."""
    return bool(_mode.in_force)


@contextmanager
def deterministic(enabled: bool = True) -> Iterator[None]:
    """Determinism on (or off) inside the block, for this thread or asyncio task only.

    Backward passes that autograd runs on its own threads meanwhile are inside it as well.
    """
    block = _Block(bool(enabled))
    token = _inside.set((*_open_blocks(), block))
    try:
        if block.enabled:
            _enabling.add(block)
        yield
    finally:
        _close(block, token)


def _close(block: _Block, token: Token[tuple[_Block, ...]]) -> None:
    """Closes a block in any order, in any context: a generator's may be closed by another task."""
    _enabling.discard(block)
    remaining = tuple(other for other in _open_blocks() if other is not block)
    try:
        _inside.reset(token)  # for what it refuses; blocks opened since then must stay
    except ValueError:  # another context opened the block, and what that holds cannot be changed
        block.is_over = True
    _inside.set(remaining)
