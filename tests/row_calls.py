"""Calls whose rows the contract tests compare, and the comparison."""

from flash_attn import flash_attn_func
from flash_attn.testing import assert_bitwise_equal


def run(q, k, v, **options):
    """(out, lse) of the dense function."""
    return flash_attn_func(q, k, v, return_attn_probs=True, **options)[:2]


def assert_same(actual, expected, label=""):
    """Byte equality of two tuples (out, lse) or (dq, dk, dv)."""
    names = ("out", "lse") if len(expected) == 2 else ("dq", "dk", "dv")
    for name, a, e in zip(names, actual, expected, strict=True):
        assert_bitwise_equal(a, e, f"{name} {label}")


def rows(result, begin, end):
    """Query rows [begin, end) of (out, lse)."""
    return result[0][:, begin:end], result[1][:, :, begin:end]
