"""Patch flash-attn 2.8.3, or take the patches out again.

    python -m patches.apply flash_attn-2.8.3.tar.gz            unpacks beside it, and patches
    python -m patches.apply flash_attn-2.8.3.tar.gz --out DIR  unpacks into DIR
    python -m patches.apply DIR                                patches an unpacked tree
    python -m patches.apply DIR --undo                         the tree as it was

Nothing is written before every file's SHA-256 was found right, before and after. The files as they
were stay beside the patched ones, as *.orig; --undo puts them back.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from patches.scripts import edit, read_script

HERE = Path(__file__).resolve().parent
DIGESTS: dict[str, Any] = json.loads((HERE / "digests.json").read_text())


class Refusal(Exception):
    """What is there is not what the patches were made for."""


@dataclass(frozen=True)
class Patch:
    """One file of upstream's, and what becomes of it."""

    name: str  # of the script, in this folder
    file: str  # relative to the tree
    before: str | None  # SHA-256; None: there is no such file
    after: str

    @property
    def script(self) -> str:
        return (HERE / self.name).read_text()

    def state(self, tree: Path) -> str:
        """Of the tree's file: "before", "after", or what else was found."""
        path = tree / self.file
        found = digest(path.read_bytes()) if path.is_file() else None
        if found == self.before:
            return "before"
        if found == self.after:
            return "after"
        return f"SHA-256 {found}" if found else "no such file"


PATCHES = [Patch(name, **entry) for name, entry in DIGESTS["patches"].items()]


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def require(tree: Path, wanted: str) -> None:
    """Refusal unless every file of the tree is in the state that is wanted."""
    states = {patch.file: patch.state(tree) for patch in PATCHES}
    found = set(states.values())
    if found == {wanted}:
        return
    if found == {"after"}:
        raise Refusal(f"{tree} is patched already; --undo takes the patches out")
    if found == {"before"}:
        raise Refusal(f"{tree} is not patched: there is nothing to undo")
    wrong = [f"  {file}: {state}" for file, state in states.items() if state != wanted]
    raise Refusal(
        f"{tree} is not what these patches were made for; received\n"
        + "\n".join(wrong)
        + f"\nrule: the sources of {DIGESTS['source']}, "
        + ("unchanged" if wanted == "before" else "patched by this program")
    )


def apply(tree: Path) -> list[str]:
    """Patch an unpacked tree; what was done, a line a change."""
    require(tree, "before")
    report, results = [], {}
    for patch in PATCHES:
        changes = read_script(patch.script)
        text = (tree / patch.file).read_text() if patch.before else ""
        results[patch] = edit(text, changes).encode()
        if digest(results[patch]) != patch.after:
            raise Refusal(
                f"patches/{patch.name} does not make what it should; received "
                f"SHA-256 {digest(results[patch])}; rule: {patch.after}; "
                "the patches are damaged: fetch them again"
            )
        report.append(f"{patch.file}{'' if patch.before else ' (new)'}")
        report += [f"  {change}" for change in reversed(changes)]
    for patch, content in results.items():
        path = tree / patch.file
        if patch.before:
            path.rename(original(path))
        path.write_bytes(content)
    return report


def undo(tree: Path) -> list[str]:
    """Take the patches out of a tree; what was done, a line a file."""
    require(tree, "after")
    for patch in PATCHES:
        kept = original(tree / patch.file)
        if patch.before and (not kept.is_file() or digest(kept.read_bytes()) != patch.before):
            raise Refusal(
                f"{kept} does not hold the file as it was; received "
                f"{'another file' if kept.is_file() else 'no such file'}; "
                f"rule: SHA-256 {patch.before}; unpack {DIGESTS['source']} again"
            )
    for patch in PATCHES:
        path = tree / patch.file
        if patch.before:
            original(path).replace(path)
        else:
            path.unlink()
    return [f"{patch.file}: {'as it was' if patch.before else 'removed'}" for patch in PATCHES]


def original(path: Path) -> Path:
    return path.with_name(path.name + ".orig")


def unpack(archive: Path, out: Path | None) -> Path:
    """The tree of a source archive, unpacked into `out` or beside the archive."""
    found = digest(archive.read_bytes())
    if found != DIGESTS["archive"]:
        raise Refusal(
            f"{archive} is another archive; received SHA-256 {found}; "
            f"rule: {DIGESTS['source']}, SHA-256 {DIGESTS['archive']}"
        )
    folder = out or archive.parent
    tree = folder / DIGESTS["folder"]
    if tree.exists():
        raise Refusal(f"{tree} exists; name it instead of the archive, or another --out")
    with tarfile.open(archive) as members:
        members.extractall(folder, filter="data")
    return tree


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m patches.apply", description=f"Patch {DIGESTS['source']}."
    )
    parser.add_argument("source", type=Path, help="the source archive, or its unpacked tree")
    parser.add_argument("--out", type=Path, help="where to unpack the archive (default: beside it)")
    parser.add_argument("--undo", action="store_true", help="take the patches out of a tree")
    options = parser.parse_args(arguments)
    source: Path = options.source
    if not source.exists():
        parser.error(f"there is no {source}")
    if source.is_dir() and options.out:
        parser.error("--out goes with an archive; a tree is patched where it lies")
    if source.is_file() and options.undo:
        parser.error("--undo goes with a tree, not with an archive")
    try:
        tree = source if source.is_dir() else unpack(source, options.out)
        report = undo(tree) if options.undo else apply(tree)
    except Refusal as refusal:
        print(f"python -m patches.apply: {refusal}", file=sys.stderr)
        return 1
    print("\n".join(report))
    print(f"\n{tree}: {'the patches are out' if options.undo else 'patched'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
