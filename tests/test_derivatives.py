"""Derivatives: first ones in reverse mode, by autograd or torch.func; every other one is refused.

The danger is a zero. Forward mode and torch.func take a result that nobody recorded for a constant.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from device import DEVICE, FINEST
from test_compile import backends, fresh_compiler  # noqa: F401  the fixture is for all tests here
from torch.autograd import forward_ad

import flash_attn
import flash_attn_2_cuda
from flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
)
from flash_attn.testing import assert_bitwise_equal, cumulative_lengths, random_normal

Function = Callable[..., torch.Tensor]

B, S, H, D = 2, 9, 2, 16
OPTIONS = (0.0, 0.25, True, -1, -1, 0.0)  # of the low-level ops, dropout_p to softcap
CU = cumulative_lengths([S] * B, DEVICE)
PACK = (CU, CU, S, S)

FORWARD_MODE = r"^flash_attn: forward-mode derivatives .*; received a tangent of .*; rule: "
TANGENT_OF_SCALE = r"no gradient flows into softmax_scale; received a tangent of .*; rule: "
SECOND = r"flash_attn: second derivatives .*; received .*; rule: "
NO_CACHE = r"flash_attn: flash_attn_with_kvcache has no gradient; received .*; rule: "


def normal(*shape: int, seed: int) -> torch.Tensor:
    return random_normal(shape, seed=seed, dtype=FINEST, device=DEVICE)


def dense(heads: int = H, seed: int = 0) -> torch.Tensor:
    return normal(B, S, heads, D, seed=seed)


def pack(seed: int = 0) -> torch.Tensor:
    return dense(seed=seed).flatten(0, 1)


def lse(pack: bool = False) -> torch.Tensor:
    return torch.zeros((H, B * S) if pack else (B, H, S), device=DEVICE)


def low_level(name: str) -> Any:
    return getattr(torch.ops.flash_attn, name)


def cache_call(
    q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, **new: torch.Tensor
) -> torch.Tensor:
    return flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=S - 1, **new)


# Functions of three tensors, whose result depends on each of them.
DENSE: dict[str, Function] = {
    "flash_attn_func": lambda q, k, v: flash_attn_func(q, k, v, causal=True),
    "kvpacked": lambda q, k, v: flash_attn_kvpacked_func(q, torch.stack((k, v), 2)),
    "qkvpacked": lambda q, k, v: flash_attn_qkvpacked_func(torch.stack((q, k, v), 2)),
    "_flash_attn_forward": lambda q, k, v: low_level("_flash_attn_forward")(
        q, k, v, *OPTIONS, None, False
    )[0],
    "fwd": lambda q, k, v: flash_attn_2_cuda.fwd(q, k, v, None, None, *OPTIONS, False)[0],
}
VARLEN: dict[str, Function] = {
    "varlen": lambda q, k, v: flash_attn_varlen_func(q, k, v, *PACK, causal=True),
    "varlen_kvpacked": lambda q, k, v: flash_attn_varlen_kvpacked_func(
        q, torch.stack((k, v), 1), *PACK
    ),
    "varlen_qkvpacked": lambda q, k, v: flash_attn_varlen_qkvpacked_func(
        torch.stack((q, k, v), 1), CU, S
    ),
    "_flash_attn_varlen_forward": lambda q, k, v: low_level("_flash_attn_varlen_forward")(
        q, k, v, *PACK, *OPTIONS
    )[0],
}
CACHE: dict[str, Function] = {
    "kvcache, read": cache_call,
    "kvcache, append": lambda q, k, v: cache_call(
        q, torch.zeros_like(dense()), torch.zeros_like(dense()), k=k[:, :1], v=v[:, :1]
    ),
}
BACKWARD: dict[str, Function] = {
    "_flash_attn_backward": lambda q, k, v: low_level("_flash_attn_backward")(
        q, q, k, v, q, lse(), None, None, None, *OPTIONS, None, False
    ),
    "_flash_attn_varlen_backward": lambda q, k, v: low_level("_flash_attn_varlen_backward")(
        *(q.flatten(0, 1), *(x.flatten(0, 1) for x in (q, k, v, q)), lse(pack=True)),
        *(None, None, None, *PACK, *OPTIONS, None, False),
    ),
}
DIFFERENTIABLE = [pytest.param(f, dense, id=name) for name, f in DENSE.items()]
DIFFERENTIABLE += [pytest.param(f, pack, id=name) for name, f in VARLEN.items()]
ALL = DIFFERENTIABLE + [pytest.param(f, dense, id=n) for n, f in (CACHE | BACKWARD).items()]


def dual_tangent(function: Function, x: torch.Tensor, tangent: torch.Tensor) -> object:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(function(forward_ad.make_dual(x, tangent))).tangent


FORWARD_WAYS: dict[str, Callable[[Function, torch.Tensor], object]] = {
    "jvp": lambda f, x: torch.func.jvp(f, (x,), (x,)),
    "dual tensors": lambda f, x: dual_tangent(f, x, x),
    "jacfwd": lambda f, x: torch.func.jacfwd(f)(x),
    "linearize": lambda f, x: torch.func.linearize(f, x)[1](x),
    "vmap of jvp": lambda f, x: torch.func.vmap(lambda t: torch.func.jvp(f, (x,), (t,))[1])(
        x[None]
    ),
    "jvp of grad": lambda f, x: torch.func.jvp(torch.func.grad(lambda y: f(y).sum()), (x,), (x,)),
}


@pytest.mark.parametrize("argument", [0, 1, 2], ids=["q", "k", "v"])
@pytest.mark.parametrize(("function", "tensor"), ALL)
def test_forward_mode_is_refused(function, tensor, argument):
    """Without a check of its own each of these returned the tangent zero, or none."""
    others = [tensor(seed=seed) for seed in range(3)]
    x = others.pop(argument)

    def of_one(y: torch.Tensor) -> torch.Tensor:
        return function(*others[:argument], y, *others[argument:])

    for way in ("jvp", "dual tensors"):
        with pytest.raises(RuntimeError, match=FORWARD_MODE):
            FORWARD_WAYS[way](of_one, x)
    with torch.no_grad(), pytest.raises(RuntimeError, match=FORWARD_MODE):
        dual_tangent(of_one, x, x)
    of_one(x)  # and nothing is left behind


@pytest.mark.parametrize("way", FORWARD_WAYS)
def test_every_way_to_forward_mode_is_refused(way):
    k, v = dense(seed=1), dense(seed=2)
    with pytest.raises(RuntimeError, match=FORWARD_MODE):
        FORWARD_WAYS[way](lambda q: flash_attn_func(q, k, v), dense())


SCALE = torch.tensor(0.25)
TANGENT_WAYS: dict[str, Callable[[Function], Any]] = {
    "jvp": lambda f: torch.func.jvp(f, (SCALE,), (SCALE,)),
    "jacfwd": lambda f: torch.func.jacfwd(f)(SCALE),
    "grad inside": lambda f: torch.func.jvp(
        lambda scale: torch.func.grad(lambda q: f(scale, q).sum())(dense()), (SCALE,), (SCALE,)
    ),
    "vmap inside": lambda f: torch.func.jvp(
        lambda scale: torch.func.vmap(lambda q: f(scale, q))(dense()[None]), (SCALE,), (SCALE,)
    ),
    "dual": lambda f: f(forward_ad.make_dual(SCALE, SCALE)),
    "grad inside dual": lambda f: torch.func.grad(lambda q, scale: f(scale, q).sum(), argnums=0)(
        dense(), forward_ad.make_dual(SCALE, SCALE)
    ),
    "dual, compiled": lambda f: torch.compile(f, backend="eager")(
        forward_ad.make_dual(SCALE, SCALE)
    ),
}


@pytest.mark.parametrize("way", TANGENT_WAYS)
def test_a_tangent_of_a_scale_is_refused(way):
    """The scale becomes a number, and its derivative would be a zero."""

    x = dense()

    def of_scale(scale: torch.Tensor, q: torch.Tensor = x) -> torch.Tensor:
        return flash_attn_func(q, x, x, softmax_scale=scale)

    level = forward_ad.dual_level() if "dual" in way else nullcontext()
    with level, pytest.raises(RuntimeError, match=TANGENT_OF_SCALE):
        TANGENT_WAYS[way](of_scale)


def test_control_a_scale_without_a_tangent_is_a_number_in_forward_mode():
    """Of a constant, a detached one, and one that an inner transform was not asked for."""

    def refused_for_q(scale: torch.Tensor) -> torch.Tensor:
        with pytest.raises(RuntimeError, match=FORWARD_MODE):
            torch.func.jvp(
                lambda q: flash_attn_func(q, q, q, softmax_scale=scale), *[(dense(),)] * 2
            )
        return scale

    refused_for_q(SCALE)
    torch.func.jvp(lambda scale: refused_for_q(scale.detach()), (SCALE,), (SCALE,))
    q = dense()
    gradient = torch.func.grad(lambda q, s: flash_attn_func(q, q, q, softmax_scale=s).sum())
    expected = torch.func.grad(lambda q: flash_attn_func(q, q, q, softmax_scale=0.25).sum())(q)
    with forward_ad.dual_level():
        assert_bitwise_equal(gradient(q, SCALE), expected)


@backends
def test_forward_mode_is_refused_in_compiled_code(backend):
    """Where the compiler traces it, and where it passes dual tensors on."""
    q, k, v = (dense(seed=i) for i in range(3))

    def tangent(x: torch.Tensor) -> torch.Tensor:
        return torch.func.jvp(lambda y: flash_attn_func(y, k, v), (x,), (x,))[1]

    with pytest.raises(Exception, match=r"forward-mode derivatives .* are not supported"):
        torch.compile(tangent, backend=backend)(q)
    compiled = torch.compile(lambda x: flash_attn_func(x, k, v), backend=backend, fullgraph=True)
    with pytest.raises(RuntimeError, match=FORWARD_MODE):
        dual_tangent(compiled, q, q)


def double_backward(function: Function, x: torch.Tensor) -> object:
    x = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(function(x).square().sum(), x, create_graph=True)
    return torch.autograd.grad(dx.sum(), x)


def grad_of_square(function: Function) -> Function:
    return torch.func.grad(lambda x: function(x).square().sum())


SECOND_WAYS: dict[str, Callable[[Function, torch.Tensor], object]] = {
    "create_graph": double_backward,
    "autograd.functional.hessian": lambda f, x: torch.autograd.functional.hessian(
        lambda y: f(y).sum(), x
    ),
    "autograd.functional.jvp": lambda f, x: torch.autograd.functional.jvp(f, x, x),
    "grad of grad": lambda f, x: grad_of_square(grad_of_square(f))(x),
    # The inner gradient is of a sum: nothing but q, k and v leads from it to the outer level.
    "grad of grad of a sum": lambda f, x: grad_of_square(torch.func.grad(lambda y: f(y).sum()))(x),
    "jacrev of jacrev": lambda f, x: torch.func.jacrev(torch.func.jacrev(lambda y: f(y).sum()))(x),
    "of dout": lambda f, x: torch.func.vjp(lambda y: torch.func.vjp(f, x)[1](y)[0], x)[1](x),
}


# Autograd takes the compiled module's entry for a constant, as upstream has it.
BY_AUTOGRAD = [parameter for parameter in DIFFERENTIABLE if parameter.id != "fwd"]


@pytest.mark.parametrize("way", SECOND_WAYS)
@pytest.mark.parametrize(("function", "tensor"), BY_AUTOGRAD)
def test_second_derivatives_are_refused(function, tensor, way):
    k, v = tensor(seed=1), tensor(seed=2)
    with pytest.raises(RuntimeError, match=SECOND):
        SECOND_WAYS[way](lambda q: function(q, k, v), tensor())


def test_hessian_is_refused():
    """It is forward mode over reverse mode."""
    k, v = dense(seed=1), dense(seed=2)
    with pytest.raises(RuntimeError, match=FORWARD_MODE):
        torch.func.hessian(lambda q: flash_attn_func(q, k, v).sum())(dense())


@pytest.mark.parametrize("name", BACKWARD)
def test_a_low_level_backward_has_no_derivative(name):
    q, k, v = (dense(seed=i).requires_grad_() for i in range(3))
    with pytest.raises(RuntimeError, match=SECOND):
        BACKWARD[name](q, k, v).sum().backward()


@pytest.mark.parametrize("mode", [False, True], ids=["standard", "deterministic"])
@pytest.mark.parametrize(("function", "tensor"), DIFFERENTIABLE)
def test_torch_func_gives_the_bytes_of_autograd(function, tensor, mode):
    if function is DENSE["fwd"]:  # the same op, which autograd reaches by its own name only
        expect = DENSE["_flash_attn_forward"]
    else:
        expect = function
    flash_attn.set_deterministic(mode)
    inputs, dout = [tensor(seed=seed) for seed in range(3)], tensor(seed=4)
    leaves = [x.clone().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(expect(*leaves), leaves, dout)
    every = (0, 1, 2)
    by_grad = torch.func.grad(lambda *x: (function(*x) * dout).sum(), every)(*inputs)
    out, pullback = torch.func.vjp(function, *inputs)
    assert_bitwise_equal(out, function(*inputs))
    by_vjp = pullback(dout)
    for name, wanted, *found in zip(("dq", "dk", "dv"), expected, by_grad, by_vjp, strict=True):
        for gradient in found:
            assert_bitwise_equal(gradient, wanted, name)


def test_jacrev_gives_the_bytes_of_autograd():
    flash_attn.set_deterministic(True)
    q, k, v = (normal(1, 3, 1, 8, seed=i) for i in range(3))
    expected = torch.autograd.functional.jacobian(lambda x: flash_attn_func(x, k, v), q)
    found = torch.func.jacrev(lambda x: flash_attn_func(x, k, v))(q)
    assert_bitwise_equal(found, expected)
    assert torch.count_nonzero(found) > 0


def test_a_tensor_outside_the_transform_keeps_its_gradient():
    """The graph outside sees through func.vjp; a second derivative that crosses both is refused."""
    flash_attn.set_deterministic(True)
    q, k, v = (dense(seed=i) for i in range(3))
    k.requires_grad_()
    (expected,) = torch.autograd.grad(flash_attn_func(q, k, v).sum(), k)
    out, pullback = torch.func.vjp(lambda x: flash_attn_func(x, k, v), q)
    assert_bitwise_equal(torch.autograd.grad(out.sum(), k, retain_graph=True)[0], expected)
    with pytest.raises(RuntimeError, match=SECOND):
        torch.autograd.grad(pullback(q)[0].sum(), k)


def test_vmap_gives_the_bytes_of_a_loop():
    """PyTorch runs the op once for each slice; under grad, around it and inside it."""
    flash_attn.set_deterministic(True)
    inputs = [torch.stack([dense(seed=3 * i + j) for j in range(3)]) for i in range(3)]
    gradient = torch.func.grad(lambda q, k, v: flash_attn_func(q, k, v).sum())
    for function in (flash_attn_func, flash_attn_with_kvcache, gradient):
        expected = torch.stack([function(*x) for x in zip(*inputs, strict=True)])
        assert_bitwise_equal(torch.func.vmap(function)(*inputs), expected)
    _, k, v = inputs
    outside = torch.func.grad(lambda q: torch.func.vmap(flash_attn_func)(q, k, v).sum())
    assert_bitwise_equal(outside(inputs[0]), expected)


@backends
def test_compiled_torch_func_gives_the_bytes_of_eager(backend):
    flash_attn.set_deterministic(True)
    q, k, v = (dense(seed=i) for i in range(3))
    gradient = torch.func.grad(lambda x: (flash_attn_func(x, k, v) * 2).sum())
    assert_bitwise_equal(torch.compile(gradient, backend=backend, fullgraph=True)(q), gradient(q))


def test_a_cache_call_has_no_gradient_in_torch_func():
    """Elsewhere its result asks for none. Here that would be the gradient zero."""
    q, k, v = (dense(seed=i) for i in range(3))
    for function in CACHE.values():
        for argument in range(3):
            if function is CACHE["kvcache, append"] or argument == 0:
                with pytest.raises(RuntimeError, match=NO_CACHE):
                    torch.func.grad(lambda *x, f=function: f(*x).sum(), argument)(q, k, v)
    with pytest.raises(RuntimeError, match=NO_CACHE):
        torch.func.grad(lambda x: torch.func.vmap(cache_call)(x, k[None], v[None]).sum())(q[None])

    def constant(x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            weight = cache_call(x, k, v)
        return (weight * x + cache_call(q, k, v)).sum()

    assert_bitwise_equal(torch.func.grad(constant)(q), cache_call(q, k, v))


def test_vmap_over_a_call_that_writes_is_refused():
    q, k, v = (dense(seed=i)[None] for i in range(3))
    before = k.clone()

    def append(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return cache_call(q, k, v, k=q[:, :1], v=q[:, :1])

    refused = (
        r"^flash_attn: vmap is not supported where .*; received vmap over q, k_cache, .*; rule"
    )
    with pytest.raises(RuntimeError, match=refused):
        torch.func.vmap(append)(q, k, v)
    assert_bitwise_equal(k, before)


COS, SIN = (normal(S, D // 2, seed=seed) for seed in (5, 6))
ROTARY: dict[str, Function] = {
    "rotary": lambda x: apply_rotary_emb(x, COS, SIN),
    "rotary, in place": lambda x: apply_rotary_emb(x.clone(), COS, SIN, inplace=True),
    "kv": lambda x: apply_rotary_emb_kv_(torch.stack((x, x), 2), COS, SIN),
    "qkv": lambda x: apply_rotary_emb_qkv_(torch.stack((x, x, x), 2), COS, SIN),
    "module": lambda x: RotaryEmbedding(D, device=DEVICE)(torch.stack((x, x, x), 2)),
}


@pytest.mark.parametrize("name", ROTARY)
def test_rotary_differentiates_in_reverse_mode_only(name):
    """Compiled code used to hand a tangent on unturned. Second derivatives exist: it is linear."""
    function, x = ROTARY[name], dense()
    with pytest.raises(RuntimeError, match="jvp"):  # ours, or PyTorch's of an autograd function
        dual_tangent(function, x, x)
    for transform in (torch.func.grad, torch.func.jacfwd, torch.func.vmap):
        y = x[None] if transform is torch.func.vmap else x
        with pytest.raises(RuntimeError, match=r"^flash_attn: the rotary embedding does not run"):
            transform(lambda y: function(y).sum())(y)
    compiled = torch.compile(function, backend="aot_eager")
    with pytest.raises(RuntimeError, match="flash_attn: "):
        dual_tangent(compiled, x, x)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(function(leaf).square().sum() / 2, leaf, create_graph=True)
    (ddx,) = torch.autograd.grad(dx, leaf, x)
    assert_bitwise_equal(ddx, dx)  # of a quadratic form: both are its matrix times x
