"""COLAB_OVERNIGHT.ipynb: runs headless, resumes where it stopped, refuses old GPUs by name."""

import json
import os
import shutil
import subprocess
import types
from pathlib import Path

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK = ROOT / "COLAB_OVERNIGHT.ipynb"
QUICK_STEPS = ["validate-quick", "validate-full", "search-decode", "bench"]


def execute(folder: Path) -> str:
    """Run a copy in `folder` in quick mode; returns everything that its cells printed."""
    copy = Path(shutil.copy(NOTEBOOK, folder))
    notebook = nbformat.read(copy, as_version=4)
    environment = {
        "FLASH_ATTN_NOTEBOOK_QUICK": "1",
        "FLASH_ATTN_NOTEBOOK_RESULTS": str(folder / "results"),
        "FLASH_ATTN_REPO": str(ROOT),
        "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
        "IPYTHONDIR": str(folder / "ipython"),
    }
    client = nbclient.NotebookClient(
        notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=os.environ | environment)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def recorded(results: Path) -> list[dict]:
    return [json.loads(line) for line in (results / "steps.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_runs_headless_and_resumes(tmp_path):
    """A second run repeats nothing that was done, and only that which was not."""
    printed = execute(tmp_path)
    results = tmp_path / "results"
    records = recorded(results)
    assert [record["step"] for record in records] == QUICK_STEPS, printed
    assert all(record["ok"] for record in records), printed
    assert "imports: nothing to install" in printed
    assert "not on Colab: nothing to mount" in printed
    assert "2 of 2 claims held" in (results / "validate-quick.log").read_text()
    names = {path.name for path in results.iterdir()}
    assert {"verification_results.txt", "validate-full.json", "bench.json", "bench.png"} <= names
    assert (tmp_path / "results.zip").exists()

    # As after a disconnect: the last step was under way, so its line is missing.
    kept = (results / "steps.jsonl").read_text().splitlines()[:-1]
    (results / "steps.jsonl").write_text("\n".join(kept) + "\n")
    printed = execute(tmp_path)
    for name in QUICK_STEPS[:-1]:
        assert f"[{name}] done before, skipped" in printed
    assert [record["step"] for record in recorded(results)] == QUICK_STEPS


def cell(name: str) -> str:
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return next(cell.source for cell in cells if cell["id"] == name)


class Gpu:
    """Stands in for torch.cuda."""

    def __init__(self, name, capability):
        self.name, self.capability = name, capability

    def is_available(self):
        return True

    def get_device_name(self, index):
        return self.name

    def get_device_capability(self, index):
        return self.capability


@pytest.fixture
def choose_device():
    """The notebook's own function, without the rest of the notebook."""
    names = {"subprocess": subprocess, "PYTHON": "python"}
    exec(cell("gpu"), names)
    return names["choose_device"]


def ended(status, errors=""):
    return lambda command, **options: types.SimpleNamespace(returncode=status, stderr=errors)


@pytest.mark.parametrize(
    "gpu,capability,device",
    [("Tesla T4", (7, 5), "cpu"), ("NVIDIA A100", (8, 0), "cuda"), ("NVIDIA H200", (9, 0), "cuda")],
    ids=["T4", "A100", "H200"],
)
def test_old_gpus_are_refused_by_name(choose_device, capsys, gpu, capability, device):
    """Below sm_80 the notebook says which GPU it met, and goes on with the CPU."""
    assert choose_device(Gpu(gpu, capability), run=ended(0)) == device
    printed = capsys.readouterr().out
    assert gpu in printed
    assert ("refused, going on with the CPU" in printed) == (device == "cpu")


def test_a_gpu_without_kernels_is_named(choose_device, capsys):
    """A new GPU under an installation without CUDA kernels: the library's reason, then the CPU."""
    refusal = ended(1, "Traceback\nRuntimeError: flash_attn: no CUDA kernels here")
    assert choose_device(Gpu("NVIDIA L4", (8, 9)), run=refusal) == "cpu"
    assert "RuntimeError: flash_attn: no CUDA kernels here" in capsys.readouterr().out


def test_failed_steps_are_told_and_tried_again(tmp_path, capsys):
    """A step that fails is recorded, does not stop the others, and runs again next time."""
    names = {"REPO": tmp_path, "RESULTS": tmp_path, "STEPS": tmp_path / "steps.jsonl"}
    exec("import json, os, subprocess, sys, time\n" + cell("step"), names)
    script = "import pathlib, sys; p = pathlib.Path('second'); sys.exit(not p.exists() and 3)"
    names["step"]("flaky", names["PYTHON"], "-c", script)
    assert names["outcomes"]()["flaky"]["status"] == 3
    (tmp_path / "second").touch()
    names["step"]("flaky", names["PYTHON"], "-c", script)
    assert names["outcomes"]()["flaky"]["ok"]
    names["step"]("flaky", names["PYTHON"], "-c", script)
    assert "[flaky] done before, skipped" in capsys.readouterr().out
    names |= {"shutil": shutil}
    failed = {"step": "other", "ok": False, "status": 1, "seconds": 0.1}
    with open(names["STEPS"], "a") as stream:
        stream.write(json.dumps(failed) + "\n")
    with pytest.raises(AssertionError, match="failed: other"):
        exec(cell("pack"), names)
    Path(f"{tmp_path}.zip").unlink()
