"""The cloud under 16 devices, of :mod:`benchmarks.hat`: verification rows a second, against the bare batched forward.

Ours is all that the cloud does with 16 uploads: admission, the batch, its forward, sixteen answers. The bare forward is
the middle submodel with transformers' own attention and caches on the same rows in one tensor, without rolling back.
*equal* is the strictest: 4 rows and a history of 300 for all, so that nothing has to be padded. *unequal* has 2 to 7
rows behind 100 to 500, as devices come; the bare forward pads there, as transformers does. Both give the same numbers,
which is checked. Ours and bare take turns; the ratio is the median over pairs.

The batch is the cloud's part of TBT; its part of TTFT is a prompt of 512 tokens that comes as one upload.
"""

from __future__ import annotations

import copy
import functools
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from benchmarks.hat_models import LLAMA, middle_model
from benchmarks.hat_rooms import make_cloud
from fl_edge.hat.cloud import Cloud, Refusal
from fl_edge.hat.messages import Answer, Upload
from fl_edge.hat.split import MiddleModel
from fl_edge.seeding import torch_rng

DEVICE = torch.device(os.environ.get("FL_EDGE_DEVICE", "cpu"))
DEVICES, CAPACITY = 16, 1024
PAIRS, QUICK_PAIRS = 30, 6
PROMPT, PROMPTS = 512, 5  # tokens, and how many one after the other
LOADS = ("equal", "unequal")


@dataclass(frozen=True)
class Shape:
    """A middle submodel of random weights.

    Attributes
    ----------
    layers, width, channels, heads, groups
        ``layers`` are those in the cloud.
    """

    layers: int
    width: int
    channels: int
    heads: int
    groups: int


SMALL = "trained Llama"
SHAPES = {"4 layers of 1024": Shape(4, 1024, 2736, 16, 16)}
if DEVICE.type == "cuda":
    SHAPES = {"7B": Shape(30, 4096, 11008, 32, 32), "13B": Shape(37, 5120, 13824, 40, 40)}
MODELS = (SMALL, *SHAPES)


def cloud_case(model: str, load: str) -> str:
    """Return what the table calls a measurement."""
    return f"cloud: {model}, {DEVICES} devices, {load}"


def measure_cloud(model: str, load: str, quick: bool) -> dict[str, Any]:
    """Return rows a second of the cloud and of the bare forward, and the median of their ratios."""
    middle = middle_model(LLAMA, quick, device=DEVICE) if model == SMALL else random_middle(model)
    counts, bases = _load(load)
    generator = torch_rng(0, "cloud", model, load)
    width = middle.config.hidden_size
    histories = [torch.randn(base, width, generator=generator) for base in bases]
    rows = [torch.randn(count, width, generator=generator) for count in counts]
    bare = bare_forward(middle, histories, rows)
    before = _allocated()
    cloud = make_cloud(copy.deepcopy(middle), DEVICES + 1, capacity=CAPACITY)
    for device, history in enumerate(histories):
        cloud.submit(str(device), Upload(1, 0, history, verify=False), 0.0)
    _answers(cloud)
    uploads = [Upload(1, base, each) for base, each in zip(bases, rows, strict=True)]

    def ours() -> list[Tensor]:
        for device, upload in enumerate(uploads):
            cloud.submit(str(device), upload, 0.0)
        return _answers(cloud)

    apart = max(
        float((mine.float() - theirs.float().cpu()).abs().max()) for mine, theirs in zip(ours(), bare(), strict=True)
    )
    prompt = torch.randn(PROMPT, width, generator=generator)

    def read() -> None:
        cloud.submit("newcomer", Upload(1, 0, prompt, verify=False), 0.0)
        _run(cloud)
        cloud.end("newcomer", 1)

    times = [(_seconds(ours), _seconds(bare)) for _ in range(QUICK_PAIRS if quick else PAIRS)]
    found = {
        "rows": sum(counts),
        "ours_ms": 1e3 * statistics.median(mine for mine, _ in times),
        "bare_ms": 1e3 * statistics.median(theirs for _, theirs in times),
        "rows_s": sum(counts) / statistics.median(mine for mine, _ in times),
        "of_bare": statistics.median(theirs / mine for mine, theirs in times),
        "prompt_ms": 1e3 * statistics.median(_seconds(read) for _ in range(PROMPTS)),
        "apart": apart,
    }
    return found if DEVICE.type == "cpu" else found | {"device_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}


def _load(load: str) -> tuple[list[int], list[int]]:
    """Return rows and history of each device."""
    if load == "equal":
        return [4] * DEVICES, [300] * DEVICES
    generator = torch_rng(0, "load")
    counts = torch.randint(2, 8, (DEVICES,), generator=generator).tolist()
    return counts, torch.randint(100, 501, (DEVICES,), generator=generator).tolist()


@functools.lru_cache(1)
def random_middle(model: str) -> MiddleModel:
    """Return a middle submodel of random weights; on CUDA in bfloat16."""
    import transformers

    shape = SHAPES[model]
    config = transformers.LlamaConfig(
        vocab_size=8,
        hidden_size=shape.width,
        intermediate_size=shape.channels,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.groups,
        max_position_embeddings=4096,
        dtype=torch.bfloat16 if DEVICE.type == "cuda" else torch.float32,
    )
    with torch.random.fork_rng(), DEVICE:
        torch.manual_seed(0)
        body: Any = transformers.AutoModel.from_config(config)  # type: ignore[no-untyped-call]
    body.embed_tokens, body.norm = None, nn.Identity()
    return MiddleModel(body.eval().requires_grad_(False), 2, 0)


def bare_forward(
    middle: MiddleModel, histories: Sequence[Tensor], rows: Sequence[Tensor]
) -> Callable[[], list[Tensor]]:
    """Return what runs the rows behind their histories as one padded batch, by transformers alone."""
    body, dtype = middle.body, next(middle.parameters()).dtype
    alone = [DynamicCache() for _ in histories]
    for cache, history in zip(alone, histories, strict=True):
        middle(history[None].to(DEVICE, dtype), cache)
    longest, most = max(map(len, histories)), max(map(len, rows))
    padded = torch.stack([nn.functional.pad(each, (0, 0, 0, most - len(each))) for each in rows]).to(DEVICE, dtype)
    lengths = torch.tensor([len(each) for each in histories], device=DEVICE)
    positions = lengths[:, None] + torch.arange(most, device=DEVICE)
    there = torch.arange(longest + most, device=DEVICE) >= (longest - lengths)[:, None]
    mask = None if bool(there.all()) else there.long()
    joint = DynamicCache()
    joint.layers = [_InPlace(alone, layer, longest, most) for layer in range(len(body.layers))]

    def run() -> list[Tensor]:
        found = middle(padded, joint, positions, attention_mask=mask)
        return [found[place, : len(each)] for place, each in enumerate(rows)]

    return run


class _InPlace(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer's histories, padded in front; new rows always go to the same place behind them.

    transformers' own layer copies the whole history at every step, which would make the comparison too easy.
    """

    def __init__(self, caches: Sequence[DynamicCache], layer: int, longest: int, most: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.longest, self.whole = longest, list[Tensor]()
        for side in ("keys", "values"):
            parts = [getattr(each.layers[layer], side) for each in caches]
            padded = [nn.functional.pad(part, (0, 0, longest - part.shape[2], most)) for part in parts]
            self.whole.append(torch.cat(padded))

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        for whole, new in zip(self.whole, (key_states, value_states), strict=True):
            whole[:, :, self.longest :] = new
        keys, values = self.whole
        return keys, values

    def get_seq_length(self) -> int:
        return self.longest

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.longest + query_length, 0


def _answers(cloud: Cloud) -> list[Tensor]:
    found = _run(cloud)
    return [found[str(device)] for device in range(DEVICES)]


def _run(cloud: Cloud) -> dict[str, Tensor]:
    """Run all that waits; return the rows of each answer by device."""
    found: dict[str, Tensor] = {}
    while cloud.waiting:
        for device, answer in cloud.step(0.0):
            assert isinstance(answer, Answer), answer.reason if isinstance(answer, Refusal) else answer
            found[device] = answer.rows
    return found


def _allocated() -> int:
    """Return the bytes on the accelerator that are in use, from where the peak is counted."""
    if DEVICE.type == "cpu":
        return 0
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _seconds(run: Callable[[], object]) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begun
