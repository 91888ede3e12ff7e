"""Hypothesis profiles, the device, skips with a reason, and a clean process for every test."""

import os

# Two test processes share the cores: a waiting OpenMP thread must not spin. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch
from device import DEVICE, ON_GPU

import flash_attn
from flash_attn import _mode

# The standard mode's plan looks at the number of threads, so tests see the same one everywhere.
# A test of another number sets it itself; the fixture below puts this one back.
TEST_THREADS = 2

# dev: the same few examples every time, so that a change cannot pass or fail by luck.
hypothesis.settings.register_profile(
    "dev", derandomize=True, max_examples=50, deadline=None, print_blob=True
)
# overnight: thousands of new ones; a failure prints the blob that replays it.
hypothesis.settings.register_profile(
    "overnight",
    max_examples=5000,
    deadline=None,
    print_blob=True,
    suppress_health_check=[hypothesis.HealthCheck.too_slow],
)
PROFILE = os.environ.get("FLASH_ATTN_TEST_PROFILE", "dev")

MARKERS = (
    "cpu_only: about the CPU kernels, or about what only the CPU can tell",
    "gpu_sample: 2,000 random problems from fixed seeds; needs FLASH_ATTN_TEST_DEVICE=cuda",
)
# About the tree, its packages and plain PyTorch: the device changes nothing in them, and a machine
# with a GPU need not have the tools that they import.
NOT_ON_GPU = (
    "test_bench_gpu.py",
    "test_bert_padding.py",
    "test_cuda_build.py",
    "test_isa_wall.py",
    "test_notebook.py",
    "test_patches.py",
    "test_project.py",
    "test_wheel.py",
)
collect_ignore = list(NOT_ON_GPU) if ON_GPU else []


def pytest_configure(config):
    for marker in MARKERS:
        config.addinivalue_line("markers", marker)
    if ON_GPU and not torch.cuda.is_available():
        raise pytest.UsageError(f"FLASH_ATTN_TEST_DEVICE={DEVICE}, but PyTorch finds no GPU")
    hypothesis.settings.load_profile(PROFILE)
    torch.set_num_threads(TEST_THREADS)


def pytest_report_header():
    if ON_GPU:
        return f"device: {torch.cuda.get_device_name(DEVICE)}, without {', '.join(NOT_ON_GPU)}"
    return "device: cpu"


def pytest_collection_modifyitems(items):
    on_cpu = pytest.mark.skip(reason="about the CPU alone")
    on_gpu = pytest.mark.skip(reason="needs a GPU and FLASH_ATTN_TEST_DEVICE=cuda")
    by_day = pytest.mark.skip(reason="needs FLASH_ATTN_TEST_PROFILE=overnight")
    for item in items:
        if PROFILE == "overnight":
            item.add_marker(pytest.mark.timeout(0))
        elif "overnight" in item.keywords:
            item.add_marker(by_day)
        if ON_GPU and "cpu_only" in item.keywords:
            item.add_marker(on_cpu)
        if not ON_GPU and not {"gpu", "gpu_sample"}.isdisjoint(item.keywords):
            item.add_marker(on_gpu)


@pytest.fixture(autouse=True)
def process_state():
    """What a test leaves behind must not reach the next one: mode, thread count, generator."""
    default_mode = _mode._process_default  # None: the environment decides
    torch_mode = torch.are_deterministic_algorithms_enabled()
    torch_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.manual_seed(0)
    yield
    if ON_GPU:
        flash_attn.check_device()  # a test that gives a call nonsense asks for the fault itself
    _mode._process_default = default_mode
    torch.use_deterministic_algorithms(torch_mode, warn_only=torch_warn_only)
    torch.set_num_threads(TEST_THREADS)


@pytest.fixture
def contents_are_checked(monkeypatch):
    """What index tensors hold is read on the host, on a GPU as well: there only when asked."""
    monkeypatch.setenv("FLASH_ATTN_CHECK", "1")
