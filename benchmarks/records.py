"""The records in results/: what each starts with, where it lies, and the line that names it.

Nothing here imports this package or PyTorch before a record is made: benchmarks.alternate times
another build, and tables of recorded runs are rendered where neither is needed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        found = None
    return found[1].strip() if found else platform.processor() or platform.machine()


def source_digest(tree: Path = ROOT) -> str:
    """sha256 over names and contents of csrc/ and flash_attn/: what was measured."""
    digest = hashlib.sha256()
    for folder in ("csrc", "flash_attn"):
        for path in sorted((tree / folder).rglob("*")):
            if path.suffix in {".h", ".cpp", ".cuh", ".cu", ".py"}:
                digest.update(path.relative_to(tree).as_posix().encode() + b"\0")
                digest.update(path.read_bytes())
    return digest.hexdigest()


def cpu_provenance(command: str) -> dict[str, Any]:
    """What a record of this machine's processor starts with."""
    import torch

    return _provenance(command, cpu=cpu_name(), threads=torch.get_num_threads())


def gpu_provenance(command: str) -> dict[str, Any]:
    """What a record of this machine's GPU starts with."""
    import torch

    record = _provenance(command, gpu=torch.cuda.get_device_name())
    record["versions"]["cuda"] = torch.version.cuda
    return record


def _provenance(command: str, **machine: Any) -> dict[str, Any]:
    import torch

    import flash_attn

    return {
        "command": command,
        "date": datetime.date.today().isoformat(),
        **machine,
        "versions": {
            "flash_attn": flash_attn.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "digest": source_digest(),
    }


def results_path(record: dict[str, Any], name: str) -> Path:
    """results/<machine>/<name>; the machine as a word without spaces."""
    machine = record.get("gpu") or record["cpu"]
    return ROOT / "results" / re.sub(r"[^a-z0-9]+", "-", machine.lower()).strip("-") / name


def write_record(path: Path, record: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")


def read_record(path: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def origin(record: dict[str, Any]) -> str:
    """Where and when a record was made, and of which sources."""
    machine = record.get("gpu") or f"{record['cpu']}, {record['threads']} threads"
    return (
        f"{machine}, torch {record['versions']['torch']}, {record['date']}, "
        f"sources {record['digest'][:12]}"
    )
