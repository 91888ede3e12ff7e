"""Every op of the package keeps PyTorch's rules: schema, fake tensors, autograd, tracing."""

import pytest
import torch
from device import DEVICE, FINEST, page_size

import flash_attn.layers.rotary  # noqa: F401  registers the ops, as importing flash_attn does
from flash_attn.testing import cumulative_lengths, random_normal

LENGTHS_Q, LENGTHS_K = [3, 0, 17], [70, 5, 9]
B, S_Q, S_K, H_Q, H_KV, D = 2, 5, 70, 4, 2, 16
SCALE = D**-0.5

# (dropout_p, scale, causal, left, right, softcap): what a score is made of.
PLAIN = (0.0, SCALE, True, -1, -1, 0.0)
CAPPED_WINDOW = (0.0, SCALE, False, 7, 3, 10.0)
DROPOUT = (0.25, SCALE, True, -1, 0, 0.0)


def normal(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return random_normal(shape, seed=seed, dtype=FINEST, device=DEVICE)


def tensors(pack: bool = False, requires_grad: bool = False) -> list[torch.Tensor]:
    """q, k, v."""
    rows_q, rows_k = ((sum(LENGTHS_Q),), (sum(LENGTHS_K),)) if pack else ((B, S_Q), (B, S_K))
    shapes = [(*rows_q, H_Q, D), (*rows_k, H_KV, D), (*rows_k, H_KV, D)]
    return [normal(s, seed=i).requires_grad_(requires_grad) for i, s in enumerate(shapes)]


def packing() -> tuple[torch.Tensor, torch.Tensor, int, int]:
    offsets = (cumulative_lengths(x, DEVICE) for x in (LENGTHS_Q, LENGTHS_K))
    return *offsets, max(LENGTHS_Q), max(LENGTHS_K)


def slopes() -> torch.Tensor:
    return torch.tensor([0.5, 0.25, 0.125, 0.0625], device=DEVICE)


def op(name: str) -> torch._ops.OpOverload:
    return getattr(torch.ops.flash_attn, name).default


def int32(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32, device=DEVICE)


def forward_cases() -> dict[str, tuple[str, tuple[object, ...]]]:
    dense = tensors(requires_grad=True)
    pack = tensors(pack=True, requires_grad=True)
    pages = normal((7, page_size(24), H_KV, D), seed=7)
    table = int32((0, 2, 4), (1, 3, 3), (5, 3, 3))
    chosen = (int32(3, 0, 1), int32(60, 5, 9))  # leftpad_k, seqused_k
    seed = torch.tensor([5, 6], device=DEVICE)
    return {
        "dense": ("_flash_attn_forward", (*dense, *PLAIN, slopes(), False)),
        "dense, window": ("_flash_attn_forward", (*dense, *CAPPED_WINDOW, None, False)),
        "varlen": ("_flash_attn_varlen_forward", (*pack, *packing(), *PLAIN, slopes())),
        "varlen, defaults": ("_flash_attn_varlen_forward", (*pack, *packing(), *PLAIN[:3])),
        "varlen, seqused, leftpad": (
            "_flash_attn_varlen_forward",
            (*tensors(pack=True), *packing(), *PLAIN, None, False, None, *chosen),
        ),
        "varlen, paged": (
            "_flash_attn_varlen_forward",
            (tensors(pack=True)[0], pages, pages, *packing(), *PLAIN, None, False, table),
        ),
        "attend": (
            "_attend",
            (*dense, None, None, S_Q, S_K, *CAPPED_WINDOW, slopes(), True, None, True, None),
        ),
        "attend, pack": ("_attend", (*pack, *packing(), *PLAIN, None, True, None, False, None)),
        "attend, dropout": (
            "_attend",
            (*dense, None, None, S_Q, S_K, *DROPOUT, None, True, None, False, seed),
        ),
    }


def backward_cases() -> dict[str, tuple[str, tuple[object, ...]]]:
    cases = {}
    for label, options in {"plain": PLAIN, "window": CAPPED_WINDOW, "dropout": DROPOUT}.items():
        for pack in (False, True):
            q, k, v = tensors(pack)
            where = packing() if pack else ()
            name = "_flash_attn_varlen_forward" if pack else "_flash_attn_forward"
            out, lse, _, rng_state = op(name)(q, k, v, *where, *options, None, options[0] > 0)
            gradients = [torch.empty_like(x) for x in (q, k, v)]
            arguments = (torch.ones_like(out), q, k, v, out, lse, *gradients, *where)
            name = name.replace("forward", "backward")
            cases[f"{name}, {label}"] = (name, (*arguments, *options, None, False, rng_state))
            where = (*where, *(() if pack else (None, None, 0, 0)))
            differentiable = (torch.ones_like(out), q, k, v, out, lse, *where, *options, None)
            label = f"attend, {label}, {'pack' if pack else 'dense'}"
            cases[label] = ("_attend_backward", (*differentiable, True, rng_state))
            inputs = (torch.ones_like(out), q, k, v, out, lse)
            where = where or (None, None, 0, 0)
            attend = (*inputs, *where, *options, slopes(), False, rng_state)
            cases[f"attend, {pack=}, {label}"] = ("_attend_backward", attend)
    q, k, v = tensors()
    out, lse, _, _ = op("_flash_attn_forward")(q, k, v, *PLAIN, None, False)
    arguments = (torch.ones_like(out), q, k, v, out, lse, torch.empty_like(q), None, None)
    cases["only dq"] = ("_flash_attn_backward", (*arguments, *PLAIN, None, False))
    return cases


def kvcache_cases() -> dict[str, tuple[str, tuple[object, ...]]]:
    append, attend = "_append_and_attend_cache", "_attend_cache"
    q, k, v = (normal((B, 2, h, D), seed=h) for h in (H_Q, H_KV, H_KV))
    rows = [normal((3, S_K, H_KV, D), seed=seed) for seed in (3, 4)]
    pages = [normal((6, page_size(24), H_KV, D), seed=seed) for seed in (3, 4)]
    table = int32((0, 2, 4), (1, 3, 5))
    cos, sin = normal((72, 8), seed=5), normal((72, 8), seed=6)
    scoring = (SCALE, True, -1, -1, 0.0, True)
    places = (int32(60, 3), int32(2, 0), int32(0, 1))  # seqlens, batch_idx, leftpad
    return {
        "append to rows": (
            append,
            (q, *rows, k, v, cos, sin, *places, None, *scoring, slopes(), 0),
        ),
        "append to pages": (
            append,
            (q, *pages, k, v, None, None, int32(60, 3), None, None, table, *scoring, None, 2),
        ),
        "attend to rows": (attend, (q, *rows, *places, None, *scoring[:-1], slopes(), 2)),
        "attend to pages": (
            attend,
            (q, *pages, int32(60, 3), None, None, table, *scoring[:-1], None, 0),
        ),
        "attend to all": (attend, (q, *rows, *[None] * 4, *scoring[:-1], None, 0)),
    }


def rotary_cases() -> dict[str, tuple[str, tuple[object, ...]]]:
    cos, sin = normal((S_K, 4), seed=5), normal((S_K, 4), seed=6)
    x, pack = tensors()[0], tensors(pack=True)[0]
    offsets = int32(3, 0, 1)
    cu_seqlens, longest = cumulative_lengths(LENGTHS_Q, DEVICE), max(LENGTHS_Q)
    frequencies, scale = torch.rand(2, 4).to(DEVICE)
    return {
        "rotary": (
            "_apply_rotary_",
            (x, cos, sin, None, None, 2, None, None, 0, None, 0, False, False),
        ),
        "rotary, queries and keys": (
            "_apply_rotary_",
            (x, cos, sin, sin, cos, 0, offsets[:B], None, 0, 1, 1, False, False),
        ),
        "rotary, pack": (
            "_apply_rotary_",
            (pack, cos, sin, None, None, 0, offsets, cu_seqlens, longest, None, 0, True, True),
        ),
        "rotary, tables": (
            "_rotary_tables",
            (frequencies, scale, 8, 100.0, 64.0, S_K, torch.bfloat16),
        ),
    }


GROUPS = (forward_cases, backward_cases, kvcache_cases, rotary_cases)


@pytest.mark.parametrize("cases", GROUPS)
def test_opcheck(cases):
    for label, (name, arguments) in cases().items():
        print(label)
        torch.library.opcheck(op(name), arguments)


@pytest.mark.parametrize("pack", [False, True], ids=["dense", "varlen"])
def test_fake_shapes_of_a_forward_with_dropout(pack):
    """opcheck runs an op several times and compares, so it cannot take one that draws a mask."""
    name = "_flash_attn_varlen_forward" if pack else "_flash_attn_forward"
    arguments = (*tensors(pack), *(packing() if pack else ()), *DROPOUT, None, True)
    results = op(name)(*arguments)
    with torch._subclasses.FakeTensorMode() as mode:
        faked = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in arguments]
        fake_results = op(name)(*faked)
    for result, fake in zip(results, fake_results, strict=True):
        assert (fake.shape, fake.dtype, fake.stride()) == (
            result.shape,
            result.dtype,
            result.stride(),
        )


def test_every_registered_op_is_checked():
    names = torch._C._dispatch_get_all_op_names()
    registered = {name.split("::")[1] for name in names if name.startswith("flash_attn::")}
    assert registered == {name for cases in GROUPS for name, _ in cases().values()}
