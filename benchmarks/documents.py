"""Puts into the documents what their commands print from results/.

    python -m benchmarks.documents            every document
    python -m benchmarks.documents README.md  some

A block starts with `<!-- output of: COMMAND -->` and ends with `<!-- end -->`; a fence around what
stands between them is kept. tests/test_project.py fails where a block is not what its command
prints, so run this after a measurement.
"""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm.auto import tqdm

from benchmarks.records import ROOT

BLOCK = re.compile(r"<!-- output of: (.*?) -->\n(.*?)<!-- end -->", re.DOTALL)
FENCED = re.compile(r"\s*```(\w*)\n(.*?)```\s*", re.DOTALL)


def documents() -> list[Path]:
    """All Markdown of the project."""
    folders = ("*.md", "csrc/**/*.md", "docs/**/*.md", "patches/*.md", "results/*.md")
    return sorted(path for pattern in folders for path in ROOT.glob(pattern))


def blocks(document: Path) -> Iterator[tuple[str, str]]:
    """(command, text) of each block, the text without its fence."""
    for command, text in BLOCK.findall(document.read_text()):
        fenced = FENCED.fullmatch(text)
        yield command, fenced[2] if fenced else text


def printed(command: str) -> str:
    """What a command prints; only `cat` and `python` are run from a document."""
    words = shlex.split(command)
    if words[0] == "cat":
        return (ROOT / words[1]).read_text()
    if words[0] != "python":
        raise ValueError(f"only python and cat are run from a document: {command}")
    done = subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def refreshed(text: str) -> str:
    """A document's text with every block anew."""

    def anew(block: re.Match[str]) -> str:
        output = printed(block[1]).strip()
        if fenced := FENCED.fullmatch(block[2]):
            output = f"```{fenced[1]}\n{output}\n```"
        return f"<!-- output of: {block[1]} -->\n{output}\n<!-- end -->"

    return BLOCK.sub(anew, text)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("documents", type=Path, nargs="*", help="default: all of them")
    options = parser.parse_args(arguments)
    for document in tqdm(options.documents or documents(), unit="document"):
        text = document.read_text()
        if (new := refreshed(text)) != text:
            document.write_text(new)
            print(f"{document}: refreshed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
