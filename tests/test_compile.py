"""torch.compile changes no byte of attention; the mode is read when an op runs, by its thread."""

import asyncio
import contextlib
import os
import shutil
import threading

import pytest
import torch
from device import DEVICE, FINEST, ON_GPU

import flash_attn
from flash_attn import (
    _mode,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from flash_attn.testing import (
    assert_bitwise_equal,
    bitwise_equal,
    random_normal,
)

needs_compiler = pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "g++")) is None, reason="inductor needs a C++ compiler"
)
backends = pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.slow, needs_compiler])]
)

# 33 blocks of keys, in several segments. A single head in a single sequence leaves threads idle, so
# the standard mode splits the keys its own way and the two modes differ in bytes.
DECODE_KEYS = 2100
DECODE_HEADS = 32 if ON_GPU else 1  # a GPU has more to leave idle


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Compiled code of another test must not be reused, nor its recompilations counted here."""
    torch.compiler.reset()


def normal(shape: tuple[int, ...], seed: int, dtype: torch.dtype = FINEST) -> torch.Tensor:
    return random_normal(shape, seed=seed, dtype=dtype, device=DEVICE)


class Attention(torch.nn.Module):
    """Projection, then the same causal attention as a dense batch and as a pack."""

    def __init__(self, embed_dim: int, num_heads: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.projection = torch.nn.Linear(embed_dim, 3 * embed_dim, dtype=dtype)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        b, s, _ = x.shape
        q, k, v = self.projection(x).view(b, s, 3, self.num_heads, -1).unbind(2)
        return q, k, v, *attend(q, k, v)


def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    b, s = q.shape[:2]
    cu_seqlens = torch.arange(0, (b + 1) * s, s, dtype=torch.int32, device=q.device)
    packed = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), cu_seqlens, cu_seqlens, s, s, causal=True
    )
    return flash_attn_func(q, k, v, causal=True), packed.unflatten(0, (b, s))


@backends
@pytest.mark.parametrize("head_dim", [32, 20], ids=["d32", "d20 is padded"])
def test_a_compiled_model_gives_the_bytes_of_eager_attention(backend, head_dim):
    """Compared on the compiled model's own q, k, v: its projection may round as it likes."""
    model = Attention(2 * head_dim, num_heads=2, dtype=torch.bfloat16).to(DEVICE)
    x = normal((2, 150, 2 * head_dim), seed=0, dtype=torch.bfloat16)
    q, k, v, dense, packed = torch.compile(model, fullgraph=True, backend=backend)(x)
    for out, expected in zip((dense, packed), attend(q, k, v), strict=True):
        assert_bitwise_equal(out, expected)
    assert_bitwise_equal(dense, packed)


@backends
def test_compiled_gradients_have_the_bytes_of_eager_ones(backend):
    """Doubling is exact, and both layouts add the same: nothing around attention can round."""

    def function(q, k, v):
        dense, packed = attend(q * 2, k * 4, v)
        return dense + packed

    inputs = [normal((2, 150, 2, 32), seed=i).requires_grad_() for i in range(3)]
    dout = normal((2, 150, 2, 32), seed=4)
    flash_attn.set_deterministic(True)
    out = torch.compile(function, fullgraph=True, backend=backend)(*inputs)
    assert_bitwise_equal(out, function(*inputs))
    gradients = torch.autograd.grad(out, inputs, dout)
    expected = torch.autograd.grad(function(*inputs), inputs, dout)
    for name, gradient, wanted in zip(("dq", "dk", "dv"), gradients, expected, strict=True):
        assert_bitwise_equal(gradient, wanted, name)


@backends
def test_a_compiled_decode_step_appends_to_the_cache(backend):
    def step(q, k, v, k_cache, v_cache, cache_seqlens, cos, sin):
        return flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cos, sin, cache_seqlens, causal=True
        )

    compiled = torch.compile(step, fullgraph=True, backend=backend)
    cos, sin = normal((96, 16), seed=5), normal((96, 16), seed=6)
    cache_seqlens = torch.tensor([70, 3], dtype=torch.int32, device=DEVICE)
    caches = [normal((2, 96, 2, 32), seed=seed) for seed in (3, 4)]
    expected_caches = [cache.clone() for cache in caches]
    for seed in (10, 20):  # the second call finds what the first one wrote
        q, k, v = (normal((2, 1, h, 32), seed=seed + h) for h in (4, 2, 2))
        out = compiled(q, k, v, *caches, cache_seqlens, cos, sin)
        expected = step(q, k, v, *expected_caches, cache_seqlens, cos, sin)
        assert_bitwise_equal(out, expected)
        for cache, expected_cache in zip(caches, expected_caches, strict=True):
            assert_bitwise_equal(cache, expected_cache)
        cache_seqlens = cache_seqlens + 1


def decode_inputs() -> list[torch.Tensor]:
    lengths = (1, DECODE_KEYS, DECODE_KEYS)
    return [normal((1, s, DECODE_HEADS, 64), seed=i) for i, s in enumerate(lengths)]


def decode(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, deterministic: bool = False
) -> torch.Tensor:
    """Out and the log-sum-exp: 16 bits of out alone are mostly the same in both modes."""
    out, lse, _ = flash_attn_func(q, k, v, deterministic=deterministic, return_attn_probs=True)
    return torch.cat((out.float().flatten(), lse.flatten()))


def decode_in_both_modes() -> dict[bool, torch.Tensor]:
    """The bytes of either mode; that they differ is what the tests below stand on."""
    found = {}
    for mode in (False, True):
        with flash_attn.deterministic(mode):
            found[mode] = decode(*decode_inputs())
    assert not bitwise_equal(found[True], found[False]), "the two modes must differ for this shape"
    return found


@backends
def test_toggling_the_mode_between_two_calls_of_compiled_code_takes_effect(backend):
    expected, inputs = decode_in_both_modes(), decode_inputs()
    compiled = torch.compile(decode, fullgraph=True, backend=backend)
    for mode in (False, True, False):
        flash_attn.set_deterministic(mode)
        assert_bitwise_equal(compiled(*inputs), expected[mode], f"with {mode=}")
    with flash_attn.deterministic():
        assert_bitwise_equal(compiled(*inputs), expected[True], "inside deterministic()")
    assert_bitwise_equal(compiled(*inputs), expected[False], "after deterministic()")
    torch.use_deterministic_algorithms(True)
    assert_bitwise_equal(compiled(*inputs), expected[True], "with PyTorch's own switch")


def test_asking_in_the_call_itself_survives_compilation():
    expected, inputs = decode_in_both_modes(), decode_inputs()
    compiled = torch.compile(decode, fullgraph=True, backend="aot_eager")
    flash_attn.set_deterministic(False)
    for mode in (True, False, True):
        assert_bitwise_equal(compiled(*inputs, deterministic=mode), expected[mode])


def test_the_context_manager_is_for_its_own_thread():
    """While one is inside, another computes in standard mode; set_deterministic is for all."""
    expected, inputs = decode_in_both_modes(), decode_inputs()
    flash_attn.set_deterministic(False)
    is_inside, may_leave = threading.Event(), threading.Event()
    seen = {}

    def inside():
        with flash_attn.deterministic():
            is_inside.set()
            seen["inside"] = (flash_attn.is_deterministic(), decode(*inputs))
            may_leave.wait(timeout=60)

    thread = threading.Thread(target=inside)
    thread.start()
    assert is_inside.wait(timeout=60)
    seen["outside"] = (flash_attn.is_deterministic(), decode(*inputs))
    flash_attn.set_deterministic(True)
    seen["told all"] = (flash_attn.is_deterministic(), decode(*inputs))
    may_leave.set()
    thread.join()
    for where, mode in (("inside", True), ("outside", False), ("told all", True)):
        assert seen[where][0] is mode
        assert_bitwise_equal(seen[where][1], expected[mode], where)


def test_the_context_manager_is_for_its_own_task():
    """Two asyncio tasks take turns in one thread, each inside its own mode."""

    async def task(mode: bool) -> list[bool]:
        seen = []
        with flash_attn.deterministic(mode):
            for _ in range(3):
                seen.append(flash_attn.is_deterministic())
                await asyncio.sleep(0)
        return seen

    async def both() -> list[list[bool]]:
        return await asyncio.gather(task(True), task(False))

    assert asyncio.run(both()) == [[True] * 3, [False] * 3]


def test_modes_nest_and_an_exception_leaves_none_behind():
    flash_attn.set_deterministic(False)
    with flash_attn.deterministic():
        with flash_attn.deterministic(False):
            assert not flash_attn.is_deterministic()
        assert flash_attn.is_deterministic()
    with pytest.raises(ValueError, match="boom"), flash_attn.deterministic():
        raise ValueError("boom")
    assert not flash_attn.is_deterministic()


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "aot_eager"])
@pytest.mark.parametrize("mode", [False, True], ids=["standard", "deterministic"])
def test_backward_runs_in_the_mode_of_its_forward(mode, compiled):
    """Toggled between the two, on another thread that has a mode of its own.

    Gradients follow the forward's out and lse, so the two modes' gradients differ here.
    """
    function = flash_attn_func
    if compiled:
        function = torch.compile(flash_attn_func, fullgraph=True, backend="aot_eager")
    inputs = [x.requires_grad_() for x in decode_inputs()]
    dout = normal((1, 1, DECODE_HEADS, 64), seed=9)
    expected = {}
    for either in (False, True):
        with flash_attn.deterministic(either):
            expected[either] = torch.autograd.grad(flash_attn_func(*inputs), inputs, dout)
    assert not all(map(bitwise_equal, expected[True], expected[False]))

    flash_attn.set_deterministic(mode)
    out = function(*inputs)
    flash_attn.set_deterministic(not mode)
    gradients = []

    def backward():
        with flash_attn.deterministic(not mode):
            gradients.extend(torch.autograd.grad(out, inputs, dout))

    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()
    for gradient, wanted in zip(gradients, expected[mode], strict=True):
        assert_bitwise_equal(gradient, wanted)


def test_a_forward_leaves_its_mode_in_rng_state_for_the_backward():
    """In bit 62 of the offset; a state without dropout holds nothing else."""
    options = (0.0, 0.125, False, -1, -1, 0.0, None, False)
    for mode in (False, True):
        with flash_attn.deterministic(mode):
            *_, rng_state = torch.ops.flash_attn._flash_attn_forward(*decode_inputs(), *options)
        assert rng_state.tolist() == [0, mode << 62]


def test_two_equal_dropout_calls_in_one_graph_draw_two_masks():
    q, k, v = (normal((2, 65, 2, 32), seed=i).requires_grad_() for i in range(3))

    def twice(q, k, v):
        return [flash_attn_func(q, k, v, dropout_p=0.5) for _ in range(2)]

    first, second = torch.compile(twice, fullgraph=True, backend="aot_eager")(q, k, v)
    assert not torch.equal(first, second)


@backends
def test_a_compiled_checkpoint_recomputes_under_the_same_mask(backend):
    """out is linear in v: <dout, out> = <dv, v> when both passes drop the same weights."""
    q, k, v = (normal((2, 65, 2, 32), seed=i).requires_grad_() for i in range(3))

    def attend(q, k, v):
        return flash_attn_func(q, k, v, dropout_p=0.5)

    def checkpointed(q, k, v):
        return torch.utils.checkpoint.checkpoint(attend, q, k, v, use_reentrant=False)

    out = torch.compile(checkpointed, fullgraph=True, backend=backend)(q, k, v)
    dout = normal(out.shape, seed=9)
    (dv,) = torch.autograd.grad(out, v, dout)
    weighted, expected = ((x.double() * y.double()).sum() for x, y in ((dout, out), (dv, v)))
    rounding = torch.finfo(FINEST).eps * out.numel() ** 0.5  # of as many terms; they are below one
    torch.testing.assert_close(weighted, expected, rtol=1e-4, atol=max(1e-3, 2 * rounding))


@backends
def test_compiled_code_may_ask_for_the_mode(backend):
    """It is compiled once for each answer, and each call gets the code of the mode in force."""

    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if flash_attn.is_deterministic() else x - 1

    x = torch.zeros(1, device=DEVICE)
    compiled = torch.compile(function, fullgraph=True, backend=backend)

    def expect(mode: bool) -> None:
        assert compiled(x).item() == (1 if mode else -1)

    for _ in range(3):
        for mode in (False, True):
            flash_attn.set_deterministic(mode)
            expect(mode)
            with flash_attn.deterministic(not mode):
                expect(not mode)
                with flash_attn.deterministic(mode):
                    expect(mode)
            expect(mode)
    flash_attn.set_deterministic(False)
    expect(False)
    torch.use_deterministic_algorithms(True)
    expect(True)
    torch.use_deterministic_algorithms(False)
    expect(False)


def test_compiled_code_asks_the_thread_that_calls_it():
    def function(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if flash_attn.is_deterministic() else x - 1

    x = torch.zeros(1, device=DEVICE)
    compiled = torch.compile(function, fullgraph=True, backend="eager")
    flash_attn.set_deterministic(False)
    seen = []
    with flash_attn.deterministic():
        assert compiled(x).item() == 1
        thread = threading.Thread(target=lambda: seen.append(compiled(x).item()))
        thread.start()
        thread.join()
        assert compiled(x).item() == 1
    assert seen == [-1]


def test_asking_for_the_mode_costs_compiled_code_two_versions_at_most(monkeypatch):
    monkeypatch.delenv(_mode.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(_mode, "_process_default", None)
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Model(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1 if flash_attn.is_deterministic() else x - 1

    x = torch.zeros(1, device=DEVICE)
    compiled = torch.compile(Model(), fullgraph=True, backend=backend)
    for depth in range(6):
        with contextlib.ExitStack() as stack:
            for level in range(depth):
                stack.enter_context(flash_attn.deterministic(level % 2 == 0))
            assert compiled(x).item() == (1 if depth % 2 else -1)
        monkeypatch.setenv(_mode.ENVIRONMENT_VARIABLE, str(depth % 2))
        assert compiled(x).item() == (1 if depth % 2 else -1)
        monkeypatch.delenv(_mode.ENVIRONMENT_VARIABLE)
    assert len(graphs) == 2


def test_a_block_inside_compiled_code_breaks_the_graph():
    q, k, v = decode_inputs()

    def function(q, k, v):
        with flash_attn.deterministic():
            inside = decode(q, k, v)
        return inside, decode(q, k, v)

    expected = decode_in_both_modes()
    flash_attn.set_deterministic(False)
    compiled = torch.compile(function, backend="aot_eager")
    for _ in range(2):
        inside, after = compiled(q, k, v)
        assert_bitwise_equal(inside, expected[True])
        assert_bitwise_equal(after, expected[False])
    assert not flash_attn.is_deterministic()


def test_setting_the_mode_inside_compiled_code_breaks_the_graph():
    q, k, v = decode_inputs()

    def switch_on(q, k, v):
        flash_attn.set_deterministic(True)
        return decode(q, k, v)

    expected = decode_in_both_modes()
    flash_attn.set_deterministic(False)
    assert_bitwise_equal(torch.compile(switch_on, backend="aot_eager")(q, k, v), expected[True])
    flash_attn.set_deterministic(False)
    torch.compiler.reset()
    with pytest.raises(Exception, match="set_deterministic"):
        torch.compile(switch_on, backend="aot_eager", fullgraph=True)(q, k, v)
