"""The scenario `fedspine`, tiny: a model and texts in local folders, and what it gives on a LocalGrid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import torch
import transformers

from fl_edge.checkpoints import load_checkpoint
from fl_edge.link.local import LocalGrid
from fl_edge.models.vocabulary import encoder_tokenizer
from fl_edge.seeding import numpy_rng
from simulations.client_app import app
from simulations.fedspine import run_fedspine
from simulations.scenario import FedSpineScenario, read_scenario

WORDS = ("array matrix slice", "tensor gradient module", "frame column index")  # of three classes


def make_files(folder: Path) -> dict[str, Any]:
    """Write a tiny BERT and a table of texts into a folder, and return the scenario's settings that use them."""
    rng = numpy_rng(0, "texts")
    labels = [int(label) for label in rng.integers(3, size=240)]
    texts = [" ".join(rng.choice(WORDS[label].split(), 6)) for label in labels]
    table = datasets.Dataset.from_dict({"text": texts, "label": [WORDS[label].split()[0] for label in labels]})
    table.to_json(str(folder / "texts" / "train.jsonl"))
    tokenizer = encoder_tokenizer(texts, 280)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=32, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    transformers.BertModel(config).save_pretrained(folder / "model")
    return {
        "simulation": "fedspine", "rounds": 6, "devices": 4, "model.name": str(folder / "model"),
        "data.source": str(folder / "texts"), "data.max_length": 16, "data.min_samples": 8, "fedspine.tau": 8,
        "fedspine.batch_size": 8, "fedspine.learning_rate": 0.02, "fedspine.ranks": "2 4 8",
        "fedspine.schedule.largest": 0.25,
    }  # fmt: skip


def locally(folder: Path, settings: dict[str, Any], **overrides: Any) -> dict[str, Any]:
    """Run the scenario on a LocalGrid and return its last checkpoint's weights and record."""
    config = {**settings, "runs": str(folder), "name": "local", **overrides}
    scenario = read_scenario(config)
    assert isinstance(scenario, FedSpineScenario)
    run_fedspine(LocalGrid(app, scenario.devices, run_config=config), scenario)
    kept = load_checkpoint(folder / "local" / "checkpoints")
    assert kept is not None
    return vars(kept)
