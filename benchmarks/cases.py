"""What is timed, why, and how much work it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Case:
    """One attention problem. Letters: b s_q s_k h_q h_kv d."""

    kind: str  # prefill, backward: compute bound; decode: bound by reading keys and values
    b: int
    s_q: int
    s_k: int
    h_q: int
    h_kv: int
    d: int
    dtype: torch.dtype
    causal: bool

    @property
    def dtype_name(self) -> str:
        return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}[self.dtype]

    @property
    def name(self) -> str:
        """A unique word for --filter and for the results."""
        shape = f"b{self.b}-q{self.s_q}-k{self.s_k}-h{self.h_q}.{self.h_kv}-d{self.d}"
        mask = "-causal" if self.causal else ""
        return f"{self.kind}-{self.dtype_name}-{shape}{mask}"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Of q, k and v."""
        of_keys = (self.b, self.s_k, self.h_kv, self.d)
        return (self.b, self.s_q, self.h_q, self.d), of_keys, of_keys

    def flops(self) -> float:
        """Products of s_q * s_k * d multiply-adds each; causal sees about half.

        Two forward (q.k, p.v); five backward (q.k again, dout.v, and one for each gradient).
        """
        visible = self.s_q * self.s_k
        if self.causal:
            visible -= self.s_q * (self.s_q - 1) // 2
        products = 5 if self.kind == "backward" else 2
        return 2.0 * products * self.b * self.h_q * visible * self.d

    def bytes(self) -> float:
        """Keys and values read once, queries read and output written once."""
        rows = 2 * self.s_k * self.h_kv + 2 * self.s_q * self.h_q
        return float(self.b * rows * self.d * self.dtype.itemsize)


# Four heads: with 64 rows a tile there is work for any number of cores from s = 512 on, and the
# longest case stays below a second a call on two cores.
PREFILL = [
    Case("prefill", 1, s, s, 4, 4, d, dtype, causal)
    for dtype in (torch.float32, torch.bfloat16)
    for d in (64, 128)
    for causal in (True, False)
    for s in (512, 1024, 2048, 4096)
]

# A cache of 4k to 32k keys, too large for any processor's caches from the second case on. One
# sequence leaves 8 rows to share out, eight leave 64. 8/2: four query heads read one key head.
# fp32 has d = 64, so that the largest cache (b = 8, 32k keys, 8 heads) takes 1 GiB, not 2.
DECODE = [
    Case("decode", b, 1, s_k, 8, h_kv, d, dtype, causal=False)
    for dtype, d in ((torch.float32, 64), (torch.bfloat16, 128))
    for b in (1, 8)
    for h_kv in (8, 2)
    for s_k in (4096, 8192, 16384, 32768)
]

CASES = PREFILL + DECODE

# One of each kind and dtype that ends in seconds: does the benchmark still run?
QUICK = [
    Case("prefill", 1, 512, 512, 4, 4, 64, torch.float32, causal=True),
    Case("prefill", 1, 512, 512, 4, 4, 64, torch.bfloat16, causal=True),
    Case("decode", 1, 1, 4096, 8, 8, 64, torch.float32, causal=False),
    Case("decode", 1, 1, 4096, 8, 2, 128, torch.bfloat16, causal=False),
]
