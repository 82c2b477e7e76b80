"""One pruning run in a process of its own, so that its memory is its own: ``python -m benchmarks.comp_machine_child``.

``comp`` is COMP from folder to folder. ``taylor`` is what LLM-Pruner does on a CPU, as its manual says: the whole model
in float32, the gradients of the loss with respect to all weights, then scores of groups and slicing; on CUDA in half
precision, as its script has it. Its result is not even written. Both have the allocator as it comes, and none of its
settings.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_edge.seeding import torch_rng

ROOT = Path(__file__).resolve().parent.parent


def in_fresh_process(settings: Mapping[str, Any], threads: int) -> dict[str, float]:
    """Run one of :data:`RUNS` with its arguments, and return what it measured.

    Returns
    -------
    dict
        ``peak_mb``, the largest resident memory of the process by the kernel's count (VmHWM), interpreter and imports
        included; ``above_mb``, the same above what was resident after the imports; ``seconds``; on CUDA ``device_mb``,
        the allocator's peak; and what the run itself returns. Megabytes are 1e6 bytes.

    Raises
    ------
    RuntimeError
        The process has failed.
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command = [sys.executable, "-m", "benchmarks.comp_machine_child", json.dumps(settings)]
    environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the pruning process has ended with status {done.returncode}: {done.stderr[-2000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def tokens_of(folder: Path, sequences: int, length: int, seed: int) -> Tensor:
    """Return random calibration tokens (sequences, length)."""
    words = json.loads((folder / "config.json").read_bytes())["vocab_size"]
    return torch.randint(words, (sequences, length), generator=torch_rng(seed, "calibration"))


def run_comp(
    folder: str, out: str, faithful: bool, ratio: float, sequences: int, length: int, seed: int, device: str
) -> dict[str, float]:
    """Prune by COMP; return bytes, and how far what remains of the decoder is from the target, as a part of it."""
    from fl_edge.comp.config import CompConfig
    from fl_edge.comp.config import faithful as bare
    from fl_edge.comp.local import TextSource
    from fl_edge.comp.outline import Sizes
    from fl_edge.comp.run import prune_checkpoint
    from fl_edge.comp.state import run_key
    from fl_edge.comp.workbench import Workbench

    config = CompConfig(ratio=ratio)
    config = bare(config) if faithful else config
    tokens, totals = tokens_of(Path(folder), sequences, length, seed), list[int]()

    def source_of(bench: Workbench) -> TextSource:
        totals.append(Sizes(bench).total)
        return TextSource(bench, tokens, config.target)

    key = run_key(Path(folder), config, tokens)
    result = prune_checkpoint(Path(folder), Path(out), config, source_of, key=key, device=torch.device(device))
    (total,) = totals
    off = abs((total - (result.before - result.after)) / ((1 - ratio) * total) - 1)
    return {"off": off, "read_gb": result.bytes_read / 1e9, **_written()}


def run_taylor(folder: str, ratio: float, sequences: int, length: int, seed: int, device: str) -> dict[str, float]:
    """Prune by LLM-Pruner's rule, in place; return how far what remains is from the target."""
    import transformers

    from benchmarks.comp_peers_cut import even_plan
    from benchmarks.comp_peers_taylor import taylor_scores
    from fl_edge.pruning import members, prune

    dtype = torch.float32 if device == "cpu" else torch.float16
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    model = model.to(device)
    before = _decoder_size(model)
    tokens = tokens_of(Path(folder), sequences, length, seed).to(device)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    with torch.no_grad():
        slopes = {f"{each.path}": model.get_parameter(f"{each.path}.weight").grad for each in members(model)}
        count = model.config.num_hidden_layers
        scores = taylor_scores(model, slopes, {}, by_vector=False, per_parameter=False)
        open_to = range(count // 8, count - count // 16)  # of 32 layers the script leaves out 4 and 2
        plan = even_plan(model, scores, ratio, "floor", open_to)
        del slopes, scores
        model.zero_grad(set_to_none=True)
        prune(model, plan)
    return {"off": abs(_decoder_size(model) / ((1 - ratio) * before) - 1)}


def _decoder_size(model: Any) -> int:
    return sum(parameter.numel() for parameter in model.model.layers.parameters())


RUNS: Mapping[str, Callable[..., dict[str, float]]] = {"comp": run_comp, "taylor": run_taylor}


def _warm(device: str) -> None:
    """Load what a first step loads, on both sides: kernels, the model's classes."""
    import transformers

    import benchmarks.comp_peers_taylor  # noqa: F401
    import fl_edge.comp.run  # noqa: F401

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=16
    )
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    ids = torch.zeros(1, 4, dtype=torch.int64, device=device)
    model(input_ids=ids, labels=ids).loss.backward()


def _resident(field: str) -> float:
    """Return a field of the kernel's account of this process, MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"the kernel does not say {field}")


def _written() -> dict[str, float]:
    """Return what this process has written so far, where a run stands after each layer included."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {"written_gb": int(fields["wchar"]) / 1e9}


def main(settings: dict[str, Any]) -> dict[str, float]:
    """Run in this process, and return what :func:`in_fresh_process` does."""
    run, device = RUNS[settings.pop("run")], settings["device"]
    _warm(device)
    gc.collect()
    imported, started = _resident("VmRSS"), time.perf_counter()
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    found = run(**settings)
    seconds, peak = time.perf_counter() - started, _resident("VmHWM")
    found |= {"seconds": seconds, "peak_mb": peak, "above_mb": peak - imported}
    return found if device == "cpu" else found | {"device_mb": torch.cuda.max_memory_allocated() / 1e6}


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
