"""Medusa's heads for the models of :mod:`benchmarks.hat_models`, from the adapter's lessons and by its course.

Of learning rates from 0.005 to 0.04 the adapter's own, 0.02, gave them the longest accept length on other prompts.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.hat_models import FAMILIES, LESSONS, course, device_model, lessons, model_folder
from fl_edge.data.once import content_key, made_once
from fl_edge.hat.medusa import MedusaHeads, load_heads, new_heads, save_heads
from fl_edge.hat.medusa_training import train_heads
from fl_edge.hat.split import DeviceModel

_FORM = 1  # raised when the same settings give other heads


def heads_file(family: str, quick: bool = False) -> Path:
    """Return the file of a model's heads; trained at the first use, in a few minutes."""
    folder, plan = model_folder(family, quick), course(family, quick)

    def make(into: Path) -> None:
        print(f"training Medusa's heads of {family}, {plan.steps} steps, once on this machine ...", flush=True)
        device = device_model(family, quick)
        heads = new_heads(device)
        train_heads(heads, device, lessons(family, quick), plan, 0)
        save_heads(heads, device, into / "heads.safetensors")

    key = content_key(_FORM, "medusa", folder.name, FAMILIES[family].shallow, LESSONS[family], plan)
    return made_once("hat", key, make, f"Medusa's heads of {family}") / "heads.safetensors"


def heads_for(family: str, device: DeviceModel, quick: bool = False) -> MedusaHeads:
    """Return the trained heads, frozen, in the type of the device's part."""
    return load_heads(heads_file(family, quick), device)
