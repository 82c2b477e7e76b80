"""Memory on the device, of :mod:`benchmarks.hat`: its part of a 1.1B-shaped model, against the whole of it.

Each run is a process of its own, with random weights in bfloat16: ``python -m benchmarks.hat_memory``. *device* loads
input and output submodel and an adapter, reads a prompt and drafts behind it; *whole* has transformers load the model
and reads the same prompt. Both then hold caches of it. Which tensors the device reads is listed where they are read
from the files, and how many bytes of them are the middle's.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fl_edge.seeding import torch_rng

DEVICE = torch.device(os.environ.get("FL_EDGE_DEVICE", "cpu"))
ROOT = Path(__file__).resolve().parent.parent
SHAPE, LAYERS, QUICK_LAYERS, SHALLOW = "tinyllama-1.1b", 22, 4, 2
PROMPT, DRAFTS = 512, 6
WHO = ("device", "whole")


def memory_case(who: str) -> str:
    """Return what the table calls a measurement."""
    return f"memory: {SHAPE} shape, {'device with adapter' if who == 'device' else 'whole model'}"


def measure_memory(who: str, quick: bool) -> dict[str, float]:
    """Return the peak of a process above its imports, and the bytes of tensors that it reads, in MB of 1e6 bytes."""
    from benchmarks.comp_machine_files import checkpoint

    folder = checkpoint(SHAPE, QUICK_LAYERS if quick else LAYERS)
    command = [sys.executable, "-m", "benchmarks.hat_memory", json.dumps({"who": who, "folder": str(folder)})]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the process has ended with status {done.returncode}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def run_device(folder: Path) -> dict[str, float]:
    """Load a device's part, read a prompt, draft."""
    from fl_edge.hat.adapter import new_adapter
    from fl_edge.hat.caches import new_cache
    from fl_edge.hat.split import load_device

    read = _listening()
    model = load_device(folder, SHALLOW, DEVICE)
    adapter = new_adapter(model, torch_rng(0, "adapter")).to(model.dtype).requires_grad_(False)
    shallow, adapted = new_cache(), new_cache()
    tokens = _prompt(model.config.vocab_size)
    for _ in range(1 + DRAFTS):
        states = model.embed_and_run(tokens, shallow)
        tokens = model.draft_head(adapter(states, adapted)[:, -1:]).argmax(-1)
    middle = sum(size for name, size in _sizes(folder).items() if name in read and (_layer(name) or 0) >= SHALLOW)
    trained = sum(parameter.numel() for parameter in adapter.parameters())
    return {"read_mb": model.bytes_read / 1e6, "middle_mb": middle / 1e6, "trained": trained}


@torch.no_grad()
def run_whole(folder: Path) -> dict[str, float]:
    """Load the whole model by transformers, read a prompt, generate."""
    import transformers

    loading: Any = transformers.AutoModelForCausalLM.from_pretrained
    model = loading(folder, dtype="auto").to(DEVICE)
    tokens = _prompt(model.config.vocab_size)
    model.generate(tokens, max_new_tokens=DRAFTS, do_sample=False, pad_token_id=0)
    return {"read_mb": sum(_sizes(folder).values()) / 1e6}


def _prompt(vocabulary: int) -> torch.Tensor:
    return torch.randint(vocabulary, (1, PROMPT), generator=torch_rng(0, "prompt")).to(DEVICE)


def _listening() -> set[str]:
    """Return a set that gets the name of every tensor of which anything is read from now on."""
    from fl_edge.models.shards import Shards

    names, plain = set[str](), Shards.read

    def record(self: Shards, name: str, *more: Any, **named: Any) -> torch.Tensor:
        names.add(name)
        return plain(self, name, *more, **named)

    Shards.read = record  # type: ignore[method-assign]
    return names


def _sizes(folder: Path) -> dict[str, int]:
    """Return the bytes of each tensor, as a checkpoint's headers tell."""
    sizes = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                count = torch.Size(opened.get_slice(name).get_shape()).numel()
                sizes[name] = count * torch.finfo(torch.bfloat16).bits // 8
    return sizes


def _layer(name: str) -> int | None:
    """Return the decoder layer that a tensor is of, if any."""
    words = name.split(".")
    return int(words[words.index("layers") + 1]) if "layers" in words else None


def _resident(field: str) -> float:
    """Return a field of the kernel's account of this process, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"the kernel does not say {field}")


RUNS: Mapping[str, Callable[[Path], dict[str, float]]] = {"device": run_device, "whole": run_whole}


def main(who: str, folder: str) -> dict[str, float]:
    """Run in this process, and return what it measured."""
    import transformers

    import fl_edge.hat.adapter
    import fl_edge.hat.split  # noqa: F401

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    config = transformers.LlamaConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    small: Any = transformers.LlamaForCausalLM
    small(config).generate(torch.zeros(1, 4, dtype=torch.int64), max_new_tokens=2, pad_token_id=0)
    imported = _resident("VmRSS")
    found = RUNS[who](Path(folder))
    found["above_mb"] = _resident("VmHWM") - imported
    return found if DEVICE.type == "cpu" else found | {"device_mb": torch.cuda.max_memory_allocated() / 1e6}


if __name__ == "__main__":
    print(json.dumps(main(**json.loads(sys.argv[1]))))
