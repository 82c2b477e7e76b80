"""What a process has used of memory, and giving back what it has freed."""

from __future__ import annotations

import ctypes
import resource
import sys
from pathlib import Path

import torch

_STATUS = Path("/proc/self/status")
_MALLOC_TRIM = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None


def peak_bytes(device: torch.device) -> dict[str, int]:
    """Return the largest resident memory of this process so far, and the largest use of a CUDA device, bytes."""
    found = {"resident": _resident()}
    if device.type == "cuda":
        found["device"] = torch.cuda.max_memory_allocated(device)
    return found


def trim() -> None:
    """Give freed memory back to the system, where the C library is glibc, which would keep much of it for later."""
    if (give := _MALLOC_TRIM) is not None:
        give(0)


def _resident() -> int:
    if _STATUS.exists():  # what getrusage says includes the process that started this one
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
