"""A measurement in a process of its own, which prints its answer as the last line, in JSON."""

from __future__ import annotations

import json
import subprocess
from typing import Any


def answer_of(command: list[str], what: str) -> Any:
    """What the command answers. SystemExit with the end of its error output where it fails."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{what}: {done.stderr.strip()[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])
