"""Calls keep their bytes from commit to commit: see golden.py."""

import golden
import pytest
import torch

RULE = (
    "A release keeps its bytes. If they had to change: an entry under *Determinism* in CHANGES.md, "
    "and `python tests/golden.py --record` in the same commit"
)


@pytest.fixture(scope="module")
def expected():
    hashes = golden.kept()
    if hashes is None:
        pytest.skip(f"nobody has recorded {golden.CONTRACT}: python tests/golden.py --record")
    return hashes


def test_every_call_is_recorded(expected):
    assert set(expected) == set(golden.calls())


@pytest.mark.parametrize("name", golden.calls())
def test_bytes_are_those_of_the_release(name, expected):
    assert golden.hash_of(golden.calls()[name]) == expected[name], RULE


def test_control_one_bit_changes_a_hash(expected):
    """The last bit of one element of one result is enough."""
    name = f"decode-{str(golden.DTYPES[0]).split('.')[1]}-d64-plain"
    out, lse = golden.calls()[name]()

    def disturbed():
        other = lse.clone()
        other.view(torch.int32)[0, 0, 0] ^= 1
        return out, other

    assert golden.hash_of(lambda: (out, lse)) == golden.hash_of(lambda: (out.clone(), lse.clone()))
    assert golden.hash_of(disturbed) != golden.hash_of(lambda: (out, lse))
