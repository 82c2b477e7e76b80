"""The small language models, pretrained once on a machine on the text of installed libraries.

The encoder learns to tell from which package a docstring comes, decoders to continue the standard library's source.
None sees a library that is a class of :mod:`fl_edge.data.docstrings` or a category of
:mod:`fl_edge.data.instructions`. *Ours*; see :mod:`fl_edge.models.pretraining`.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fl_edge.data.docstrings import clean, distinct
from fl_edge.data.once import content_key, made_once
from fl_edge.data.sources import STANDARD_LIBRARY, documented, installed, source_files, version
from fl_edge.data.tokens import batches
from fl_edge.errors import ConfigError
from fl_edge.models.embedding import word_vectors
from fl_edge.models.pretraining import Batch, initialise, pretrain, weights_digest
from fl_edge.models.quiet import quiet
from fl_edge.models.vocabulary import decoder_tokenizer, encoder_tokenizer
from fl_edge.seeding import torch_rng

if TYPE_CHECKING:
    from transformers import PreTrainedModel

log = logging.getLogger("flwr.fl_edge")

_FORM = 1  # raised when the same recipe gives another model
_SEED = 0
_FEWEST_WORDS = 6
_VECTOR_SCALE = 0.3  # of word vectors beside an encoder's positions, which start at 0.05
_VECTOR_RATE = 5.0  # learning rate of an encoder's word vectors over that of the rest


@dataclass(frozen=True)
class Recipe:
    """Shape and training of a small model.

    Attributes
    ----------
    family
        ``bert`` (an encoder), ``llama`` or ``qwen3`` (decoders).
    libraries
        Whose text it is trained on; those that are not installed are left out.
    vocabulary
        Most tokens.
    layers, width, heads, groups, channels
        Shape; ``groups`` are key/value heads, ``channels`` is the width of the FFN.
    positions
        Longest input; a decoder is trained on inputs of a quarter of it.
    steps, batch_size, rate
        Of the training.
    muon
        Learning rate of Muon for a decoder's matrices, which get more of few steps by it; 0: AdamW's.
    least
        Texts that a package must have for an encoder to learn it; a decoder reads so many thousand characters.
    """

    family: str
    libraries: tuple[str, ...]
    vocabulary: int
    layers: int
    width: int
    heads: int
    groups: int
    channels: int
    positions: int
    steps: int
    batch_size: int
    rate: float
    muon: float
    least: int


_PUBLIC = (STANDARD_LIBRARY, "sympy", "networkx", "matplotlib", "ray", "flwr", "datasets", "PIL")
SMALL_MODELS = {
    "small-bert": Recipe("bert", _PUBLIC, 4096, 4, 128, 4, 4, 512, 128, 300, 32, 1e-3, 0.0, 40),
    "small-llama": Recipe("llama", (STANDARD_LIBRARY,), 2048, 4, 128, 4, 2, 384, 512, 400, 16, 3e-3, 0.02, 4000),
    "deep-llama": Recipe("llama", (STANDARD_LIBRARY,), 2048, 8, 128, 4, 4, 384, 512, 3000, 16, 3e-3, 0.0, 8000),
    "deep-qwen": Recipe("qwen3", (STANDARD_LIBRARY,), 2048, 8, 128, 8, 4, 384, 512, 3000, 16, 3e-3, 0.0, 8000),
}


def small_model(name: str, steps: int = 0) -> Path:
    """Return the folder of a small model and its tokenizer; pretrained at the first use.

    That takes a minute or two, for the deep ones, which are for benchmarks, half an hour.

    Parameters
    ----------
    name
        One of ``SMALL_MODELS``.
    steps
        Of the pretraining; 0 for the recipe's own number.

    Raises
    ------
    ConfigError
        A model that is not there.
    """
    if name not in SMALL_MODELS:
        raise ConfigError(f"name={name} is not allowed; it must be one of {', '.join(SMALL_MODELS)}")
    recipe = SMALL_MODELS[name]
    recipe = replace(recipe, steps=steps or recipe.steps, libraries=tuple(filter(installed, recipe.libraries)))
    key = content_key(_FORM, recipe, [version(library) for library in recipe.libraries])

    def make(folder: Path) -> None:
        log.info("pretraining %s on the text of %s, once on this machine", name, ", ".join(recipe.libraries))
        with quiet():
            model = (_encoder if recipe.family == "bert" else _decoder)(recipe, name, folder)
            model.save_pretrained(folder)
        log.info("pretrained %s, weights %s, in %s", name, weights_digest(model), folder.with_name(key))

    return made_once("models", key, make, f"the model {name}")


def _encoder(recipe: Recipe, name: str, folder: Path) -> PreTrainedModel:
    import datasets  # noqa: PLC0415 - heavy
    from transformers import BertConfig, BertForSequenceClassification  # noqa: PLC0415 - heavy

    topics, texts = _topics(recipe)
    tokenizer = encoder_tokenizer(texts, recipe.vocabulary)
    tokenizer.model_max_length = recipe.positions
    tokenizer.save_pretrained(folder)
    tokens = tokenizer(texts, truncation=True, return_token_type_ids=False)["input_ids"]
    counts = Counter(topics)
    names = sorted(topic for topic, count in counts.items() if count >= recipe.least)
    known = [row for row, topic in enumerate(topics) if topic in names]
    rows = datasets.Dataset.from_dict(
        {
            "input_ids": [tokens[row] for row in known],
            "attention_mask": [[1] * len(tokens[row]) for row in known],
            "labels": [names.index(topics[row]) for row in known],
        }
    )
    settings = BertConfig(
        vocab_size=len(tokenizer),
        pad_token_id=tokenizer.pad_token_id,
        num_hidden_layers=recipe.layers,
        hidden_size=recipe.width,
        num_attention_heads=recipe.heads,
        intermediate_size=recipe.channels,
        max_position_embeddings=recipe.positions,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        initializer_range=0.05,
    )
    settings.num_labels = len(names)
    with torch.random.fork_rng(devices=[]):
        model = BertForSequenceClassification(settings)
    initialise(model, dict(model.named_parameters()), torch_rng(_SEED, "pretraining", name))
    vectors = model.bert.embeddings.word_embeddings.weight
    company = [row[1:-1] for row in tokens]  # without [CLS] and [SEP], which are near everything
    found = word_vectors(company, len(tokenizer), recipe.width, torch_rng(_SEED, "vectors", name))
    with torch.no_grad():
        vectors.copy_(found * _VECTOR_SCALE)
    order = batches(rows, tokenizer.pad_token_id, recipe.batch_size, recipe.steps, torch_rng(_SEED, "batches", name))
    faster = {vectors: _VECTOR_RATE}
    pretrain(model, lambda batch: model(**batch).loss, order, recipe.steps, recipe.rate, name, faster)
    base: PreTrainedModel = model.bert
    return base


def _topics(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Return packages and distinct docstrings; a package is a top module of the standard library or below a library."""
    topics, texts = [], []
    for library in recipe.libraries:
        for item in documented(library):
            text = clean(item.text)
            if len(text.split()) >= _FEWEST_WORDS:
                topics.append(".".join(item.module.split(".")[: 1 if library == STANDARD_LIBRARY else 2]))
                texts.append(text)
    kept = distinct(texts)
    return [topics[row] for row in kept], [texts[row] for row in kept]


def _decoder(recipe: Recipe, name: str, folder: Path) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModelForCausalLM  # noqa: PLC0415 - heavy

    texts, _ = _sources(recipe)
    tokenizer = decoder_tokenizer(texts, recipe.vocabulary)
    end = tokenizer.eos_token_id
    tokens = torch.tensor([token for row in tokenizer(texts)["input_ids"] for token in (*row, end)])
    tokenizer.model_max_length = recipe.positions  # after the texts, which are far longer
    tokenizer.save_pretrained(folder)
    settings = AutoConfig.for_model(
        recipe.family,
        vocab_size=len(tokenizer),
        pad_token_id=end,
        bos_token_id=None,
        eos_token_id=end,
        num_hidden_layers=recipe.layers,
        hidden_size=recipe.width,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.groups,
        head_dim=recipe.width // recipe.heads,
        intermediate_size=recipe.channels,
        max_position_embeddings=recipe.positions,
        tie_word_embeddings=True,
        initializer_range=0.02,
    )
    with torch.random.fork_rng(devices=[]):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(settings)  # type: ignore[no-untyped-call]
    initialise(model, dict(model.named_parameters()), torch_rng(_SEED, "pretraining", name))
    order = _stretches(tokens, recipe.positions // 4, recipe.batch_size, torch_rng(_SEED, "batches", name))
    pretrain(model, lambda batch: model(**batch).loss, order, recipe.steps, recipe.rate, name, {}, recipe.muon)
    return model


def unseen_sources(name: str) -> list[str]:
    """Return the source files of its library that a small decoder was not trained on, to calibrate and to test with."""
    return _sources(SMALL_MODELS[name])[1]


def _sources(recipe: Recipe) -> tuple[list[str], list[str]]:
    """Return the texts that a decoder is trained on, and the rest."""
    texts = [
        file.read_text(encoding="utf-8", errors="replace")
        for library in recipe.libraries
        for file in source_files(library)
    ]
    read = 0
    for count, text in enumerate(texts, start=1):
        read += len(text)
        if read >= 1000 * recipe.least:
            return texts[:count], texts[count:]
    return texts, []


def _stretches(tokens: Tensor, length: int, batch_size: int, generator: torch.Generator) -> Iterator[Batch]:
    """Yield stretches of a long text that begin anywhere, without end."""
    while True:
        starts = torch.randint(max(len(tokens) - length, 0) + 1, (batch_size, 1), generator=generator)
        stretch = tokens[(starts + torch.arange(length)).clamp_max(len(tokens) - 1)]
        yield {"input_ids": stretch, "labels": stretch}
