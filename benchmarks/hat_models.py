"""The models that :mod:`benchmarks.hat` splits: three families and an adapter, trained here, and prompts for them.

They continue the standard library's source. Every eighth file is kept from models and adapters alike; prompts are from
those. What is trained is kept on disk under a name that holds the settings.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_edge.data.once import content_key, made_once
from fl_edge.data.sources import STANDARD_LIBRARY, source_files, version
from fl_edge.hat.adapter import Adapter, load_adapter, new_adapter, save_adapter
from fl_edge.hat.distillation import Course, Lessons, teach, train
from fl_edge.hat.split import DeviceModel, MiddleModel, load_device, load_middle
from fl_edge.models.pretraining import Batch, initialise, pretrain
from fl_edge.models.quiet import quiet
from fl_edge.models.vocabulary import decoder_tokenizer
from fl_edge.seeding import torch_rng

_FORM = 1  # raised when the same settings give another model
_KEPT = 8  # every so manieth file is for prompts alone
_GENERATED = "gencodec.py"  # made the standard library's tables of characters, which are nearly all the same
_VOCABULARY = 512  # few tokens, so that models this small are about as sure of the next as large ones are
_POSITIONS = 2048
_QUICK = 5  # times fewer steps
_AT_ONCE = 64  # texts that a model goes on with
CPU = torch.device("cpu")


@dataclass(frozen=True)
class Recipe:
    """Shape and training of a model.

    Attributes
    ----------
    shallow
        m, layers on the device.
    layers, window, tied
        In all; positions that a layer sees, 0 for all; whether the head is the embedding.
    length, batch_size, steps
        Tokens of a sequence, sequences of a step, and steps of the training.
    """

    shallow: int
    layers: int
    window: int
    tied: bool
    length: int
    batch_size: int
    steps: int
    width: int = 128
    heads: int = 4
    groups: int = 2
    channels: int = 384
    rate: float = 3e-3
    muon: float = 0.02


FAMILIES = {
    "llama": Recipe(1, 6, 0, True, length=1152, batch_size=2, steps=1500),  # for prompts of about 1000 tokens
    "mistral": Recipe(1, 4, 128, False, length=512, batch_size=4, steps=600),
    "qwen3": Recipe(1, 4, 0, True, length=512, batch_size=4, steps=600),
}
LLAMA = "llama"
# what adapters and Medusa's heads learn from: sequences, tokens at the end of each that are the model's own, and steps
LESSONS = {"llama": (1024, 128, 2400), "mistral": (256, 256, 600), "qwen3": (256, 256, 600)}


def course(family: str, quick: bool) -> Course:
    """Return how adapters and Medusa's heads are trained."""
    steps = LESSONS[family][2] // (_QUICK if quick else 1)
    return Course(steps, batch_size=4, rate=2e-2, token_weight=1.0)


@functools.cache
def model_folder(family: str, quick: bool = False) -> Path:
    """Return the folder of a model and its tokenizer; trained at the first use, the Llama in about ten minutes."""
    recipe = FAMILIES[family]
    steps = recipe.steps // _QUICK if quick else recipe.steps

    def make(folder: Path) -> None:
        _tokenizer().save_pretrained(folder)
        print(f"training {family}, {steps} steps, once on this machine ...", flush=True)
        with quiet():
            _train(family, recipe, steps).save_pretrained(folder)

    return made_once("hat", content_key(_FORM, family, recipe, steps, _text_key()), make, f"the benchmark's {family}")


def device_model(
    family: str, quick: bool = False, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> DeviceModel:
    """Return what a device holds of a model."""
    return load_device(model_folder(family, quick), FAMILIES[family].shallow, device, dtype)


def middle_model(
    family: str, quick: bool = False, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> MiddleModel:
    """Return what the cloud holds of a model."""
    return load_middle(model_folder(family, quick), FAMILIES[family].shallow, device, dtype)


def whole_model(
    family: str, quick: bool = False, dtype: torch.dtype = torch.float32, device: torch.device = CPU
) -> Any:
    """Return the unsplit model as transformers loads it, frozen; no token ends a text."""
    from transformers import AutoModelForCausalLM

    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(model_folder(family, quick), dtype=dtype)
    model.generation_config.eos_token_id = None
    return model.to(device).eval().requires_grad_(False)


def adapter_file(family: str, quick: bool = False) -> Path:
    """Return the file of a model's adapter; trained at the first use, in a few minutes."""
    folder = model_folder(family, quick)
    plan = course(family, quick)

    def make(into: Path) -> None:
        print(f"training the adapter of {family}, {plan.steps} steps, once on this machine ...", flush=True)
        device = device_model(family, quick)
        adapter = new_adapter(device, torch_rng(0, "adapter", family))
        train(adapter, device, lessons(family, quick), plan, 0)
        save_adapter(adapter, device, into / "adapter.safetensors")

    key = content_key(_FORM, folder.name, FAMILIES[family].shallow, LESSONS[family], plan)
    return made_once("hat", key, make, f"the adapter of {family}") / "adapter.safetensors"


def adapter_for(family: str, device: DeviceModel, quick: bool = False) -> Adapter:
    """Return the trained adapter, frozen, in the type of the device's part."""
    return load_adapter(adapter_file(family, quick), device)


def lessons(family: str, quick: bool = False) -> Lessons:
    """Return what adapters and Medusa's heads learn from: texts, and what the model makes of them."""
    return teach(device_model(family, quick), middle_model(family, quick), lesson_tokens(family, quick), batch_size=4)


@functools.cache
def lesson_tokens(family: str, quick: bool = False) -> Tensor:
    """Return the texts that adapters and Medusa's heads learn from, (sequences, length) int64.

    Text that the model was trained on, and at the end of each what the model goes on with: greedy decoding writes
    otherwise than people do, and its text is what drafts are for.
    """
    tokens, length, (count, own, _) = _tokens("train"), FAMILIES[family].length, LESSONS[family]
    count //= _QUICK if quick else 1
    starts = torch.randint(len(tokens) - length, (count, 1), generator=torch_rng(0, "lessons", family))
    begun, model = tokens[starts + torch.arange(length - own)], whole_model(family, quick)
    return torch.cat([_continued(model, each, length) for each in torch.split(begun, _AT_ONCE)])


def _continued(model: Any, begun: Tensor, length: int) -> Tensor:
    """Return texts (s, n) with what a model goes on with, (s, length)."""
    whole: Tensor = model.generate(begun, attention_mask=torch.ones_like(begun), max_length=length, do_sample=False)
    return whole


def prompts(count: int, shortest: int, longest: int, seed: int = 0) -> list[Tensor]:
    """Return stretches of files that nothing was trained on; lengths are drawn evenly from a range.

    Parameters
    ----------
    count
        How many; no two overlap.
    shortest, longest
        Tokens.
    seed
        Another seed gives other stretches of other lengths.

    Returns
    -------
    list of Tensor
        (n,) int64 each.
    """
    tokens, generator = _tokens("prompts"), torch_rng(seed, "prompts", count, shortest, longest)
    places = len(tokens) // longest
    if count > places:
        raise ValueError(f"{count} prompts of up to {longest} tokens are not there; at most {places}")
    chosen = torch.randperm(places, generator=generator)[:count]
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator)
    return [
        tokens[place * longest : place * longest + length].clone()
        for place, length in zip(chosen.tolist(), lengths.tolist(), strict=True)
    ]


def load_tokenizer(family: str, quick: bool = False) -> Any:
    """Return the tokenizer, which is the same for all families."""
    from transformers import AutoTokenizer

    with quiet():
        return AutoTokenizer.from_pretrained(model_folder(family, quick))


def _text_key() -> tuple[object, ...]:
    return version(STANDARD_LIBRARY), _KEPT, _VOCABULARY, _POSITIONS


@functools.cache
def _texts() -> tuple[list[str], list[str]]:
    """Return files to train on, and those for prompts."""
    found = [file.read_text(encoding="utf-8", errors="replace") for file in source_files(STANDARD_LIBRARY)]
    found = [text for text in found if _GENERATED not in text]
    return [text for place, text in enumerate(found) if place % _KEPT], found[::_KEPT]


def _tokenizer() -> Any:
    """Return the tokenizer, made from text to train on at the first use."""
    from transformers import AutoTokenizer

    def make(folder: Path) -> None:
        tokenizer: Any = decoder_tokenizer(_texts()[0], _VOCABULARY)
        tokenizer.model_max_length = 10**9  # files are far longer than what the models read at once
        tokenizer.save_pretrained(folder)

    folder = made_once("hat", content_key(_FORM, "tokenizer", _text_key()), make, "the benchmark's tokenizer")
    with quiet():
        return AutoTokenizer.from_pretrained(folder)


@functools.cache
def _tokens(part: str) -> Tensor:
    """Return all tokens of a part, ``train`` or ``prompts``, (tokens,) int64."""
    tokenizer, (training, kept) = _tokenizer(), _texts()
    rows = tokenizer(training if part == "train" else kept)["input_ids"]
    return torch.tensor(list(chain.from_iterable([*row, tokenizer.eos_token_id] for row in rows)))


def _train(family: str, recipe: Recipe, steps: int) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    end = _tokenizer().eos_token_id
    config = AutoConfig.for_model(
        family,
        vocab_size=_VOCABULARY,
        pad_token_id=end,
        bos_token_id=None,
        eos_token_id=end,
        num_hidden_layers=recipe.layers,
        hidden_size=recipe.width,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.groups,
        head_dim=recipe.width // recipe.heads,
        intermediate_size=recipe.channels,
        max_position_embeddings=_POSITIONS,
        tie_word_embeddings=recipe.tied,
        initializer_range=0.02,
        **({"sliding_window": recipe.window or None} if family == "mistral" else {}),
    )
    with torch.random.fork_rng(devices=[]):
        model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    initialise(model, dict(model.named_parameters()), torch_rng(0, "pretraining", family))
    batches = _stretches(recipe, torch_rng(0, "batches", family))
    pretrain(model, lambda batch: model(**batch).loss, batches, steps, recipe.rate, family, {}, recipe.muon)
    return model


def _stretches(recipe: Recipe, generator: torch.Generator) -> Iterator[Batch]:
    """Yield stretches that begin anywhere, without end."""
    tokens = _tokens("train")
    while True:
        starts = torch.randint(len(tokens) - recipe.length, (recipe.batch_size, 1), generator=generator)
        stretch = tokens[starts + torch.arange(recipe.length)]
        yield {"input_ids": stretch, "labels": stretch}
