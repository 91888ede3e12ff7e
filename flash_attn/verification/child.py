"""The same problems in a new process, under a chosen instruction set."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from .engines import ENGINES, Engine
from .layouts import Results
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


def results_of_children(
    engine: Engine, problems: list[Problem], instruction_sets: list[str]
) -> list[list[list[Results]]]:
    """The same, computed by one new Python process for each instruction set, side by side."""
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder, "request")
        request.write_bytes(pickle.dumps((engine.name, problems)))
        replies = [Path(folder, f"reply{index}") for index in range(len(instruction_sets))]
        children = [
            start_python(
                f"from {__name__} import answer; answer()",
                [str(request), str(reply)],
                {ISA_VARIABLE: isa} if isa else {},
            )
            for isa, reply in zip(instruction_sets, replies, strict=True)
        ]
        for child in children:
            output_of(child)
        return [torch.load(reply, weights_only=True) for reply in replies]


def answer() -> None:
    """In the child: read the request named by the first argument, write tensors to the second."""
    name, problems = pickle.loads(Path(sys.argv[1]).read_bytes())
    torch.save(results(ENGINES[name], problems), sys.argv[2])


def start_python(
    code: str, arguments: list[str], variables: dict[str, str]
) -> subprocess.Popen[str]:
    """A Python process that imports what this one can import."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        env={**environment, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process: subprocess.Popen[str]) -> str:
    """What it printed; RuntimeError with its error output when it failed."""
    printed, errors = process.communicate()
    if process.returncode:
        raise RuntimeError(f"a verification process ended with {process.returncode}:\n{errors}")
    return printed
