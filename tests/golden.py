"""The bytes of a fixed set of calls in deterministic mode, as hashes, by contract.

    python tests/golden.py                                     compare with tests/golden.json
    python tests/golden.py --record                            write what this device gives
    FLASH_ATTN_TEST_DEVICE=cuda python tests/golden.py ...     on a GPU

A release keeps every byte, or says under *Determinism* in CHANGES.md what changed. So a change of
these hashes is a decision: record them in the commit that writes that entry. Inputs come from
integer arithmetic, which no version of PyTorch changes.
"""

import argparse
import hashlib
import json
import math
import sys
from pathlib import Path

import torch
from device import DEVICE, DTYPES, SEGMENT, page_size
from torch import Tensor

import flash_attn
from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache
from flash_attn.testing import cumulative_lengths

FILE = Path(__file__).with_suffix(".json")
CONTRACT = {"cpu": "cpu", "cuda": "gpu"}[DEVICE.type]
LONG = 2 * SEGMENT + 77  # three segments
HEAD_DIMS = (64, 96, 128, 192, 256, 40, 17)  # every bucket, and two that need padding
FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (200, 9)},
    "softcap": {"softcap": 15.0, "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.125, 0.03, 1.5]), "causal": True},
    "scale": {"softmax_scale": -0.3, "causal": True},
}


def values(shape, dtype, seed, amplitude=1.0):
    """Nearly normal numbers: the sum of four 16-bit words of a hash of the index."""
    index = torch.arange(math.prod(shape), dtype=torch.int64)
    total = torch.zeros(index.shape, dtype=torch.int64)
    for word in range(4):
        x = index * 4 + word + seed * 0x9E3779B9
        for factor in (0x7FEB352D, 0x5851F42D):
            x = (x ^ (x >> 15)) * factor & 0xFFFFFFFF
        total += (x >> 16) - 0x8000
    return (total.double() * (amplitude * 2.0**-15)).to(dtype).reshape(shape).to(DEVICE)


def qkv(s_q, s_k, d, dtype, b=2, seed=0, amplitude=1.0):
    q = values((b, s_q, 4, d), dtype, seed, amplitude)
    k, v = (values((b, s_k, 2, d), dtype, seed + n, amplitude) for n in (1, 2))
    return q, k, v


def options_of(feature):
    return {
        name: value.to(DEVICE) if isinstance(value, Tensor) else value
        for name, value in FEATURES[feature].items()
    }


def with_gradients(function, tensors, **options):
    """out, lse, dq, dk and dv."""
    leaves = [x.requires_grad_() for x in tensors]
    out, lse, _ = function(*leaves, return_attn_probs=True, **options)
    dout = values(out.shape, out.dtype, 9)
    return out, lse, *torch.autograd.grad(out, leaves, dout)


def prefill(d, feature, dtype):
    return with_gradients(
        flash_attn_func, qkv(150, SEGMENT + 90, d, dtype, amplitude=2.0), **options_of(feature)
    )


def pack(d, dtype):
    lengths = (130, 0, 1, SEGMENT + 20)
    q, k, v = (x.flatten(0, 1) for x in qkv(sum(lengths), sum(lengths), d, dtype, b=1))
    cu, longest = cumulative_lengths(lengths, DEVICE), max(lengths)

    def call(q, k, v, **options):
        return flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True, **options)

    return with_gradients(call, (q, k, v))


def decode(d, feature, dtype):
    q, k, v = qkv(1, LONG, d, dtype)
    return flash_attn_func(q, k, v, return_attn_probs=True, **options_of(feature))[:2]


def cache(d, dtype, s_new):
    """New keys, rotated, into a paged cache, with its pages behind it."""
    page = page_size(48)
    pages = -(-(LONG + s_new) // page)
    table = torch.arange(2 * pages, dtype=torch.int32, device=DEVICE).reshape(2, pages).flip(1)
    k_cache, v_cache = (values((2 * pages, page, 2, d), dtype, n) for n in (1, 2))
    q, k, v = qkv(s_new, s_new, d, dtype, seed=5)
    angles = values((pages * page, d // 4), torch.float32, 8)
    out, lse = flash_attn_with_kvcache(
        *(q, k_cache, v_cache, k, v),
        *((1 - angles**2).to(dtype), angles.to(dtype)),  # no library's cosine
        cache_seqlens=torch.tensor([LONG - 700, 300], dtype=torch.int32, device=DEVICE),
        block_table=table,
        causal=True,
        return_softmax_lse=True,
    )
    return out, lse, k_cache, v_cache


def peaked(d, dtype):
    """Rows that lean on one key; a row of one key; NaN and infinity among keys."""
    q, k, v = qkv(70, SEGMENT + 6, d, dtype, amplitude=4.0)
    with torch.no_grad():
        k[:, 3] *= 8.0
        k[1, 5, 0, 0], v[1, 7, 1, 1] = math.inf, math.nan
    return flash_attn_func(q, k, v, window_size=(SEGMENT - 4, 0), return_attn_probs=True)[:2]


def calls():
    """By name, what gives the tensors whose bytes are kept."""
    found = {}
    for dtype in DTYPES:
        word = str(dtype).split(".")[1]
        for d in HEAD_DIMS:
            found[f"prefill-{word}-d{d}-causal"] = lambda a=(d, "causal", dtype): prefill(*a)
            found[f"decode-{word}-d{d}-plain"] = lambda a=(d, "plain", dtype): decode(*a)
        for feature in FEATURES:
            found[f"prefill-{word}-d64-{feature}"] = lambda a=(64, feature, dtype): prefill(*a)
            found[f"decode-{word}-d128-{feature}"] = lambda a=(128, feature, dtype): decode(*a)
        for d in (64, 128):
            found[f"pack-{word}-d{d}"] = lambda a=(d, dtype): pack(*a)
            found[f"peaked-{word}-d{d}"] = lambda a=(d, dtype): peaked(*a)
            for s_new in (1, 40):
                found[f"cache-{word}-d{d}-new{s_new}"] = lambda a=(d, dtype, s_new): cache(*a)
    return found


def hash_of(call):
    digest = hashlib.sha256()
    with flash_attn.deterministic():
        for x in call():
            digest.update(x.detach().contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def kept():
    """The hashes of this device's contract, or None where nobody has recorded them."""
    return json.loads(FILE.read_text()).get(CONTRACT) if FILE.exists() else None


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", action="store_true", help=f"write {FILE.name}")
    options = parser.parse_args()
    found = {name: hash_of(call) for name, call in calls().items()}
    if options.record:
        everything = json.loads(FILE.read_text()) if FILE.exists() else {}
        FILE.write_text(json.dumps(everything | {CONTRACT: found}, indent=1) + "\n")
        print(f"{len(found)} hashes of contract {CONTRACT} written to {FILE}")
        return 0
    expected = kept()
    if expected is None:
        raise SystemExit(f"no hashes of contract {CONTRACT} in {FILE}; --record writes them")
    changed = sorted(n for n in found | expected if found.get(n) != expected.get(n))
    print("\n".join(changed) or f"{len(found)} calls have their bytes")
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main())
