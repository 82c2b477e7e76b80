"""Peak memory of a LoRA training step, in a process of its own: ``python -m benchmarks.pruning_memory ...``.

On the CPU it is the kernel's own count of resident memory: its peak is reset after a first step, so that neither
imports nor the making of the model count, and what the process held before the model is subtracted. On CUDA it is the
allocator's peak.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from benchmarks.pruning_models import SHAPES, TINY, build, uneven_plan
from fl_edge.pruning import members, prune

ROOT = Path(__file__).resolve().parent.parent
RANK = 8


def measure_memory(name: str, ratio: float, seed: int, device: str) -> dict[str, float]:
    """Return ``peak_mib`` of a training step with adapters on every prunable map, weights included, and ``trained``."""
    # freed blocks go back to the kernel at once: what glibc keeps for later is not what a step needs
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "benchmarks.pruning_memory", name, str(ratio), str(seed), device]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the training process has ended with status {done.returncode}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def training_peak(name: str, ratio: float, seed: int, device: str) -> dict[str, float]:
    """Train a few steps in this process, and return what :func:`measure_memory` does."""
    import peft

    shape = SHAPES.get(name, TINY)
    _step(nn.Linear(8, 8).to(device), {"input": torch.ones(2, 8, device=device)})  # what a first backward loads
    before = _resident("VmRSS") if device == "cpu" else 0.0
    backbone = build(name, device)
    prune(backbone, uneven_plan(backbone, ratio, np.random.default_rng(seed)))
    config = peft.LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=[each.path for each in members(backbone)])
    model: Any = peft.get_peft_model(backbone, config).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(5, model.config.vocab_size, (shape.batch, shape.length), device=device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for step in range(4):
        if step == 1:
            _reset_peak(device)
        _step(model, inputs, optimizer)
    peak = _resident("VmHWM") if device == "cpu" else torch.cuda.max_memory_allocated() / 2**20
    return {"peak_mib": peak - before, "trained": float(sum(parameter.numel() for parameter in trained))}


def _step(model: nn.Module, inputs: dict[str, Any], optimizer: torch.optim.Optimizer | None = None) -> None:
    output = model(**inputs)
    output = output if isinstance(output, torch.Tensor) else output[0]
    output.float().square().mean().backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _resident(field: str) -> float:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) / 1024


def _reset_peak(device: str) -> None:
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")
    else:
        torch.cuda.reset_peak_memory_stats()


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    torch.set_num_threads(1)
    print(json.dumps(training_peak(sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
