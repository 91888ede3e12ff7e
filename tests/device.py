"""The device that the suite runs on, and what its kernels take.

FLASH_ATTN_TEST_DEVICE names it: cpu unless told otherwise, cuda in `make gpu-test`. Tests make
their tensors there by saying so (`device=DEVICE`); nothing sets PyTorch's default device, so that a
kernel or a check that mixes devices shows.
"""

import os

import torch

DEVICE = torch.device(os.environ.get("FLASH_ATTN_TEST_DEVICE", "cpu"))
ON_GPU = DEVICE.type == "cuda"

DTYPES = (torch.float32, torch.float16, torch.bfloat16)[1 if ON_GPU else 0 :]
FINEST = DTYPES[0]  # for tests that are about something else than a dtype
WIDEST = torch.bfloat16 if ON_GPU else torch.float32  # with float32's exponents

BLOCK = 64  # keys a block
# Keys a segment from each position on.
LADDER = {0: 1024, 16384: 2048, 65536: 4096} if ON_GPU else {0: 512, 16384: 1024, 65536: 4096}
SEGMENT = LADDER[0]


def page_size(wanted: int) -> int:
    """`wanted` keys a page; on a GPU the next multiple of 16, as much as a copy takes along."""
    return -(-wanted // 16) * 16 if ON_GPU else wanted
