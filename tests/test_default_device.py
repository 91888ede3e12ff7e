"""PyTorch's default device and dtype change nothing: every tensor is made where its user needs it.

A tensor that native code or a check reads, made on the default device, was a segmentation fault.
"""

import ast
import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from device import DEVICE, FINEST, ON_GPU, page_size
from torch.utils._device import _device_constructors

import flash_attn
import flash_attn_2_cuda
from flash_attn import bert_padding, determinism, reference, testing
from flash_attn import flash_attn_interface as interface
from flash_attn.layers import rotary
from flash_attn.testing import assert_bitwise_equal, cumulative_lengths, page_table, random_normal
from flash_attn.verification import Problem, costs

Results = list[torch.Tensor]

QUERIES, KEYS = (3, 70), (65, 600)  # two sequences, across blocks and a segment


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return random_normal(shape, seed=seed, dtype=FINEST, device=DEVICE)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def slopes(h_q: int) -> torch.Tensor:
    return torch.linspace(0.1, 0.5, h_q, dtype=torch.float32, device=DEVICE)


def with_gradients(
    function: Callable[..., torch.Tensor], inputs: Results, *rest: object, **options: object
) -> Results:
    for x in inputs:
        x.requires_grad_()
    out = function(*inputs, *rest, **options)
    gradients = torch.autograd.grad(out, inputs, torch.ones_like(out))
    return [out.detach(), *gradients]


# ---- One case for each way in; each makes its own tensors, with the package's helpers ------------


def dense() -> Results:
    qkv = [normal(2, s, h, 20, seed=h) for s, h in ((70, 4), (600, 2), (600, 2))]
    options = {"causal": True, "window_size": (300, 0), "alibi_slopes": slopes(4)}
    torch.manual_seed(1)
    found = with_gradients(flash_attn.flash_attn_func, qkv, dropout_p=0.25, **options)
    out, lse, dmask = flash_attn.flash_attn_func(
        *qkv, dropout_p=0.25, return_attn_probs=True, **options
    )
    return [*found, out.detach(), lse.detach(), dmask.detach()]


def dense_packed_tensors() -> Results:
    kv = [normal(1, 70, 4, 32), normal(1, 600, 2, 2, 32, seed=1)]
    qkv = [normal(1, 600, 3, 2, 32, seed=2)]
    return with_gradients(flash_attn.flash_attn_kvpacked_func, kv) + with_gradients(
        flash_attn.flash_attn_qkvpacked_func, qkv
    )


def lengths() -> tuple[torch.Tensor, torch.Tensor, int, int]:
    cu = [cumulative_lengths(x, DEVICE) for x in (QUERIES, KEYS)]
    return (*cu, max(QUERIES), max(KEYS))


def pack(d: int = 32) -> Results:
    totals = ((sum(QUERIES), 4), (sum(KEYS), 2), (sum(KEYS), 2))
    return [normal(t, h, d, seed=i) for i, (t, h) in enumerate(totals)]


def varlen() -> Results:
    _, cu_seqlens_k, _, max_k = lengths()
    kv = [pack()[0], torch.stack(pack()[1:], dim=1)]
    qkv = [normal(sum(KEYS), 3, 2, 32)]
    return [
        *with_gradients(flash_attn.flash_attn_varlen_func, pack(), *lengths(), causal=True),
        *with_gradients(flash_attn.flash_attn_varlen_kvpacked_func, kv, *lengths()),
        *with_gradients(flash_attn.flash_attn_varlen_qkvpacked_func, qkv, cu_seqlens_k, max_k),
    ]


def pages() -> tuple[torch.Tensor, Results, int]:
    """A block table, the pages of keys and values, and how many keys a page has."""
    size = page_size(16)
    table, num_pages = page_table(KEYS, size, seed=3, device=DEVICE)
    rows = [[normal(s, 2, 32, seed=s + i) for s in KEYS] for i in range(2)]
    return table, [testing.paged_rows(x, table, num_pages, size, fill=0.0) for x in rows], size


def varlen_paged() -> Results:
    table, cache, _ = pages()
    return [flash_attn.flash_attn_varlen_func(pack()[0], *cache, *lengths(), block_table=table)]


def kvcache() -> Results:
    """An append with rotary, by batch index; left padding; a whole cache; one length for all."""
    q, k, v = normal(2, 3, 4, 32), normal(2, 3, 2, 32, seed=1), normal(2, 3, 2, 32, seed=2)
    cache = [normal(4, 640, 2, 32, seed=i) for i in (3, 4)]
    cos, sin = normal(640, 8, seed=5), normal(640, 8, seed=6)
    call = flash_attn.flash_attn_with_kvcache
    out, lse = call(
        *(q, *cache, k, v, cos, sin, int32(*KEYS), int32(3, 1)),
        causal=True,
        return_softmax_lse=True,
    )
    rows = cache[0][:2], cache[1][:2]
    padded = call(q, *rows, cache_seqlens=int32(*KEYS), cache_leftpad=int32(5, 0), num_splits=3)
    whole = call(q, *rows, window_size=torch.tensor([100, 0], device="cpu"))
    return [out, lse, *cache, padded, whole, call(q, *rows, k, v, cache_seqlens=630)]


def kvcache_paged() -> Results:
    table, cache, size = pages()
    k, v = normal(2, 3, 2, 32, seed=1), normal(2, 3, 2, 32, seed=2)
    starts = int32(60, 590)
    call = flash_attn.flash_attn_with_kvcache
    return [
        call(normal(2, 3, 4, 32), *cache, k, v, cache_seqlens=starts, block_table=table),
        call(normal(2, 3, 4, 32), *cache, k, v, cache_seqlens=size, block_table=table),
        *cache,
    ]


def low_level() -> Results:
    """The ops and upstream's compiled module."""
    qkv = [normal(2, s, h, 32, seed=h) for s, h in ((70, 4), (600, 2), (600, 2))]
    scoring = (0.25, True, -1, -1, 0.0)
    torch.manual_seed(2)
    out, lse, dmask, state = interface._flash_attn_forward(*qkv, 0.5, *scoring, None, True)
    dense_out = flash_attn_2_cuda.fwd(*qkv, None, None, 0.0, *scoring, False)
    dense_back = flash_attn_2_cuda.bwd(
        *(out, *qkv, out, lse, None, None, None, None, 0.5, *scoring, False, None, state)
    )
    packed = interface._flash_attn_varlen_forward(
        *(*pack(), *lengths(), 0.0, 0.25, True),
        seqused_k=int32(60, 590),
        leftpad_k=int32(3, 0),
    )
    packed_out = flash_attn_2_cuda.varlen_fwd(
        *(*pack(), None, *lengths()[:2], None, None, None, None, *lengths()[2:], 0.0),
        *(0.25, False, True, -1, -1, 0.0, False),
    )
    packed_back = flash_attn_2_cuda.varlen_bwd(
        *(packed_out[0], *pack(), packed_out[0], packed_out[1], None, None, None, *lengths()[:2]),
        *(None, *lengths()[2:], 0.0, 0.25, True, True, -1, -1, 0.0, False, None, packed_out[3]),
    )
    found = [out, lse, dmask, state, *dense_out, *dense_back, *packed, *packed_out, *packed_back]
    return [x.detach() for x in found]


def partials() -> Results:
    found: Results = []
    table, cache, _ = pages()
    qkv = [normal(2, s, h, 20, seed=h) for s, h in ((70, 4), (600, 2), (600, 2))]
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    named = dict(zip(names, lengths(), strict=True))
    for parts in (
        determinism.forward_partials(*qkv, causal=True),
        determinism.forward_partials(*pack(), **named, alibi_slopes=slopes(4)),
        determinism.forward_partials(pack()[0], *cache, **named, block_table=table),
    ):
        found += [parts.out, parts.max_log2, parts.sum]
        found += determinism.reduce_partials(parts, FINEST)
    return found


def rotary_embeddings() -> Results:
    cos, sin = normal(700, 8), normal(700, 8, seed=1)
    q, kv, qkv = normal(2, 9, 4, 32), normal(2, 9, 2, 2, 32), normal(2, 9, 3, 2, 32)
    packed = normal(sum(QUERIES), 4, 32)
    embedding = rotary.RotaryEmbedding(16, scale_base=512.0, device=DEVICE)
    return [
        *with_gradients(rotary.apply_rotary_emb, [q], cos, sin, seqlen_offsets=int32(0, 600)),
        *with_gradients(
            rotary.apply_rotary_emb,
            [packed],
            *(cos, sin),
            cu_seqlens=cumulative_lengths(QUERIES, DEVICE),
            max_seqlen=max(QUERIES),
        ),
        rotary.apply_rotary_emb_kv_(kv.clone(), cos, sin),
        rotary.apply_rotary_emb_qkv_(qkv.clone(), cos, sin),
        embedding(qkv.clone(), seqlen_offset=3),
        *embedding(q.detach().clone(), kv.clone(), seqlen_offset=int32(1, 2), max_seqlen=20),
    ]


def padding() -> Results:
    rows = normal(2, 5, 3)
    mask = int32(1, 1, 1, 0, 0, 1, 1, 1, 1, 1).view(2, 5)
    in_length = int32(2, 1, 0, 0, 0, 5, 0, 0, 0, 0).view(2, 5)
    packed, indices, cu_seqlens, _, seqused = bert_padding.unpad_input(rows, mask)
    joined = bert_padding.unpad_input_for_concatenated_sequences(rows, in_length)
    padded = bert_padding.pad_input(packed, indices, 2, 5)
    residual = bert_padding.index_first_axis_residual(rows.flatten(0, 1), indices)
    return [packed, indices, cu_seqlens, seqused, *joined[:3], padded, *residual]


def helpers() -> Results:
    """What flash_attn.testing and flash_attn.reference offer."""
    testing.poison_free_memory(DEVICE, megabytes=1)
    rows = [normal(s, 2, 32, seed=s) for s in KEYS]
    table, num_pages = page_table(KEYS, 16, seed=1, device=DEVICE)
    mismatch = testing.first_mismatch(rows[0], rows[0] + 1)
    assert mismatch is not None and mismatch.coordinate == (0, 0, 0)
    qkv = [normal(2, s, h, 20, seed=h) for s, h in ((7, 4), (60, 2), (60, 2))]
    out, lse = reference.attention(*qkv, causal=True, alibi_slopes=slopes(4))
    reference.assert_accurate(out, out, out)
    packed_out, packed_lse = reference.attention_varlen(*pack(), *lengths()[:2])
    return [
        int32(*testing.ragged_lengths(5, 100, seed=1)),
        cumulative_lengths(KEYS, DEVICE),
        cumulative_lengths(KEYS),
        random_normal((3,), seed=1),
        testing.padded_rows(rows, 640, fill=0.0, left=(1, 2)),
        table,
        testing.paged_rows(rows, table, num_pages, 16, fill=0.0),
        reference.visible_keys(3, 5, causal=True),
        *(out, lse, packed_out, packed_lse),
    ]


CASES = (
    dense,
    dense_packed_tensors,
    varlen,
    varlen_paged,
    kvcache,
    kvcache_paged,
    low_level,
    partials,
    rotary_embeddings,
    padding,
    helpers,
)


@contextlib.contextmanager
def default_device(name: str, how: str) -> Iterator[None]:
    if how == "block":
        with torch.device(name):
            yield
        return
    torch.set_default_device(name)
    try:
        yield
    finally:
        torch.set_default_device(None)


defaults = pytest.mark.parametrize("name", ["meta", "cpu", "cuda"] if ON_GPU else ["meta"])


@defaults
@pytest.mark.parametrize("how", ["block", "setting"])
@pytest.mark.parametrize("deterministic", [False, True], ids=["standard", "deterministic"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_default_device_changes_nothing(case, deterministic, how, name, contents_are_checked):
    flash_attn.set_deterministic(deterministic)
    expected = case()
    with default_device(name, how):
        found = case()
    for i, (x, wanted) in enumerate(zip(found, expected, strict=True)):
        assert x.device == wanted.device
        assert_bitwise_equal(x, wanted, f"result {i}")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_default_dtype_changes_nothing(case):
    expected = case()
    torch.set_default_dtype(torch.float64)
    try:
        found = case()
    finally:
        torch.set_default_dtype(torch.float32)
    for i, (x, wanted) in enumerate(zip(found, expected, strict=True)):
        assert_bitwise_equal(x, wanted, f"result {i}")


@defaults
def test_explain_under_a_default_device(name):
    expected = str(flash_attn.explain(64, 3000, 4, 2, 16, torch.float16, device=DEVICE))
    with torch.device(name):
        assert str(flash_attn.explain(64, 3000, 4, 2, 16, torch.float16, device=DEVICE)) == expected


@defaults
@pytest.mark.slow
def test_verification_under_a_default_device(name):
    """Its problems make slopes, tables and masks; its measurements make tensors of their own."""
    options = {"page_size": page_size(16), "device": DEVICE.type}
    problem = Problem((1, 40), (700, 40), alibi=True, dtype=FINEST, **options)
    claims = ["run", "process", "layout", "unused", "chunks", "reduction", "grad_layout"]
    with torch.device(name):
        report = determinism.verify(problem, claims=claims)
        with_controls = determinism.verify(problem, claims=["batch"], controls=True)
        for call in costs._calls(costs.Shape(b=1, s=64, h=1, d=64), 64, DEVICE.type).values():
            call()
    assert report.held, str(report)
    assert with_controls.held, str(with_controls)


@defaults
@pytest.mark.parametrize(
    "what, call",
    [
        (
            r"leftpad_k\[1\] = 601 where sequence 1 has 600 keys",
            lambda: interface._flash_attn_varlen_forward(
                *(*pack(), *lengths(), 0.0, 0.25, True), leftpad_k=int32(3, 601)
            ),
        ),
        (
            r"block_table\[0, 1\] = -7",
            lambda: flash_attn.flash_attn_with_kvcache(
                *(normal(1, 1, 2, 32), normal(9, 16, 2, 32), normal(9, 16, 2, 32)),
                cache_seqlens=20,
                block_table=int32(1, -7, 3).view(1, 3),
            ),
        ),
        (
            r"cache_seqlens\[1\] = 70",
            lambda: flash_attn.flash_attn_with_kvcache(
                *(normal(2, 1, 2, 32), normal(2, 64, 2, 32), normal(2, 64, 2, 32)),
                cache_seqlens=int32(1, 70),
            ),
        ),
        (
            r"row 36 of the cache 2 times",
            lambda: flash_attn.flash_attn_with_kvcache(
                *(normal(2, 1, 2, 32), normal(9, 16, 2, 32), normal(9, 16, 2, 32)),
                *(normal(2, 1, 2, 32), normal(2, 1, 2, 32)),
                cache_seqlens=int32(4, 4),
                block_table=int32(2, 2).view(2, 1),
            ),
        ),
    ],
    ids=["limits of sequences", "pages", "cache lengths", "places of an append"],
)
def test_contents_are_refused_under_a_default_device(what, call, name, contents_are_checked):
    flash_attn.set_deterministic(True)
    with torch.device(name), pytest.raises(RuntimeError, match=what):
        call()


# What torch.set_default_device reaches, by PyTorch's own list.
FACTORIES = {f.__name__ for f in _device_constructors()}
PACKAGE = Path(flash_attn.__file__).parent
SOURCES = [*sorted(PACKAGE.rglob("*.py")), Path(flash_attn_2_cuda.__file__)]


def factory_calls(source: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            owner = node.func.value
            if isinstance(owner, ast.Name) and owner.id == "torch" and node.func.attr in FACTORIES:
                yield node


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_every_new_tensor_names_its_device(source):
    bare = [
        f"{source.name}:{call.lineno}: torch.{call.func.attr} without device="
        for call in factory_calls(source)
        if not any(keyword.arg == "device" for keyword in call.keywords)
    ]
    assert bare == []


def test_factory_calls_are_found():
    """The test above looks at something."""
    assert sum(1 for source in SOURCES for _ in factory_calls(source)) > 20
