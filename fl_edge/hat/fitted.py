"""Files of trained parts that fit one model and one cut of it: an adapter, Medusa's heads. Nothing is pickled."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from fl_edge.errors import DataError
from fl_edge.files import write_whole
from fl_edge.hat.split import DeviceModel

_FITS = "fits"


def save_fitted(module: nn.Module, device: DeviceModel, file: Path) -> None:
    """Write a module's tensors, and as metadata what they fit, whole or not at all.

    Raises
    ------
    RunFolderError
        The file cannot be written.
    """
    tensors = {name: tensor.detach().contiguous() for name, tensor in module.state_dict().items()}
    write_whole(file, save(tensors, metadata={_FITS: json.dumps(device.identity)}))


def read_fitted(file: Path, device: DeviceModel, what: str) -> dict[str, Tensor]:
    """Return the tensors of :func:`save_fitted`.

    Parameters
    ----------
    what
        It is, with its article, for messages.

    Raises
    ------
    DataError
        No such file, a damaged one, or one for another model or another cut of it.
    """
    try:
        with safe_open(file, "pt") as opened:
            fits = json.loads((opened.metadata() or {})[_FITS])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no mapping
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        noun = what.partition(" ")[2]
        raise DataError(f"{file} is no {noun}, or a damaged one: {type(error).__name__}") from None
    if fits != device.identity:
        told = [key for key, value in device.identity.items() if not isinstance(fits, dict) or fits.get(key) != value]
        raise DataError(f"{file} is {what} of another model: {', '.join(told)} differ")
    return tensors


def fill_fitted(module: nn.Module, tensors: dict[str, Tensor], device: DeviceModel, file: Path, what: str) -> None:
    """Fill a module, and make it ready to draft with: frozen, where the device model is and of its type.

    Raises
    ------
    DataError
        Other tensors than the module's.
    """
    try:
        module.load_state_dict(tensors)
    except RuntimeError:  # its message is a list of all names
        raise DataError(f"{file} does not hold the tensors of {what} of {device.identity['family']}") from None
    module.to(device.device, device.dtype).requires_grad_(False).eval()
