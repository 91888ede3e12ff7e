"""Hypothesis profiles, skips with a reason, and a clean process for every test."""

import os

# Two test processes share the cores: a waiting OpenMP thread must not spin. Read when torch loads.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import hypothesis
import pytest
import torch

from flash_attn import determinism

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


def pytest_configure():
    hypothesis.settings.load_profile(PROFILE)
    torch.set_num_threads(TEST_THREADS)


def pytest_collection_modifyitems(items):
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    by_day = pytest.mark.skip(reason="needs FLASH_ATTN_TEST_PROFILE=overnight")
    for item in items:
        if PROFILE == "overnight":
            item.add_marker(pytest.mark.timeout(0))
        elif "overnight" in item.keywords:
            item.add_marker(by_day)
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(no_gpu)


@pytest.fixture(autouse=True)
def process_state():
    """What a test leaves behind must not reach the next one: mode, thread count, generator."""
    default_mode = determinism._process_default  # None: the environment decides
    torch_mode = torch.are_deterministic_algorithms_enabled()
    torch_warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.manual_seed(0)
    yield
    determinism._process_default = default_mode
    torch.use_deterministic_algorithms(torch_mode, warn_only=torch_warn_only)
    torch.set_num_threads(TEST_THREADS)
