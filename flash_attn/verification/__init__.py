"""Verification of the guarantee, on the standard problems or on shapes of your own.

    from flash_attn.determinism import verify
    print(verify(seqlens_q=(1,) * 4, seqlens_k=(9000, 800, 77, 1), h_q=32, h_kv=8, d=128))

problem.py says what a problem is, engines.py who computes it, relations.py what has to be equal,
claims.py which relations make the guarantee, suite.py on which problems they are tried, report.py
how it is shown. costs.py measures time and memory.
"""

from .claims import CLAIMS, Claim, verify
from .engines import ENGINES, Engine, FlashAttention, PyTorchAttention
from .problem import Problem, Sequence
from .relations import Outcome
from .report import ClaimResult, Report
from .suite import standard_problems

__all__ = [
    "CLAIMS",
    "ENGINES",
    "Claim",
    "ClaimResult",
    "Engine",
    "FlashAttention",
    "Outcome",
    "Problem",
    "PyTorchAttention",
    "Report",
    "Sequence",
    "standard_problems",
    "verify",
]
