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

namespace fa::gpu::sm80 {{
using Traits = {traits};
template void launch_forward<Traits>(ForwardLaunch const&, void*);
}}  // namespace fa::gpu::sm80
"""
BACKWARD = """\
// Written by generate.py.
#include "csrc/sm80/backward_launch.cuh"

namespace fa::gpu::sm80 {{
using Traits = {tile}<{element}, {shape}, {features}>;
template void {launch}<Traits>(BackwardLaunch const&, void*);
}}  // namespace fa::gpu::sm80
"""
# Traits and head dims. A decode of 96 columns takes the kernels of 128.
DECODE = "Decode<{element}, {d}, {features}, Occupancy::"
FORWARDS = {
    "decode": (DECODE + "kUsual>", (64, 128, 192, 256)),
    "decode_one": (DECODE + "kOne>", (64, 128, 192, 256)),
    "decode_most": (DECODE + "kMost>", (128,)),
    "prefill": ("Prefill<{element}, {d}, {features}>", HEAD_DIMS),
}
# Name, traits, shape and launch. Head dims up to 128 walk once, by steps of 64 queries, or of 32
# where shared memory is short; wider ones twice.
BACKWARDS = [
    *(
        (f"d{d}_walk", "KeyWalkTraits", f"{d}, kWideQueries", "launch_key_walk")
        for d in (64, 96, 128)
    ),
    ("d128_narrow", "KeyWalkTraits", "128, kNarrowQueries", "launch_key_walk"),
    *((f"d{d}_queries", "QueryTile", f"{d}", "launch_query_tiles") for d in (192, 256)),
    *((f"d{d}_keys", "KeyTile", f"{d}", "launch_key_tiles") for d in (192, 256)),
]


def files() -> dict[str, str]:
    """File names and their contents."""
    wanted = {}
    for dtype, d, rows, features in itertools.product(ELEMENTS, HEAD_DIMS, FORWARDS, (False, True)):
        kind = "features" if features else "plain"
        traits, head_dims = FORWARDS[rows]
        if d in head_dims:
            wanted[f"sm80_forward_d{d}_{dtype}_{rows}_{kind}.cu"] = FORWARD.format(
                traits=traits.format(element=ELEMENTS[dtype], d=d, features=str(features).lower())
            )
    for dtype, backward, features in itertools.product(ELEMENTS, BACKWARDS, (False, True)):
        kind = "features" if features else "plain"
        name, tile, shape, launch = backward
        wanted[f"sm80_backward_{name}_{dtype}_{kind}.cu"] = BACKWARD.format(
            tile=tile,
            launch=launch,
            element=ELEMENTS[dtype],
            shape=shape,
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
