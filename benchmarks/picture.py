"""README's picture: bytes that differ, and time, by mode; from results/.

    python -m benchmarks.picture results/nvidia-h200 docs/picture.svg

Left, from patched_upstream.json: bytes in which 4 + 4 and eight single sequences differ from a
batch of eight. Right, from bench.json: the time of PyTorch's flash backend over ours in
deterministic mode, a dot a case, with the median of each kind.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any

from benchmarks.records import read_record

# One color a side, in both panels; readable in grey and for the color-blind.
UPSTREAM, STANDARD, DETERMINISTIC = "#b0b0b0", "#e69f00", "#0072b2"
KINDS = ("prefill", "backward", "decode")


def bytes_that_differ(record: dict[str, Any]) -> dict[str, dict[str, int]]:
    """By kind of call: of upstream, and of this package in both modes."""
    sides = {
        "flash-attn 2.8.3": (record["patched"], "standard"),
        "this package, standard": (record["ours"], "standard"),
        "this package, deterministic": (record["ours"], "deterministic"),
    }
    calls = list(dict.fromkeys(row["call"] for row in record["patched"]["batches"]))
    return {
        call: {
            name: sum(row[mode] for row in side["batches"] if row["call"] == call)
            for name, (side, mode) in sides.items()
        }
        for call in calls
    }


def speeds(record: dict[str, Any]) -> dict[str, list[float]]:
    """By kind of case: PyTorch's flash time over ours, of every case that both ran."""
    rows = [row for row in record["cases"] if row["speedup"]]
    return {kind: [row["speedup"][1] for row in rows if row["kind"] == kind] for kind in KINDS}


def draw(folder: Path, to: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")  # a file is all that is asked for; no display needed
    matplotlib.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "flash_attn", "font.size": 9}
    from matplotlib import pyplot

    patched = read_record(folder / "patched_upstream.json")
    bench = read_record(folder / "bench.json")
    differing, faster = bytes_that_differ(patched), speeds(bench)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9.6, 3.6), width_ratios=(3, 2))

    names, colors = list(next(iter(differing.values()))), (UPSTREAM, STANDARD, DETERMINISTIC)
    height = 0.8 / len(names)
    for i, (name, color) in enumerate(zip(names, colors, strict=True)):
        counts = [by_side[name] for by_side in differing.values()]
        places = [y + (i - 1) * height for y in range(len(counts))]
        left.barh(places, counts, height, color=color, label=name)
        for place, count in zip(places, counts, strict=True):
            left.text(max(count, 1), place, f" {count:,}", va="center", fontsize=7)
    left.set_xscale("symlog", linthresh=100)
    left.set_xlim(0, 10 * max(max(by_side.values()) for by_side in differing.values()))
    left.set_yticks(range(len(differing)), list(differing))
    left.invert_yaxis()
    left.set_title("bytes that differ: a batch of 8 against 4 + 4 and 1")
    left.legend(
        fontsize=7, loc="upper center", bbox_to_anchor=(0.4, -0.1), ncols=len(names), frameon=False
    )

    for y, ratios in enumerate(faster.values()):
        right.scatter(ratios, [y] * len(ratios), color=DETERMINISTIC, alpha=0.5, s=22)
        right.scatter(statistics.median(ratios), y, color=DETERMINISTIC, marker="|", s=600)
    right.axvline(1.0, color=UPSTREAM)
    right.set_yticks(range(len(faster)), list(faster))
    right.set_ylim(-0.6, len(faster) - 0.4)
    right.invert_yaxis()
    right.set_title("speed (PyTorch's flash = 1)")
    for axis in (left, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(f"{bench['gpu']}, torch {bench['versions']['torch']}", fontsize=7)
    figure.tight_layout()
    figure.savefig(to, metadata={"Date": None})
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="results/<gpu>")
    parser.add_argument("to", type=Path, help="the file to write (.svg, .png)")
    options = parser.parse_args(arguments)
    draw(options.folder, options.to)
    return 0


if __name__ == "__main__":
    sys.exit(main())
