"""The patches for upstream's sources: they fit one archive, do what they say, and can be undone."""

import difflib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import patched_upstream
from patches import apply
from patches.scripts import edit, read_script

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "flash-attn==2.8.3"
PROGRAM = [sys.executable, "-m", "patches.apply"]


def run(*arguments):
    return subprocess.run(
        [*PROGRAM, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True
    )


# ---- Scripts ----


def script_between(old, new):
    """An ed script that makes `new` of `old`, as `diff -e` would write it."""
    commands = []
    for tag, i, j, k, m in difflib.SequenceMatcher(a=old, b=new, autojunk=False).get_opcodes():
        where = str(i + 1) if j - i == 1 else f"{i + 1},{j}"
        if tag == "insert":
            commands.append([f"{i}a", *new[k:m], "."])
        elif tag == "replace":
            commands.append([f"{where}c", *new[k:m], "."])
        elif tag == "delete":
            commands.append([f"{where}d"])
    return "".join(f"{line}\n" for command in reversed(commands) for line in command)


LINES = st.lists(st.sampled_from(["one", "two", "", "  three", "4,5d", "6a"]), max_size=12)


@given(LINES, LINES)
def test_a_script_makes_the_new_file_of_the_old(old, new):
    text = "".join(f"{line}\n" for line in old)
    assert edit(text, read_script(script_between(old, new))).splitlines() == new


@pytest.mark.skipif(not shutil.which("diff"), reason="there is no diff here")
def test_scripts_are_those_of_diff(tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    old.write_text("a\nb\nc\nd\ne\nf\n")
    new.write_text("0\na\nB\nB\nd\nf\ng\n")
    script = subprocess.run(["diff", "-e", old, new], capture_output=True, text=True).stdout
    assert edit(old.read_text(), read_script(script)) == new.read_text()


@pytest.mark.parametrize(
    "script, message",
    [
        ("hello\n", "not a command"),
        ("3a\nno end\n", "have no end"),
        ("2d\n5d\n", "the last line comes first"),
        ("4,6d\n6d\n", "the last line comes first"),
        ("3s/a/b/\n", "not a command"),
    ],
)
def test_what_is_no_script_is_refused(script, message):
    with pytest.raises(ValueError, match=message):
        read_script(script)


def test_a_file_without_the_lines_is_refused():
    with pytest.raises(ValueError, match="a change of line 7 in a file of 1 lines"):
        edit("one\n", read_script("7d\n"))


# ---- The program, on a tree made up for it ----


@pytest.fixture
def small_tree(tmp_path, monkeypatch):
    """A tree of two files, and patches that fit it: one changes a file, one adds another."""
    tree, scripts = tmp_path / "tree", tmp_path / "scripts"
    scripts.mkdir()
    (tree / "src").mkdir(parents=True)
    (tree / "src/old.h").write_text("one\ntwo\nthree\n")
    (tree / "other").write_text("not ours\n")
    (scripts / "old.h.patch").write_text("3a\nfour\n.\n2c\nTWO\n.\n")
    (scripts / "new.py.patch").write_text("0a\nfresh\n.\n")
    after = {"old.h.patch": "one\nTWO\nthree\nfour\n", "new.py.patch": "fresh\n"}
    before = {"old.h.patch": apply.digest(b"one\ntwo\nthree\n"), "new.py.patch": None}
    files = {"old.h.patch": "src/old.h", "new.py.patch": "new.py"}
    monkeypatch.setattr(apply, "HERE", scripts)
    monkeypatch.setattr(
        apply,
        "PATCHES",
        [
            apply.Patch(name, files[name], before[name], apply.digest(after[name].encode()))
            for name in files
        ],
    )
    return tree


def contents(tree):
    return {
        path.relative_to(tree).as_posix(): path.read_bytes()
        for path in sorted(tree.rglob("*"))
        if path.is_file()
    }


def test_patches_are_put_in_and_taken_out(small_tree):
    before = contents(small_tree)
    assert apply.apply(small_tree) == [
        "src/old.h",
        "  line 2: 1 replaced by 1",
        "  after line 3: 1 added",
        "new.py (new)",
        "  after line 0: 1 added",
    ]
    assert (small_tree / "src/old.h").read_text() == "one\nTWO\nthree\nfour\n"
    assert (small_tree / "src/old.h.orig").read_text() == "one\ntwo\nthree\n"
    assert (small_tree / "new.py").read_text() == "fresh\n"
    assert apply.undo(small_tree) == ["src/old.h: as it was", "new.py: removed"]
    assert contents(small_tree) == before


@pytest.mark.parametrize(
    "disturb, action, message",
    [
        (lambda tree: (tree / "src/old.h").write_text("one\n"), "apply", "src/old.h: SHA-256"),
        (lambda tree: (tree / "src/old.h").unlink(), "apply", "src/old.h: no such file"),
        (lambda tree: (tree / "new.py").write_text("theirs\n"), "apply", "new.py: SHA-256"),
        (lambda tree: apply.apply(tree), "apply", "is patched already"),
        (lambda tree: None, "undo", "there is nothing to undo"),
        (
            lambda tree: (apply.apply(tree), (tree / "src/old.h.orig").unlink()),
            "undo",
            "does not hold the file as it was",
        ),
        (
            lambda tree: (apply.apply(tree), (tree / "src/old.h").write_text("edited\n")),
            "undo",
            "src/old.h: SHA-256",
        ),
        (
            lambda tree: (apply.HERE / "old.h.patch").write_text("2c\nsomething else\n.\n"),
            "apply",
            "the patches are damaged",
        ),
    ],
)
def test_anything_else_is_refused_and_left_as_it_is(small_tree, disturb, action, message):
    disturb(small_tree)
    before = contents(small_tree)
    with pytest.raises(apply.Refusal, match=re.escape(message)):
        getattr(apply, action)(small_tree)
    assert contents(small_tree) == before


def test_the_program_says_what_it_refuses(tmp_path):
    missing = run(tmp_path / "nothing")
    assert missing.returncode == 2 and "there is no" in missing.stderr
    other = tmp_path / "other.tar.gz"
    other.write_bytes(b"another archive")
    refused = run(other)
    assert refused.returncode == 1 and "is another archive; received SHA-256" in refused.stderr
    (tmp_path / "tree").mkdir()
    refused = run(tmp_path / "tree")
    assert refused.returncode == 1 and "is not what these patches were made for" in refused.stderr
    for wrong in ((tmp_path / "tree", "--out", tmp_path), (other, "--undo")):
        assert run(*wrong).returncode == 2


# ---- The patches, on upstream's archive ----


@pytest.fixture(scope="session")
def archive(tmp_path_factory):
    """Upstream's source archive, by name and version from the package index."""
    folder = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", folder]
    command += ["--no-binary", ":all:", "--no-build-isolation", SOURCE]
    environment = os.environ | {"FLASH_ATTENTION_SKIP_CUDA_BUILD": "TRUE"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        pytest.skip(f"{SOURCE} cannot be fetched from the package index: {last}")
    (found,) = folder.glob("*.tar.gz")
    return found


@pytest.fixture(scope="session")
def trees(archive, tmp_path_factory):
    """The archive's tree as it is, and another with the patches in, by the program."""
    plain, patched = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("patched")
    done = run(archive, "--out", patched)
    assert done.returncode == 0, done.stderr
    return apply.unpack(archive, plain), patched / apply.DIGESTS["folder"], done.stdout


def test_the_archive_is_patched_and_undone(trees):
    plain, patched, report = trees
    for patch in apply.PATCHES:
        assert patch.state(plain) == "before" and patch.state(patched) == "after"
        assert patch.file in report
    changed = {patch.file for patch in apply.PATCHES}
    changed |= {f"{patch.file}.orig" for patch in apply.PATCHES if patch.before}
    before, after = contents(plain), contents(patched)
    assert {x for x in before | after if before.get(x) != after.get(x)} == changed
    copy = patched.parent / "copy"
    shutil.copytree(patched, copy)
    assert run(copy).returncode == 1  # patched already
    assert run(copy, "--undo").returncode == 0
    assert contents(copy) == before


def test_the_patches_hold_none_of_upstreams_lines(trees):
    """Every line that is put in is ours: upstream's files have none like it."""
    plain, _, _ = trees
    for patch in apply.PATCHES:
        if patch.before is None:
            continue
        theirs = {line.strip() for line in (plain / patch.file).read_text().splitlines()}
        ours = [line.strip() for change in read_script(patch.script) for line in change.lines]
        assert not [line for line in ours if line in theirs and line not in ("", "}", "});")]


def test_the_patched_binding_compiles(trees, tmp_path):
    """Its syntax and its types; the kernels need a GPU's compiler (benchmarks.patched_upstream)."""
    from torch.utils import cpp_extension

    cuda = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler or not (cuda / "cuda_runtime_api.h").is_file():
        pytest.skip("no C++ compiler, or none of CUDA's headers")
    _, patched, _ = trees
    # What a CPU build of PyTorch has no file for: on which side of a Windows library we are.
    macros = tmp_path / "c10/cuda/impl/cuda_cmake_macros.h"
    macros.parent.mkdir(parents=True)
    macros.write_text("#pragma once\n#define C10_CUDA_BUILD_SHARED_LIBS\n")
    csrc = patched / "csrc"
    folders = [*cpp_extension.include_paths(), tmp_path, cuda, cuda / "cccl"]
    folders += [csrc / "cutlass/include", csrc / "flash_attn/src", sysconfig.get_path("include")]
    command = [compiler, "-std=c++20", "-w", "-fsyntax-only", *(f"-I{x}" for x in folders)]
    command += ["-DTORCH_EXTENSION_NAME=flash_attn_2_cuda", str(csrc / "flash_attn/flash_api.cpp")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]


# ---- What was measured of them ----


def side(on, off):
    calls = ("prefill, dense", "decode, dense", "decode, kvcache")
    shape = ["decode", 1, 1, 64, 2, 1, 64, False]
    return {
        "batches": [
            {"call": c, "d": 64, "dtype": "float16", "deterministic": on, "standard": off}
            for c in calls
        ],
        "refused": {"dropout": True, "backward": True},
        "times": [{"case": shape, "deterministic": 20.0, "standard": 10.0}],
        "memory": {"case": shape, "mib": {"deterministic": 3.0, "standard": 1.0}},
    }


def record(patched, ours):
    return {
        "gpu": "NVIDIA Test",
        "versions": {"torch": "0"},
        "date": "today",
        "digest": "0123456789abcdef",
        "source": "flash-attn",
        "patched": patched,
        "ours": ours,
    }


def test_what_falls_short_is_named():
    assert patched_upstream.failures(record(side(0, 9), side(0, 0))) == []
    (first, *rest) = patched_upstream.failures(record(side(5, 9), side(0, 0)))
    assert first == "patched, prefill, dense, d=64, float16: 5 other bytes with the mode on"
    assert len(rest) == 2
    careless = record(side(0, 9), side(0, 0))
    careless["patched"]["refused"]["dropout"] = False
    assert patched_upstream.failures(careless) == ["patched, dropout: not refused with the mode on"]
    dead = patched_upstream.failures(record(side(0, 0), side(0, 0)))
    assert len(dead) == 2 and all("the control has the same bytes" in line for line in dead)


def test_the_tables_say_what_was_measured():
    table = patched_upstream.render(record(side(0, 9), side(0, 0)))
    assert "| decode, dense | 0 | 9 | 0 |" in table
    assert "| decode b1-q1-k64-h2.1-d64 | 10 | 20 | 2.00 | 20 | 1.00 |" in table
    assert "| decode b1-q1-k64-h2.1-d64 | 1 | 3 | 3 |" in table


@pytest.mark.parametrize("path", sorted(ROOT.glob("results/*/patched_upstream.json")), ids=str)
def test_the_recorded_run_holds(path):
    recorded = json.loads(path.read_text())
    assert patched_upstream.failures(recorded) == []
    assert recorded["patches"] == patched_upstream.digest_of_patches(), "measure the patches again"
    decode = [row for row in recorded["patched"]["batches"] if "decode" in row["call"]]
    assert {row["d"] for row in decode} == {64, 128} and len(decode) == 12
