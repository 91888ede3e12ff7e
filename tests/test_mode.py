"""Where ``deterministic()`` reaches: the threads of a backward pass, tasks, generators, any order.

What it does to bytes, and to compiled code: test_compile.py.
"""

import asyncio
import contextlib
import contextvars
import gc
import threading
from collections.abc import AsyncIterator, Callable, Iterator

import pytest
import torch
from device import DEVICE, FINEST, ON_GPU
from torch.utils.checkpoint import checkpoint

import flash_attn
from flash_attn import _mode, deterministic, flash_attn_func, is_deterministic
from flash_attn.testing import assert_bitwise_equal, bitwise_equal, random_normal

# Few queries and many keys: what standard mode cuts, so that the two modes differ in bytes.
QUERIES, KEYS = 1, 3000

both_checkpoints = pytest.mark.parametrize(
    "use_reentrant", [True, False], ids=["reentrant", "not reentrant"]
)


@pytest.fixture(autouse=True)
def no_block_is_open():
    flash_attn.set_deterministic(False)
    yield
    assert not _mode._enabling, "a block is still open"
    assert not is_deterministic()


def in_a_thread(function: Callable[[], object]) -> None:
    """In a new thread: one that no context variable of this one reaches."""
    failures: list[BaseException] = []

    def run() -> None:
        try:
            function()
        except BaseException as failure:
            failures.append(failure)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failures:
        raise failures[0]


# ---- Threads that run a backward graph -----------------------------------------------------------


class Step:
    """A training step of b=8: its forward pass, then its gradients."""

    def __init__(self) -> None:
        heads = 4 if ON_GPU else 1
        shapes = ((8, s, heads, 64) for s in (QUERIES, KEYS, KEYS))
        self.inputs = [
            random_normal(shape, seed=i, dtype=FINEST, device=DEVICE).requires_grad_()
            for i, shape in enumerate(shapes)
        ]

    def forward(self, use_reentrant: bool | None) -> torch.Tensor:
        """None: without checkpointing."""
        if use_reentrant is None:
            return flash_attn_func(*self.inputs)
        return checkpoint(flash_attn_func, *self.inputs, use_reentrant=use_reentrant)

    def backward(self, out: torch.Tensor) -> list[torch.Tensor]:
        out.backward(random_normal(out.shape, seed=9, dtype=FINEST, device=DEVICE))
        gradients = [x.grad for x in self.inputs]
        for x in self.inputs:
            x.grad = None
        return gradients

    def run(self, use_reentrant: bool | None) -> tuple[torch.Tensor, list[torch.Tensor]]:
        out = self.forward(use_reentrant)
        return out, self.backward(out)


@both_checkpoints
def test_a_recomputation_on_another_thread_is_inside_the_block_of_its_step(use_reentrant):
    """On the CPU the caller of backward() runs the graph; on a GPU a thread of autograd's."""
    step = Step()
    with deterministic():
        expected_out, expected = step.run(None)
        out = step.forward(use_reentrant)
        assert_bitwise_equal(out, expected_out)
        gradients: list[torch.Tensor] = []
        in_a_thread(lambda: gradients.extend(step.backward(out)))
        again = step.forward(use_reentrant)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert_bitwise_equal(gradient, wanted)

    in_a_thread(lambda: gradients.extend(step.backward(again)))  # the block is closed
    control = gradients[len(expected) :]
    assert not all(map(bitwise_equal, control, expected)), "the two modes must differ here"


@pytest.mark.gpu
@both_checkpoints
def test_a_checkpointed_step_on_a_gpu_is_the_step_without(use_reentrant):
    """Autograd recomputes on the thread of the device, in whatever way the step asks for it."""
    step = Step()
    with deterministic():
        expected_out, expected = step.run(None)
        out, gradients = step.run(use_reentrant)
    assert_bitwise_equal(out, expected_out)
    for gradient, wanted in zip(gradients, expected, strict=True):
        assert_bitwise_equal(gradient, wanted)


def mode_of_a_backward() -> bool:
    """What a hook of a graph that this thread runs finds."""
    seen: list[bool] = []
    x = torch.ones(1, device="cpu", requires_grad=True)
    x.register_hook(lambda _: seen.append(is_deterministic()))
    (2 * x).backward()
    return seen[0]


def test_only_threads_that_run_a_backward_graph_are_reached():
    def other_thread() -> None:
        assert not is_deterministic()
        assert mode_of_a_backward()
        assert not is_deterministic()

    with deterministic():
        in_a_thread(other_thread)
    in_a_thread(lambda: pytest.fail("still on") if mode_of_a_backward() else None)


def test_a_failed_backward_leaves_its_thread_as_it_was():
    class Fails(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dout):
            raise KeyError("boom")

    def other_thread() -> None:
        with pytest.raises(KeyError, match="boom"):
            Fails.apply(torch.ones(1, device="cpu", requires_grad=True)).backward()
        assert not is_deterministic()

    with deterministic():
        in_a_thread(other_thread)


def test_a_block_of_the_backward_thread_itself_comes_first():
    def other_thread() -> None:
        with deterministic(False):
            assert not mode_of_a_backward()
        assert mode_of_a_backward()

    with deterministic():
        in_a_thread(other_thread)


def test_only_blocks_that_turn_the_mode_on_reach_a_backward_thread():
    def expect(mode: bool) -> Callable[[], None]:
        def other_thread() -> None:
            assert mode_of_a_backward() is mode

        return other_thread

    with deterministic(False):
        in_a_thread(expect(False))
        with deterministic():
            in_a_thread(expect(True))
        in_a_thread(expect(False))
    with deterministic():
        with deterministic(), deterministic(False):
            in_a_thread(expect(True))  # any block that is open, whatever is inside it
            assert not mode_of_a_backward()  # this thread knows better
        in_a_thread(expect(True))
    in_a_thread(expect(False))
    flash_attn.set_deterministic(True)
    with deterministic(False):
        in_a_thread(expect(True))
    flash_attn.set_deterministic(False)


def test_many_threads_open_and_close_at_once():
    start = threading.Barrier(8)

    def open_and_close() -> None:
        start.wait(timeout=60)
        for i in range(500):
            with deterministic(), deterministic(i % 2 == 0):
                assert is_deterministic() is (i % 2 == 0)
            assert not is_deterministic()

    threads = [threading.Thread(target=open_and_close) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not _mode._enabling


# ---- Closing, in any order and by anybody --------------------------------------------------------


async def deterministic_stream(enabled: bool = True) -> AsyncIterator[bool]:
    with deterministic(enabled):
        while True:
            yield is_deterministic()


@pytest.mark.parametrize("enabled", [True, False])
def test_another_task_may_close_an_async_generator(enabled):
    async def main() -> None:
        stream = deterministic_stream(enabled)
        assert await anext(stream) is enabled
        await asyncio.create_task(stream.aclose())
        assert is_deterministic() is not enabled  # this task opened the block, and it is closed
        with deterministic(enabled):
            assert is_deterministic() is enabled
        assert is_deterministic() is not enabled

    flash_attn.set_deterministic(not enabled)
    asyncio.run(main())
    flash_attn.set_deterministic(False)


def test_a_block_that_another_task_closes_leaves_those_around_and_inside_it():
    async def main() -> None:
        stream = deterministic_stream()
        with deterministic(False):
            await anext(stream)
            with deterministic(False):
                await asyncio.create_task(stream.aclose())
                assert not is_deterministic()
            assert not is_deterministic()
        assert not is_deterministic()
        with deterministic():
            stream = deterministic_stream(False)
            assert not await anext(stream)
            await asyncio.create_task(stream.aclose())
            assert is_deterministic()

    asyncio.run(main())


def test_the_task_that_closes_keeps_its_own_blocks():
    async def main() -> None:
        stream = deterministic_stream()

        async def close() -> None:
            with deterministic(False):
                await stream.aclose()
                assert not is_deterministic()
            with deterministic():
                assert is_deterministic()
            assert not is_deterministic()

        closing = asyncio.create_task(close())  # with a context from before the block
        await anext(stream)
        await closing
        assert not is_deterministic()

    asyncio.run(main())


def test_a_loop_that_shuts_down_closes_what_is_left():
    async def main() -> None:
        await anext(deterministic_stream())

    complaints: list[object] = []
    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda _, context: complaints.append(context))
    try:
        loop.run_until_complete(main())
        gc.collect()
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.run_until_complete(asyncio.sleep(0))
    finally:
        loop.close()
    assert complaints == []


def test_many_generators_closed_elsewhere_leave_nothing_behind():
    async def main() -> None:
        for _ in range(100):
            stream = deterministic_stream()
            await anext(stream)
            await asyncio.create_task(stream.aclose())
        assert len(_mode._inside.get()) <= 1

    asyncio.run(main())


def test_a_task_started_inside_stays_inside():
    """As with every context variable: the task has what its parent had when it started it."""

    async def child(left: asyncio.Event) -> bool:
        await left.wait()
        return is_deterministic()

    async def main() -> None:
        left = asyncio.Event()
        with deterministic():
            task = asyncio.create_task(child(left))
        assert not is_deterministic()
        left.set()
        assert await task

    asyncio.run(main())


def test_blocks_may_be_closed_in_the_order_of_their_opening():
    first, second, third = deterministic(), deterministic(False), deterministic()
    for block in (first, second, third):
        block.__enter__()
    assert is_deterministic()
    first.__exit__(None, None, None)
    assert is_deterministic()  # the third
    third.__exit__(None, None, None)
    assert not is_deterministic()  # the second
    flash_attn.set_deterministic(True)
    assert not is_deterministic()
    second.__exit__(None, None, None)
    assert is_deterministic()
    flash_attn.set_deterministic(False)


def test_an_outer_block_closed_first_does_not_come_back():
    outer, inner = deterministic(), deterministic(False)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    inner.__exit__(None, None, None)
    assert not is_deterministic()


def test_an_exit_stack_may_outlive_the_block_that_filled_it():
    with contextlib.ExitStack() as stack:
        stack.enter_context(deterministic())
        moved = stack.pop_all()
        with deterministic(False):
            moved.close()
            assert not is_deterministic()
        assert not is_deterministic()
    with contextlib.ExitStack() as stack:
        for enabled in (True, False, True):
            stack.enter_context(deterministic(enabled))
        assert is_deterministic()


def generator() -> Iterator[bool]:
    with deterministic():
        while True:
            yield is_deterministic()


def test_a_generator_collected_by_another_thread_closes_its_block():
    rows = generator()
    assert next(rows)
    assert is_deterministic()  # it leaks into its consumer while it is suspended
    held = [rows]
    del rows
    unraised: list[object] = []

    def collect() -> None:
        with deterministic(False):
            held.clear()
            gc.collect()
            assert not is_deterministic()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.unraisablehook", unraised.append)
        in_a_thread(collect)
    assert unraised == []
    assert not is_deterministic()


def test_generators_that_take_turns_close_in_any_order():
    first, second = generator(), generator()
    next(first), next(second)
    first.close()
    assert is_deterministic()  # the second is suspended inside its block
    second.close()
    assert not is_deterministic()


def test_a_context_of_its_own_may_be_left_open_and_closed_from_outside():
    block = deterministic()
    context = contextvars.copy_context()
    context.run(block.__enter__)
    assert not is_deterministic()
    assert context.run(is_deterministic)
    block.__exit__(None, None, None)
    assert not context.run(is_deterministic)


def test_it_may_decorate_a_function():
    @deterministic()
    def decorated(depth: int) -> bool:
        return is_deterministic() and (depth == 0 or decorated(depth - 1))

    assert decorated(2)
    assert not is_deterministic()
