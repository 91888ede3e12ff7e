"""Scripts of the editor ed, as `diff -e` writes them: the commands a, c and d, the last line first.

They hold the lines that are put in and the numbers of those that go, and nothing of the file that
they change. So a script fits one file and no other: apply.py asks for the file's digest.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

COMMAND = re.compile(r"(\d+)(?:,(\d+))?([acd])")


@dataclass(frozen=True)
class Change:
    """Lines [first, last] of the file become `lines`; with last = first - 1, they go between."""

    first: int
    last: int
    lines: list[str]

    def __str__(self) -> str:
        gone, new = self.last - self.first + 1, len(self.lines)
        if gone == 0:
            return f"after line {self.first - 1}: {new} added"
        where = f"line {self.first}" if gone == 1 else f"lines {self.first} to {self.last}"
        return f"{where}: {gone} replaced by {new}" if new else f"{where}: {gone} removed"


def read_script(script: str) -> list[Change]:
    """The changes of a script, the last line first. ValueError where it is not one."""
    changes: list[Change] = []
    rest = iter(script.splitlines())
    for line in rest:
        command = COMMAND.fullmatch(line)
        if not command:
            raise ValueError(f"not a command of an ed script: {line!r}")
        first, last = int(command[1]), int(command[2] or command[1])
        lines: list[str] = []
        if command[3] != "d":
            for text in rest:
                if text == ".":
                    break
                lines.append(text)
            else:
                raise ValueError(f"the lines of {line!r} have no end")
        if command[3] == "a":
            first, last = first + 1, first
        if changes and last >= changes[-1].first:
            raise ValueError(f"the last line comes first: {line!r} stands behind a lower one")
        changes.append(Change(first, last, lines))
    return changes


def edit(text: str, changes: list[Change]) -> str:
    """`text` with the changes made. ValueError where it has not got the lines."""
    lines = text.splitlines()
    for change in changes:
        if change.last > len(lines):
            raise ValueError(f"a change of line {change.last} in a file of {len(lines)} lines")
        lines[change.first - 1 : change.last] = change.lines
    return "".join(f"{line}\n" for line in lines)
