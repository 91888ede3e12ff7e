"""What the rotary functions refuse, by which type, and before anything is written."""

import ast
import inspect
import traceback

import numpy as np
import pytest
import torch
from device import DEVICE
from test_rotary import S_RO, B, D, H, S, index, normal, tables

from flash_attn import _check_contents
from flash_attn.layers import _rotary_checks
from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)
from flash_attn.testing import assert_bitwise_equal

COS, SIN = tables()
ELSEWHERE = torch.device("meta")


def dense(*shape, cos=COS, sin=SIN, **options):
    return lambda: apply_rotary_emb(normal(*(shape or (B, S, H, D))), cos, sin, **options)


def pack(*cu_seqlens, shape=(S, H, D), max_seqlen=S, dtype=torch.int32, **options):
    offsets = index(*cu_seqlens, dtype=dtype) if cu_seqlens else index(0, S, dtype=dtype)
    options = {"cu_seqlens": offsets, "max_seqlen": max_seqlen} | options
    return lambda: apply_rotary_emb(normal(*shape), COS, SIN, **options)


def qkv(*shape, **options):
    return lambda: apply_rotary_emb_qkv_(normal(*shape), COS, SIN, **options)


def kv(*shape):
    return lambda: apply_rotary_emb_kv_(normal(*shape), COS, SIN)


def module(*shape, kv=None, **options):
    keys = None if kv is None else normal(*kv)
    return lambda: RotaryEmbedding(D, device=DEVICE)(normal(*shape), keys, **options)


def reference(shape, rows, columns=D // 2):
    table = normal(*rows, columns)
    return lambda: apply_rotary_emb_torch(normal(*shape), table, table)


# The type, words of the message, the call.
CASES = {
    # Shapes.
    "x of a pack without cu_seqlens": (ValueError, r"x of shape \(11, 4, 32\)", dense(S, H, D)),
    "x of 2 dimensions": (ValueError, "without cu_seqlens", dense(S, D)),
    "x of 5 dimensions": (ValueError, "without cu_seqlens", dense(B, S, 3, H, D)),
    "x of 4 dimensions with cu_seqlens": (ValueError, "total, nheads", pack(shape=(B, S, H, D))),
    "x of 2 dimensions with cu_seqlens": (ValueError, "total, nheads", pack(shape=(S, D))),
    "a pack without max_seqlen": (AssertionError, "max_seqlen must be", pack(max_seqlen=None)),
    "max_seqlen below 0": (RuntimeError, "max_seqlen >= 0", pack(max_seqlen=-1)),
    "max_seqlen is no integer": (RuntimeError, "hold integers", pack(max_seqlen=11.0)),
    "max_seqlen beyond the tables": (AssertionError, "seqlen_ro", pack(max_seqlen=S_RO + 1)),
    "cu_seqlens of 2 dimensions": (RuntimeError, r"\(b \+ 1\)", pack(cu_seqlens=index(0, S)[None])),
    "cu_seqlens of no entry": (RuntimeError, r"\(b \+ 1\)", pack(cu_seqlens=index())),
    "cu_seqlens of floats": (RuntimeError, "int32 or int64", pack(dtype=torch.float32)),
    "cu_seqlens of int16": (RuntimeError, "int32 or int64", pack(dtype=torch.int16)),
    "qkv of 3 dimensions": (AssertionError, "4 or 5", qkv(1, 1, D)),
    "qkv of 2 in dimension 2": (AssertionError, "3, nheads", qkv(1, 1, 2, 1, D)),
    "qkv without num_heads_q": (AssertionError, "num_heads_q is required", qkv(B, S, H, D)),
    "num_heads_q leaves an odd rest": (
        AssertionError,
        "num_heads_q=1",
        qkv(B, S, H, D, num_heads_q=1),
    ),
    "num_heads_q leaves no keys": (
        AssertionError,
        "num_heads_k >= 1",
        qkv(B, S, H, D, num_heads_q=H),
    ),
    "num_heads_q below 0": (AssertionError, "num_heads_q=-2", qkv(B, S, H, D, num_heads_q=-2)),
    "num_heads_q is no integer": (RuntimeError, "hold integers", qkv(B, S, H, D, num_heads_q=2.0)),
    "cos_k alone": (AssertionError, "cos_k alone", qkv(1, 1, 3, 1, D, cos_k=COS)),
    "sin_k alone": (AssertionError, "sin_k alone", qkv(1, 1, 3, 1, D, sin_k=SIN)),
    "cos_k short": (
        AssertionError,
        "cos_k of 10 rows",
        qkv(B, S, 3, H, D, cos_k=COS[:10], sin_k=SIN[:10]),
    ),
    "kv of 4 dimensions": (AssertionError, "2, nheads", kv(B, S, 2, D)),
    "kv of 3 in dimension 2": (AssertionError, "2, nheads", kv(1, 1, 3, 1, D)),
    # Tables.
    "more columns than pairs": (
        AssertionError,
        "rotary_dim must be <= headdim",
        dense(B, S, H, D - 2),
    ),
    "a wide head": (AssertionError, "headdim <= 256", dense(1, 1, 1, 264)),
    "a short table": (AssertionError, "10 rows for 11", dense(cos=COS[:10], sin=SIN[:10])),
    "a row less of sin": (AssertionError, "one shape", dense(sin=SIN[:-1])),
    "tables of 1 dimension": (AssertionError, "one shape", dense(cos=COS[0], sin=SIN[0])),
    "tables of 3 dimensions": (AssertionError, "one shape", dense(cos=COS[None], sin=SIN[None])),
    "cos elsewhere": (RuntimeError, "cos on meta", dense(cos=COS.to(ELSEWHERE))),
    "sin elsewhere": (RuntimeError, "sin on meta", dense(sin=SIN.to(ELSEWHERE))),
    "sin_k elsewhere": (
        RuntimeError,
        "sin_k on meta",
        qkv(B, S, 3, H, D, cos_k=COS, sin_k=SIN.to(ELSEWHERE)),
    ),
    "cu_seqlens elsewhere": (
        RuntimeError,
        "cu_seqlens on meta",
        pack(cu_seqlens=index(0, S).to(ELSEWHERE)),
    ),
    "cos of integers": (RuntimeError, "torch.int64", dense(cos=COS.long())),
    "sin of complex numbers": (RuntimeError, "torch.complex64", dense(sin=SIN + 0j)),
    "x of integers": (
        RuntimeError,
        "x must be real",
        lambda: apply_rotary_emb(normal(B, S, H, D).long(), COS, SIN),
    ),
    # Offsets.
    "an offset below 0": (AssertionError, "seqlen_offsets must be >= 0", dense(seqlen_offsets=-1)),
    "NumPy's offset below 0": (
        AssertionError,
        "seqlen_offsets=-1",
        dense(seqlen_offsets=np.int64(-1)),
    ),
    "an offset beyond": (AssertionError, r"offsets \+ seqlen", dense(seqlen_offsets=S_RO - S + 1)),
    "a huge offset": (AssertionError, r"offsets \+ seqlen", dense(seqlen_offsets=2**63)),
    "a pack's offset beyond": (
        AssertionError,
        r"offsets \+ seqlen",
        pack(seqlen_offsets=S_RO - S + 1),
    ),
    "an offset that is no integer": (RuntimeError, "hold integers", dense(seqlen_offsets=1.0)),
    "offsets in a list": (RuntimeError, "hold integers", dense(seqlen_offsets=[0, 0, 0])),
    "an offset too many": (
        AssertionError,
        r"shape \(batch,\)",
        dense(seqlen_offsets=index(*[0] * (B + 1))),
    ),
    "offsets of 2 dimensions": (
        AssertionError,
        r"shape \(batch,\)",
        dense(seqlen_offsets=index(0, 0, 0)[:, None]),
    ),
    "offsets of floats": (
        AssertionError,
        "dtype int32 or int64",
        dense(seqlen_offsets=index(0, 0, 0).float()),
    ),
    "offsets elsewhere": (
        RuntimeError,
        "seqlen_offsets on meta",
        dense(seqlen_offsets=index(0, 0, 0).to(ELSEWHERE)),
    ),
    "a pack's offsets, one too many": (
        AssertionError,
        r"here that is \(1,\)",
        pack(seqlen_offsets=index(0, 0)),
    ),
    # What index tensors hold.
    "a position below 0": (
        IndexError,
        f"positions -1 to 9 of sequence 1; rule: 0 <= position < {S_RO}",
        dense(seqlen_offsets=index(0, -1, 0)),
    ),
    "a position beyond": (
        IndexError,
        f"positions 30 to 40 of sequence 2; rule: 0 <= position < {S_RO}",
        dense(seqlen_offsets=index(0, 0, 30)),
    ),
    "a position that overflows": (
        IndexError,
        f"positions {2**63 - 1} to {2**63 + 9} of sequence 0",
        dense(seqlen_offsets=index(2**63 - 1, 0, 0, dtype=torch.int64)),
    ),
    "a pack's position beyond": (
        IndexError,
        "positions 34 to 40 of sequence 1",
        pack(0, 4, S, seqlen_offsets=index(0, 34)),
    ),
    "cu_seqlens that decrease": (RuntimeError, "must not decrease", pack(0, 5, 3, S)),
    "cu_seqlens that start behind 0": (RuntimeError, "start at 0", pack(1, S)),
    "cu_seqlens that start before 0": (RuntimeError, "start at 0", pack(-1, S - 1)),
    "cu_seqlens outside the pack": (RuntimeError, "outside its pack", pack(0, S + 1)),
    "a sequence above max_seqlen": (RuntimeError, "exceeds max_seqlen", pack(max_seqlen=S - 1)),
    # The module.
    "module: qkv of 1 dimension": (AssertionError, "4 or 5", module(D)),
    "module: queries of a pack": (
        ValueError,
        "where kv is given",
        module(S, H, D, kv=(1, S, 2, H, D)),
    ),
    "module: kv of 4 dimensions": (
        AssertionError,
        "2, nheads",
        module(B, S, H, D, kv=(B, S, 2, D)),
    ),
    "module: kv with longer rows": (
        AssertionError,
        "11 rows for 12 positions",
        module(B, S, H, D, kv=(B, S + 1, 2, H, D)),
    ),
    "module: an offset below 0": (
        AssertionError,
        ">= 0",
        module(B, S, 3, H, D, seqlen_offset=-S - 1),
    ),
    "module: an offset of 0.5": (
        RuntimeError,
        "hold integers",
        module(B, S, 3, H, D, seqlen_offset=0.5),
    ),
    "module: a huge offset": (RuntimeError, "too long", module(B, S, 3, H, D, seqlen_offset=2**63)),
    "module: a table too long": (
        RuntimeError,
        "16777216",
        module(B, S, 3, H, D, max_seqlen=2**24 + 1),
    ),
    "module: max_seqlen below 0": (RuntimeError, "negative", module(B, S, 3, H, D, max_seqlen=-1)),
    "module: max_seqlen too small": (
        AssertionError,
        "seqlen_ro",
        module(B, S, 3, H, D, max_seqlen=3),
    ),
    # The reference in plain PyTorch.
    "reference: more columns than pairs": (
        AssertionError,
        "rotary_dim must be <= headdim",
        reference((B, S, H, D), (S,), D),
    ),
    "reference: one row for all": (ValueError, "for each row of x", reference((B, S, H, D), (1,))),
    "reference: another batch": (ValueError, "for each row of x", reference((B, S, H, D), (2, S))),
    "reference: x of 2 dimensions": (ValueError, "for each row of x", reference((S, D), (S,))),
    "reference: tables of 1 dimension": (AssertionError, "one shape", reference((B, S, H, D), ())),
    "an odd dimension has no halves": (
        RuntimeError,
        "an even last dimension",
        lambda: rotate_half(normal(B, 5)),
    ),
}


@pytest.mark.usefixtures("contents_are_checked")
@pytest.mark.parametrize("error, words, call", CASES.values(), ids=CASES)
def test_refuses(error, words, call):
    with pytest.raises(error, match=words) as refused:
        call()
    assert refused.type is error
    message = str(refused.value)
    assert message.startswith("flash_attn: ")
    assert message.index("; received ") < message.index("; rule: ")


@pytest.mark.usefixtures("contents_are_checked")
def test_every_refusal_has_a_case():
    """A rule added without a case of its own fails here, with its line."""
    source = _rotary_checks.__file__
    calls = [
        node
        for node in ast.walk(ast.parse(inspect.getsource(_rotary_checks)))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "refuse"
    ]
    reached = set()
    for error, _, call in CASES.values():
        with pytest.raises(error) as refused:
            call()
        frames = traceback.extract_tb(refused.value.__traceback__)
        reached |= {frame.lineno for frame in frames if frame.filename == source}
    assert len(calls) > 20
    missing = [ast.unparse(call) for call in calls if call.lineno not in reached]
    assert not missing, "\n".join(missing)


@pytest.mark.parametrize("offset", [True, np.int64(1), np.array(1)])
def test_integers_of_every_kind_are_offsets(offset):
    x = normal(B, S, H, D)
    expected = apply_rotary_emb(x, COS, SIN, seqlen_offsets=1)
    assert_bitwise_equal(apply_rotary_emb(x, COS, SIN, seqlen_offsets=offset), expected)


def test_without_index_tensors_nobody_asks_for_their_contents(monkeypatch):
    """With FLASH_ATTN_CHECK=1 a CUDA graph captures a rotation that has nothing to check."""

    def refuse(of):
        raise AssertionError("contents of no tensor")

    monkeypatch.setattr(_check_contents, "reads_contents", refuse)
    dense(seqlen_offsets=1)()
    with pytest.raises(AssertionError, match="contents of no tensor"):
        dense(seqlen_offsets=index(0, 0, 0))()


@pytest.mark.usefixtures("contents_are_checked")
@pytest.mark.parametrize("function", ["x", "qkv", "kv", "module"])
def test_nothing_is_written_before_a_refusal(function):
    """Also where the tables of the keys alone are too short, and are read last."""
    x = normal(B, S, 2 if function == "kv" else 3, H, D)
    before, offsets = x.clone(), index(0, S_RO - S, 0)
    short = COS[: S_RO - 1], SIN[: S_RO - 1]
    rotary = RotaryEmbedding(D, device=DEVICE)
    calls = {
        "x": lambda: apply_rotary_emb(
            x.flatten(2, 3), *short, inplace=True, seqlen_offsets=offsets
        ),
        "qkv": lambda: apply_rotary_emb_qkv_(x, COS, SIN, *short, seqlen_offsets=offsets),
        "kv": lambda: apply_rotary_emb_kv_(x, *short, seqlen_offsets=offsets),
        "module": lambda: rotary(x, seqlen_offset=offsets, max_seqlen=S_RO - 1),
    }
    with pytest.raises(IndexError, match=f"0 <= position < {S_RO - 1}"):
        calls[function]()
    assert_bitwise_equal(x, before)


def test_module_checks_the_keys_before_it_writes_the_queries():
    rotary = RotaryEmbedding(D, device=DEVICE)
    q = normal(B, S, H, D)
    before = q.clone()
    with pytest.raises(AssertionError):
        rotary(q, normal(B, S + 1, 2, H, D))
    assert_bitwise_equal(q, before)
