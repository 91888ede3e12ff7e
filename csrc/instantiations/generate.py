"""Writes one .cu file for each kernel that is instantiated, or says which are out of date.

python csrc/instantiations/generate.py [--check]
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
HEAD_DIMS = (64, 96, 128, 192, 256)
ELEMENTS = {"fp16": "__half", "bf16": "__nv_bfloat16"}
FORWARD = """\
// Written by generate.py.
#include "csrc/sm80/forward_launch.cuh"

namespace fa::sm80 {{
using Traits = ForwardTraits<{element}, {d}, {few}, {features}>;
template void launch_forward<Traits>(ForwardLaunch const&, cudaStream_t);
}}  // namespace fa::sm80
"""
BACKWARD = """\
// Written by generate.py.
#include "csrc/sm80/backward_launch.cuh"

namespace fa::sm80 {{
using Traits = {tile}<{element}, {d}, {features}>;
template void {launch}<Traits>(BackwardLaunch const&, cudaStream_t);
}}  // namespace fa::sm80
"""
TILES = {
    "queries": ("QueryTile", "launch_query_tiles"),
    "keys": ("KeyTile", "launch_key_tiles"),
}


def files() -> dict[str, str]:
    """File names and their contents."""
    wanted = {}
    for dtype, d, rows, features in itertools.product(
        ELEMENTS, HEAD_DIMS, ("few", "many"), (False, True)
    ):
        kind = "features" if features else "plain"
        name = f"sm80_forward_d{d}_{dtype}_{rows}_{kind}.cu"
        wanted[name] = FORWARD.format(
            element=ELEMENTS[dtype],
            d=d,
            few=str(rows == "few").lower(),
            features=str(features).lower(),
        )
    for dtype, d, rows, features in itertools.product(ELEMENTS, HEAD_DIMS, TILES, (False, True)):
        kind = "features" if features else "plain"
        tile, launch = TILES[rows]
        wanted[f"sm80_backward_d{d}_{dtype}_{rows}_{kind}.cu"] = BACKWARD.format(
            tile=tile,
            launch=launch,
            element=ELEMENTS[dtype],
            d=d,
            features=str(features).lower(),
        )
    return wanted


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--check", action="store_true", help="change nothing; exit 1 if outdated")
    check = parser.parse_args().check
    wanted = files()
    present = {path.name: path.read_text() for path in FOLDER.glob("*.cu")}
    outdated = sorted(name for name in wanted | present if wanted.get(name) != present.get(name))
    if check:
        for name in outdated:
            print(f"{name} is out of date: run python csrc/instantiations/generate.py")
        return 1 if outdated else 0
    for name in outdated:
        path = FOLDER / name
        if name in wanted:
            path.write_text(wanted[name])
        else:
            path.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
