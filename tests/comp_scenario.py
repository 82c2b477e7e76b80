"""The scenario `comp`, tiny: a model and texts in local folders, and what it gives on a LocalGrid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers

from fl_edge.comp.report import CompReport
from fl_edge.link.local import LocalGrid
from fl_edge.models.vocabulary import decoder_tokenizer
from fl_edge.seeding import numpy_rng
from simulations.client_app import app
from simulations.comp import run_comp
from simulations.scenario import CompScenario, read_scenario

WORDS = "def return import class self for in if else array matrix tensor frame column index = ( ) :"


def make_files(folder: Path) -> dict[str, Any]:
    """Write a tiny Llama and texts into a folder, and return the scenario's settings that use them."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = numpy_rng(0, "texts")
    texts = [" ".join(rng.choice(WORDS.split(), 700)) for _ in range(12)]
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = decoder_tokenizer(texts, 300)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=4,
        intermediate_size=48, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.2,
        pad_token_id=tokenizer.eos_token_id, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder / "model")
    return {
        "simulation": "comp", "devices": 3, "model.name": str(folder / "model"),
        "data.source": str(folder / "texts.jsonl"), "data.length": 32, "data.sequences": 24, "data.test_sequences": 4,
        "comp.max_variance": 1e9, "comp.wire": "float64",
    }  # fmt: skip


def locally(folder: Path, settings: dict[str, Any], name: str = "local", **overrides: Any) -> CompReport:
    """Run the scenario on a LocalGrid."""
    config = {**settings, "runs": str(folder), "name": name, **overrides}
    scenario = read_scenario(config)
    assert isinstance(scenario, CompScenario)
    return run_comp(LocalGrid(app, scenario.devices, run_config=config), scenario)
