"""The fast path of a forward call: who takes it, and that nothing shows which way a call went."""

import contextlib
import itertools

import pytest
import torch
from device import DEVICE, FINEST, ON_GPU, SEGMENT, page_size
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn import (
    _fast_path,
    deterministic,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.testing import assert_bitwise_equal, cumulative_lengths

D = 24
NATIVE_OPS = ("_attend", "_attend_cache", "_append_and_attend_cache", "_attend_backward")


def draw(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, D, generator=generator).to(FINEST).to(DEVICE)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def dense(**options):
    q, k, v = draw(2, 7, 4), draw(2, 70, 2, seed=1), draw(2, 70, 2, seed=2)
    return lambda: flash_attn_func(q, k, v, return_attn_probs=True, **options)


LENGTHS = (5, 0, 66)
CU = cumulative_lengths(LENGTHS, DEVICE)


def packed(spare=0, **options):
    total = sum(LENGTHS) + spare
    q, k, v = draw(total, 4), draw(total, 2, seed=1), draw(total, 2, seed=2)
    call = (CU, CU, max(LENGTHS), max(LENGTHS))
    return lambda: flash_attn_varlen_func(q, k, v, *call, return_attn_probs=True, **options)


def paged_pack():
    page = page_size(16)
    q, pages = draw(sum(LENGTHS), 4), draw(2, 8, page, 2, seed=1)
    table = ints(3, 1, 0, 7, 2, 6, 5, 4, 0, 2, 1, 3, 7, 6, 5).reshape(3, 5)
    call = (CU, CU, max(LENGTHS), max(LENGTHS))
    return lambda: flash_attn_varlen_func(
        q, *pages, *call, return_attn_probs=True, block_table=table
    )


def together(function, *shapes, **options):
    tensors = [draw(*shape, seed=n) for n, shape in enumerate(shapes)]
    return lambda: function(*tensors, **options, return_attn_probs=True)


CACHE_ROWS = SEGMENT + 50


def cache(s_new=0, rotary=False, paged=False, lengths=(SEGMENT + 7, 30), s_q=3, **options):
    """A call against a cache; its results and the cache behind it."""
    rows, tables = 2, {}
    capacity = CACHE_ROWS
    if paged:
        page = page_size(16)
        per_sequence = -(-CACHE_ROWS // page)
        rows, capacity = 2 * per_sequence, page
        tables["block_table"] = torch.arange(rows, dtype=torch.int32, device=DEVICE).reshape(2, -1)
    start = draw(2, rows, capacity, 2, seed=3)
    q, k, v = draw(2, s_q, 4), draw(2, max(s_new, 1), 2, seed=1), draw(2, max(s_new, 1), 2, seed=2)
    given = [k, v] if s_new else [None, None]
    if rotary:
        reach = 2 * CACHE_ROWS
        given += [draw(reach, seed=n)[:, :8].contiguous() for n in (4, 5)]
    used = ints(*lengths) if isinstance(lengths, tuple) else lengths

    def call():
        caches = start.clone()
        out, lse = flash_attn_with_kvcache(
            q, *caches, *given, cache_seqlens=used, **tables, **options, return_softmax_lse=True
        )
        return out, lse, caches

    return call


SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625], device=DEVICE)
CALLS = {
    "dense": dense(),
    "dense-causal": dense(causal=True),
    "dense-options": dense(window_size=(9, 3), softcap=5.0, softmax_scale=0.3, alibi_slopes=SLOPES),
    "dense-far-window": dense(window_size=(2**50, 0)),
    "dense-deterministic": dense(deterministic=True),
    "packed": packed(causal=True),
    "packed-spare-tokens": packed(spare=6),
    "packed-paged": paged_pack(),
    "kvpacked": together(flash_attn_kvpacked_func, (2, 7, 4), (2, 70, 2, 2)),
    "qkvpacked": together(flash_attn_qkvpacked_func, (2, 70, 3, 4)),
    "varlen-kvpacked": together(
        flash_attn_varlen_kvpacked_func,
        (71, 4),
        (71, 2, 2),
        cu_seqlens_q=CU,
        cu_seqlens_k=CU,
        max_seqlen_q=66,
        max_seqlen_k=66,
    ),
    "varlen-qkvpacked": together(
        flash_attn_varlen_qkvpacked_func, (71, 3, 4), cu_seqlens=CU, max_seqlen=66
    ),
    "cache": cache(),
    "cache-one-length": cache(lengths=SEGMENT + 7),
    "cache-whole": cache(lengths=None),
    "cache-paged": cache(paged=True, causal=True),
    "cache-leftpad": cache(cache_leftpad=ints(3, 30), causal=True),
    "cache-row": cache(cache_batch_idx=ints(1, 0)),
    "cache-splits": cache(num_splits=3),
    "append": cache(s_new=4),
    "append-one-length": cache(s_new=4, lengths=11),
    "append-rotary": cache(s_new=4, rotary=True),
    "append-rotary-causal": cache(s_new=4, rotary=True, causal=True, rotary_interleaved=False),
    "append-rotary-window": cache(s_new=4, rotary=True, window_size=(40, -1)),
    "append-fills": cache(s_new=20, lengths=(CACHE_ROWS - 20, 0)),
}


@contextlib.contextmanager
def ways(monkeypatch):
    """The number of calls that native ops of the fast path have answered."""
    answered = []

    def counting(op):
        def call(*arguments):
            results = op(*arguments)
            answered.extend([1] if results else [])
            return results

        return call

    with monkeypatch.context() as patch:
        for name in NATIVE_OPS:
            patch.setattr(_fast_path, name, counting(getattr(_fast_path, name)))
        yield answered


def the_long_way(call, monkeypatch):
    with monkeypatch.context() as patch:
        for name in ("attend", "attend_cache"):
            patch.setattr(_fast_path, name, lambda *arguments: None)
        return call()


@pytest.mark.parametrize("mode", [True, False], ids=["deterministic", "standard"])
@pytest.mark.parametrize("name", CALLS)
def test_both_ways_give_the_same(name, mode, monkeypatch):
    """Bytes, dtypes, shapes and strides of all results, and of the cache."""
    with deterministic(mode):
        with ways(monkeypatch) as answered:
            short = CALLS[name]()
        assert len(answered) == 1, "this call went the long way"
        long = the_long_way(CALLS[name], monkeypatch)
    for n, (a, b) in enumerate(zip(short, long, strict=True)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert_bitwise_equal(a, b, f"{name}, result {n}")
        assert not a.requires_grad and a.grad_fn is None


class Watching(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Listening(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Tagged(torch.Tensor):
    pass


def call_of(*tensors):
    return flash_attn_func(*tensors)


Q, K, V = draw(1, 3, 2), draw(1, 5, 2, seed=1), draw(1, 5, 2, seed=2)
LONG_WAYS = {
    "dropout": lambda: flash_attn_func(Q, K, V, 0.5),
    "a subclass": lambda: call_of(Q.as_subclass(Tagged), K, V),
    "a parameter": lambda: call_of(torch.nn.Parameter(Q), K, V),
    "strides that are copied": lambda: call_of(Q.transpose(-1, -2).contiguous().mT, K, V),
    "no queries": lambda: call_of(Q[:, :0], K, V),
    "an integer for a float": lambda: flash_attn_func(Q, K, V, softcap=1),
    "a list for a window": lambda: flash_attn_func(Q, K, V, window_size=[1, 1]),
    "vmap": lambda: torch.vmap(call_of)(Q[None], K[None], V[None]),
    "func.grad": lambda: torch.func.grad(lambda q: call_of(q, K, V).float().sum())(Q),
    "compiled": lambda: torch.compile(call_of, backend="eager")(Q, K, V),
}


@pytest.mark.parametrize("name", LONG_WAYS)
def test_others_go_the_long_way(name, monkeypatch):
    with ways(monkeypatch) as answered:
        LONG_WAYS[name]()
        assert not answered
        call_of(Q, K, V)  # and afterwards the fast path again
        assert len(answered) == 1


@pytest.mark.parametrize("mode", [Watching, Listening])
def test_under_a_mode_a_call_goes_the_long_way(mode, monkeypatch):
    """A mode sees the public op, as it does under a compiler."""
    with ways(monkeypatch) as answered:
        with mode():
            call_of(Q, K, V)
        assert not answered


def test_a_default_device_is_no_such_mode(monkeypatch):
    """It decides where new tensors lie; ours lie beside q."""
    with ways(monkeypatch) as answered, torch.device("meta"):
        assert call_of(Q, K, V).device == Q.device
    assert len(answered) == 1
    with ways(monkeypatch) as answered, torch.device("meta"), Listening():
        call_of(Q, K, V)
    assert not answered


def test_tracers_see_the_public_op(monkeypatch):
    """make_fx, before and behind the dispatcher, and torch.jit.trace."""
    for before in (False, True):
        graph = make_fx(call_of, pre_dispatch=before)(Q, K, V).graph
        names = [str(node.target) for node in graph.nodes]
        assert "flash_attn._attend.default" in names and not any("native" in n for n in names)
    with ways(monkeypatch) as answered:
        torch.jit.trace(call_of, (Q, K, V), check_trace=False)
        assert not answered


def test_without_recording_a_gradient_it_is_taken(monkeypatch):
    q = Q.clone().requires_grad_()
    for context in (torch.no_grad, torch.inference_mode):
        with context(), ways(monkeypatch) as answered:
            assert not call_of(q, K, V).requires_grad
        assert len(answered) == 1


# ---- Gradients ----


def leaves(*shapes):
    return [draw(*shape, seed=n).requires_grad_() for n, shape in enumerate(shapes)]


def transposed(tensors):
    """Heads first in memory: dense, and not contiguous."""
    return [x.detach().transpose(1, 2).contiguous().transpose(1, 2) for x in tensors]


def of_projection():
    """q, k and v as views of one tensor, as a projection makes them; the gradient is its."""
    qkv = draw(2, 70, 12).requires_grad_()
    return [qkv], flash_attn_func(*qkv.unflatten(2, (3, 4)).unbind(2), causal=True)


def dense_gradients(lay=list, **options):
    tensors = lay(leaves((2, 7, 4), (2, 70, 2), (2, 70, 2)))
    tensors = [x.detach().requires_grad_() for x in tensors]
    return tensors, flash_attn_func(*tensors, **options)


def packed_gradients(spare=0):
    total = sum(LENGTHS) + spare
    tensors = leaves((total, 4), (total, 2), (total, 2))
    return tensors, flash_attn_varlen_func(
        *tensors, CU, CU, max(LENGTHS), max(LENGTHS), causal=True
    )


GRADIENTS = {
    "dense": dense_gradients,
    "dense-causal-options": lambda: dense_gradients(
        causal=True, softcap=5.0, softmax_scale=0.3, alibi_slopes=SLOPES
    ),
    "dense-transposed": lambda: dense_gradients(transposed, window_size=(9, 3)),
    "packed": packed_gradients,
    "packed-spare-tokens": lambda: packed_gradients(spare=6),
    "projection": of_projection,
}
DOUTS = {
    "drawn": lambda out: torch.cos(torch.arange(out.numel(), device=DEVICE)).view(out.shape),
    "expanded": lambda out: torch.ones((), device=DEVICE).expand(out.shape),
}


@pytest.mark.parametrize("dout", DOUTS)
@pytest.mark.parametrize("name", GRADIENTS)
def test_both_ways_give_the_same_gradients(name, dout, monkeypatch):
    def gradients():
        tensors, out = GRADIENTS[name]()
        return out, *torch.autograd.grad(out, tensors, DOUTS[dout](out).to(out.dtype))

    with deterministic():
        with ways(monkeypatch) as answered:
            short = gradients()
        assert len(answered) == 2, "a pass went the long way"
        long = the_long_way(gradients, monkeypatch)
    for n, (a, b) in enumerate(zip(short, long, strict=True)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
        assert_bitwise_equal(a, b, f"{name}, result {n}")


def test_one_input_may_want_a_gradient_alone(monkeypatch):
    v = V.clone().requires_grad_()
    with ways(monkeypatch) as answered:
        out, lse, _ = flash_attn_func(Q, K, v, return_attn_probs=True)
        assert out.requires_grad and not lse.requires_grad
        out.sum().backward()
        assert len(answered) == 2
    q, k = (x.clone().requires_grad_() for x in (Q, K))
    flash_attn_func(q, k, V).sum().backward()
    assert v.grad is not None and q.grad is not None and k.grad is not None


class Cut(torch.autograd.Function):
    """Hands no gradient back."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return None


def test_where_no_gradient_comes_back_none_goes_on():
    q, k, v = (x.clone().requires_grad_() for x in (Q, K, V))
    out = Cut.apply(flash_attn_func(q, k, v)).sum() + q.sum()
    gradients = torch.autograd.grad(out, (q, k, v), allow_unused=True)
    assert torch.equal(gradients[0], torch.ones_like(q))
    assert gradients[1:] == (None, None)


def test_what_autograd_does_with_a_graph(monkeypatch):
    """Walked twice, with tensors moved by hooks, recomputed: the same gradients each time."""

    def step(around=contextlib.nullcontext, twice=False, recompute=False):
        q = Q.clone().requires_grad_()
        with around():
            if recompute:
                out = torch.utils.checkpoint.checkpoint(call_of, q, K, V, use_reentrant=False)
            else:
                out = call_of(q, K, V)
        if twice:
            torch.autograd.grad(out, q, torch.ones_like(out), retain_graph=True)
        return torch.autograd.grad(out, q, torch.ones_like(out))[0]

    with deterministic():
        expected = the_long_way(step, monkeypatch)
        for options in (
            {},
            {"twice": True},
            {"around": torch.autograd.graph.save_on_cpu},
            {"recompute": True},
        ):
            assert_bitwise_equal(step(**options), expected, str(options))


@pytest.mark.parametrize("batched", [False, True])
def test_a_backward_pass_that_is_watched_goes_the_long_way(batched, monkeypatch):
    """Gradients of a batch of douts at once; a graph of the backward pass, which is refused."""
    q = Q.clone().requires_grad_()
    out = call_of(q, K, V)
    with ways(monkeypatch) as answered:
        if batched:
            douts = torch.stack([torch.ones_like(out), torch.zeros_like(out)])
            both = torch.autograd.grad(out, q, douts, is_grads_batched=True, retain_graph=True)[0]
            assert not answered
            one = torch.autograd.grad(out, q, douts[0])[0]
            assert_bitwise_equal(both[0], one)
            assert both[1].count_nonzero() == 0
        else:
            (dq,) = torch.autograd.grad(out, q, torch.ones_like(out), create_graph=True)
            assert not answered
            with pytest.raises(RuntimeError, match="second derivatives"):
                dq.sum().backward()


def test_a_changed_input_is_noticed():
    q = Q.clone().requires_grad_()
    k = K.clone()
    out = call_of(q, k, V)
    k.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


# ---- Writes ----


def test_an_append_counts_as_a_write(monkeypatch):
    """Version counters move in an append and in no read; caches of inference mode have none."""
    caches = draw(2, 1, 16, 2)
    k, v = caches[0].clone(), caches[1].clone()
    with ways(monkeypatch) as answered:
        before = k._version, v._version
        flash_attn_with_kvcache(Q, k, v, cache_seqlens=ints(3))
        assert (k._version, v._version) == before
        flash_attn_with_kvcache(Q, k, v, K[:, :1], V[:, :1], cache_seqlens=ints(3))
        assert (k._version, v._version) == (before[0] + 1, before[1] + 1)
        with torch.inference_mode():
            k, v = k.clone(), v.clone()
            flash_attn_with_kvcache(Q, k, v, K[:, :1], V[:, :1], cache_seqlens=ints(3))
    assert len(answered) == 3


@pytest.mark.skipif(ON_GPU, reason="about the CPU alone")
def test_refused_calls_leave_the_cache(monkeypatch):
    """What the native op does not accept it has not touched: the long way says what is wrong."""
    k, v = draw(1, 16, 2), draw(1, 16, 2, seed=1)
    before = k.clone(), v.clone()
    new = K[:, :2], V[:, :2]
    for lengths, rest in itertools.product(
        (ints(15), ints(-1), 15, 17),
        ({}, {"cache_leftpad": ints(9)}, {"cache_batch_idx": ints(1)}),
    ):
        with ways(monkeypatch) as answered, pytest.raises(RuntimeError, match="; rule: "):
            flash_attn_with_kvcache(Q, k, v, *new, cache_seqlens=lengths, **rest)
        assert not answered
    assert_bitwise_equal(k, before[0]), assert_bitwise_equal(v, before[1])
