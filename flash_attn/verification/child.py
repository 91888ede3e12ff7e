"""The same problems in a new process, under a chosen instruction set."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .engines import ENGINES, Engine, Results
from .problem import Problem

ISA_VARIABLE = "FLASH_ATTN_CPU_ISA"


def instruction_sets(device: str) -> list[str]:
    """What this machine can run, weakest first; "" means that there is nothing to choose."""
    if torch.device(device).type != "cpu":
        return [""]
    capability = torch.backends.cpu.get_cpu_capability()
    stronger = {"AVX2": ["avx2"], "AVX512": ["avx2", "avx512"]}.get(capability, [])
    return ["generic", *stronger]


def results(engine: Engine, problems: list[Problem]) -> list[list[Results]]:
    """Forward and gradients of every problem, here."""
    everything = []
    for problem in problems:
        sequences = problem.sequences()
        everything.append(engine.forward(problem, sequences, "varlen"))
        everything.append(engine.gradients(problem, sequences, "varlen"))
    return everything


def results_of_child(
    engine: Engine, problems: list[Problem], instruction_set: str
) -> list[list[Results]]:
    """The same, computed by a new Python process."""
    environment = dict(os.environ, PYTHONPATH=os.pathsep.join(p for p in sys.path if p))
    if instruction_set:
        environment[ISA_VARIABLE] = instruction_set
    with tempfile.TemporaryDirectory() as folder:
        request, reply = Path(folder, "request"), Path(folder, "reply")
        request.write_bytes(pickle.dumps((engine.name, problems)))
        code = f"from {__name__} import answer; answer()"
        subprocess.run(
            [sys.executable, "-c", code, str(request), str(reply)], env=environment, check=True
        )
        return torch.load(reply, weights_only=True)  # type: ignore[no-any-return]


def answer() -> None:
    """In the child: read the request named by the first argument, write tensors to the second."""
    name, problems = pickle.loads(Path(sys.argv[1]).read_bytes())
    torch.save(results(ENGINES[name], problems), sys.argv[2])
