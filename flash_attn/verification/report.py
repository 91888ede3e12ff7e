"""What a verification found, as text, as plain data for JSON, and as a picture."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .relations import Outcome

# Columns in the order in which they are shown; the first is the claim, the others are controls.
ENGINE_TITLES = {"deterministic": "deterministic", "standard": "standard", "pytorch": "PyTorch"}


@dataclass
class ClaimResult:
    """One row: a claim's outcome under each engine that ran."""

    key: str
    title: str
    varied: str
    control: bool  # standard mode has to break it
    outcomes: dict[str, Outcome]

    @property
    def held(self) -> bool:
        return self.outcomes["deterministic"].held

    @property
    def ran(self) -> bool:
        return self.outcomes["deterministic"].cases > 0

    def word(self, engine: str) -> str:
        outcome = self.outcomes.get(engine)
        if outcome is None or not outcome.cases:
            return "-"
        if engine == "deterministic":
            return "held" if outcome.held else "BROKEN"
        return "same bytes" if outcome.held else "differs"


@dataclass
class Report:
    """The outcome of `verify`. `str()` is the table."""

    results: list[ClaimResult]
    problems: list[str] = field(default_factory=list)

    @property
    def held(self) -> bool:
        """Every claim that applied was compared at least once, and no byte differed."""
        ran = [result for result in self.results if result.ran]
        return bool(ran) and all(result.held for result in ran)

    @property
    def has_control(self) -> bool:
        return any("standard" in result.outcomes for result in self.results)

    @property
    def missed(self) -> list[str]:
        """Claims that standard mode should have broken and did not."""
        return [
            result.title
            for result in self.results
            if result.control and result.ran and result.word("standard") != "differs"
        ]

    @property
    def caught(self) -> bool:
        """The control differed where it must, and there was such a place."""
        expected = any(result.control and result.ran for result in self.results)
        return expected and not self.missed

    @property
    def ok(self) -> bool:
        return self.held and (self.caught or not self.has_control)

    def __str__(self) -> str:
        engines = [name for name in ENGINE_TITLES if any(name in r.outcomes for r in self.results)]
        titles = [ENGINE_TITLES[name] for name in engines]
        header = ["claim", "varied", "cases", "bytes compared", *titles]
        rows = [
            [
                result.title,
                result.varied,
                str(result.outcomes["deterministic"].cases),
                f"{result.outcomes['deterministic'].bytes_compared:,}",
                *(result.word(name) for name in engines),
            ]
            for result in self.results
        ]
        lines = [table(header, rows), ""]
        lines += [line for result in self.results for line in _mismatches(result)]
        lines += [self._verdict()]
        return "\n".join(lines)

    def _verdict(self) -> str:
        ran = [result for result in self.results if result.ran]
        claims = f"{sum(result.held for result in ran)} of {len(ran)} claims held, byte for byte"
        if not self.has_control:
            return f"{claims}; no control was run"
        if self.caught:
            broken = sum(result.word("standard") == "differs" for result in ran)
            return f"{claims}; the control (standard mode) broke {broken} of them, as it must"
        reason = ", ".join(self.missed) or "no claim that has one was run"
        return f"{claims}; THE CONTROL WAS NOT CAUGHT: {reason}"

    def to_dict(self) -> dict[str, Any]:
        return {
            "ok": self.ok,
            "held": self.held,
            "control_caught": self.caught if self.has_control else None,
            "problems": self.problems,
            "claims": [
                {
                    "key": result.key,
                    "title": result.title,
                    "varied": result.varied,
                    "control_must_differ": result.control,
                    "engines": {
                        name: {
                            "verdict": result.word(name),
                            "cases": outcome.cases,
                            "bytes_compared": outcome.bytes_compared,
                            "mismatch": outcome.mismatch and str(outcome.mismatch),
                            "problem": outcome.problem,
                        }
                        for name, outcome in result.outcomes.items()
                    },
                }
                for result in self.results
            ],
        }


def _mismatches(result: ClaimResult) -> list[str]:
    outcome = result.outcomes["deterministic"]
    if outcome.mismatch is None:
        return []
    return [f"BROKEN {result.title}", f"  {outcome.problem}", f"  {outcome.mismatch}", ""]


def table(header: Seq[str], rows: Seq[Seq[str]]) -> str:
    """Plain text columns; numbers to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: Seq[str]) -> str:
        aligned = (
            cell.rjust(width) if _is_number(cell) else cell.ljust(width)
            for cell, width in zip(cells, widths, strict=True)
        )
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), "  ".join("-" * width for width in widths), *map(line, rows)])


def _is_number(cell: str) -> bool:
    return cell.replace(",", "").replace(".", "").isdecimal()


COLOURS = {
    "held": "#2a9d5c",
    "BROKEN": "#d1495b",
    "differs": "#e9a23b",
    "same bytes": "#b9d7c6",
    "-": "#eeeeee",
}


def save_plot(path: str | Path, report: Report, costs: Seq[dict[str, Any]]) -> None:
    """Draw claims x engines, and beside them time and memory of both modes relative to standard.

    Args:
        costs: nothing, or rows with "what" (a label), "unit", and a number or None for each of
            "standard", "deterministic" and "pytorch".
    """
    import matplotlib

    matplotlib.use("Agg")  # a file is all that is asked for; no display needed
    from matplotlib import pyplot

    engines = [name for name in ENGINE_TITLES if any(name in r.outcomes for r in report.results)]
    height = 1.6 + 0.3 * len(report.results)
    panels = 2 if costs else 1
    figure, axes = pyplot.subplots(
        1,
        panels,
        figsize=(6.5 * panels, height),
        width_ratios=(1.15, 1)[:panels],
        layout="constrained",
        squeeze=False,
    )
    _draw_claims(axes[0, 0], report, engines)
    if costs:
        _draw_costs(axes[0, 1], costs)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_claims(axes: Any, report: Report, engines: list[str]) -> None:
    for row, result in enumerate(report.results):
        for column, name in enumerate(engines):
            word = result.word(name)
            axes.barh(row, 0.96, left=column + 0.02, height=0.86, color=COLOURS[word])
            axes.text(column + 0.5, row, word, ha="center", va="center", fontsize=8)
    axes.set_yticks(range(len(report.results)), [r.title for r in report.results], fontsize=9)
    axes.set_xticks([i + 0.5 for i in range(len(engines))], [ENGINE_TITLES[n] for n in engines])
    axes.set_xlim(0, len(engines))
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.xaxis.tick_top()
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("Same bytes under every schedule?", pad=12)


def _draw_costs(axes: Any, costs: Seq[dict[str, Any]]) -> None:
    colours = {"standard": "#8d99ae", "deterministic": "#2a9d5c", "pytorch": "#4f7cac"}
    labels = []
    for row, cost in enumerate(costs):
        labels.append(cost["what"].replace(" (", "\n(", 1))
        for offset, (name, colour) in enumerate(colours.items()):
            if cost.get(name) is None or not cost["standard"]:
                continue
            ratio = cost[name] / cost["standard"]
            place = row + (offset - 1) * 0.27
            label = ENGINE_TITLES[name] if row == 0 else None
            axes.barh(place, ratio, height=0.25, color=colour, label=label)
            axes.text(ratio, place, f" {cost[name]:.4g} {cost['unit']}", va="center", fontsize=8)
    axes.axvline(1.0, color="#444444", linewidth=0.8)
    axes.set_yticks(range(len(labels)), labels, fontsize=9)
    axes.margins(x=0.3, y=0.01)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title("Time and memory (1 = standard mode)")
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=3, frameon=False)
