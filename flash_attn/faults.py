"""What a GPU has found wrong with index tensors that nobody has read on the host."""

from __future__ import annotations

import torch

from flash_attn import _native


def check_device(device: torch.device | str | int | None = None) -> None:
    """Waits for a GPU, and raises what its kernels have found wrong since the last fault.

    On a GPU a call does not read the contents of ``cu_seqlens``, ``cache_seqlens``, a block table
    and the like on the host, since that would make it wait. The kernels keep inside the tensors
    whatever these hold, and note one entry that leads outside. A later call on that GPU raises it,
    this one at once. A call that runs inside a CUDA graph is covered by each replay.

    With the environment variable FLASH_ATTN_CHECK=1 each call reads its index tensors, waits, and
    refuses by itself.

    Args:
        device: a GPU; None: the current one. The CPU, where each call refuses by itself, is fine.

    Raises:
        RuntimeError: names the call, the tensor, the entry, what it holds, and the rule.
    """
    if device is None or isinstance(device, int):
        if not torch.cuda.is_available():
            return
        device = torch.device("cuda", torch.cuda.current_device() if device is None else device)
    device = torch.device(device)
    if device.type != "cuda":
        return
    torch.cuda.synchronize(device)
    index = torch.cuda.current_device() if device.index is None else device.index
    _native.check_device(index)
