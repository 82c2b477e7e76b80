"""Where a model computes."""

from __future__ import annotations

import torch

from fl_edge.errors import ConfigError


def find_accelerator(name: str) -> str:
    """Return a device of torch that is there: for "auto" a CUDA device where torch sees one, else the CPU.

    Raises
    ------
    ConfigError
        A device that torch does not know or does not see.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, ValueError) as error:  # torch built without CUDA asserts
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"accelerator={name} cannot be used: {reason}; auto takes what is there") from None
    return name
