"""Sampling, of :mod:`benchmarks.hat`: counts of drawn texts against the whole model's own probabilities.

A tiny Llama of 8 tokens, with an adapter that is trained a little, so that some drafts hold. The probability of every
text of three tokens after a prompt is worked out from the unsplit model, with temperature and top-p by their
definitions; counts of drawn texts are tested by chi-square, in cells of at least five expected texts. How much the test
would see is told by the same counts against a temperature a tenth higher. The draws of a mode are the same in all modes
(:mod:`fl_edge.hat.sampling`), which is counted too; p-values are the same then.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from operator import eq
from pathlib import Path
from typing import Any

import torch
from scipy.stats import chisquare, combine_pvalues  # type: ignore[import-untyped]
from torch import Tensor

from benchmarks.hat_models import CPU
from benchmarks.hat_rooms import accept_length, make_cloud, serve
from fl_edge.hat.adapter import Adapter, new_adapter
from fl_edge.hat.config import HatConfig
from fl_edge.hat.distillation import Course, teach, train
from fl_edge.hat.session import DeviceSession
from fl_edge.hat.split import DeviceModel, MiddleModel, load_device, load_middle
from fl_edge.models.pretraining import initialise
from fl_edge.models.quiet import quiet
from fl_edge.seeding import torch_rng

VOCABULARY, TOKENS, PROMPT, SHALLOW = 8, 3, (1, 5, 2, 7), 2
DEVICES = 25  # at once in the cloud
DRAWS, QUICK_DRAWS = 1500, 500  # texts of a test
SEEDS, QUICK_SEEDS = 5, 2
FEWEST = 5  # expected texts of a cell
HOTTER = 1.1
LAWS = {"temperature 1": (1.0, 1.0), "temperature 0.7, top-p 0.9": (0.7, 0.9)}
_BASE = HatConfig(new_tokens=TOKENS, threshold=0.0, guesses=0)
MODES: Mapping[str, HatConfig] = {
    "no drafts": replace(_BASE, max_drafts=0),
    "drafts": _BASE,
    "parallel drafts": replace(_BASE, guesses=2),
}


def sampling_case(mode: str, law: str) -> str:
    """Return what the table calls a test."""
    return f"sampling: {mode}, {law}"


@dataclass(frozen=True)
class Site:
    """A tiny model, whole and in parts."""

    whole: Any
    device: DeviceModel
    middle: MiddleModel
    adapter: Adapter


@functools.cache
def site() -> Site:
    """Return the tiny model; always the same."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.25,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    with torch.random.fork_rng(devices=[]):
        whole: Any = transformers.LlamaForCausalLM(config)
    initialise(whole, dict(whole.named_parameters()), torch_rng(0, "sampling"))
    whole.lm_head.weight.data *= 2.5  # else all tokens are nearly as likely as each other
    for layer in whole.model.layers[SHALLOW:]:  # a middle that changes less, so that some drafts hold
        layer.self_attn.o_proj.weight.data *= 0.3
        layer.mlp.down_proj.weight.data *= 0.3
    whole = whole.double().eval().requires_grad_(False)
    with quiet(), tempfile.TemporaryDirectory() as folder:
        whole.save_pretrained(folder)
        device, middle = load_device(Path(folder), SHALLOW, CPU), load_middle(Path(folder), SHALLOW, CPU)
    adapter = new_adapter(device, torch_rng(0, "adapter")).double()
    texts = torch.randint(VOCABULARY, (256, 8), generator=torch_rng(0, "texts"))
    train(adapter, device, teach(device, middle, texts), Course(200, 32, 1e-2, token_weight=1.0), 0)
    return Site(whole, device, middle, adapter)


def measure_sampling(mode: str, law: str, quick: bool) -> dict[str, Any]:
    """Return p-values of the texts of one mode, all of them and together, and whether they are those without drafts."""
    draws, seeds = (QUICK_DRAWS, QUICK_SEEDS) if quick else (DRAWS, SEEDS)
    site()  # is made with gradients, which its users below do without
    wanted, hotter = probabilities(*LAWS[law]), probabilities(HOTTER * LAWS[law][0], LAWS[law][1])
    found = [drawn(mode, law, seed, draws) for seed in range(seeds)]
    values = [p_value(texts, wanted) for texts, _ in found]
    plain = [drawn("no drafts", law, seed, draws)[0] for seed in range(seeds)]
    same = [sum(map(eq, texts, other)) / draws for (texts, _), other in zip(found, plain, strict=True)]
    return {
        "tokens": TOKENS * draws * seeds,
        "p_values": values,
        "p": float(combine_pvalues(values).pvalue),
        "p_hotter": float(combine_pvalues([p_value(texts, hotter) for texts, _ in found]).pvalue),
        "same_draws": min(same),
        "accept_length": sum(length for _, length in found) / seeds,
    }


@functools.cache
def drawn(mode: str, law: str, seed: int, draws: int) -> tuple[list[tuple[int, ...]], float]:
    """Return texts in the order of their requests, and the accept length; many devices run at once."""
    here, (temperature, top_p) = site(), LAWS[law]
    config = replace(MODES[mode], temperature=temperature, top_p=top_p)
    texts: list[list[int]] = [[] for _ in range(draws)]
    sessions = [
        DeviceSession(here.device, here.adapter, config, 64, seed, (), lambda at, new: texts[at].extend(new))
        for _ in range(DEVICES)
    ]
    jobs = [[(request, torch.tensor(PROMPT)) for request in range(place, draws, DEVICES)] for place in range(DEVICES)]
    accounts = serve(make_cloud(here.middle, DEVICES, capacity=64), sessions, jobs)
    return [tuple(text) for text in texts], accept_length(accounts)


@torch.no_grad()
def probabilities(temperature: float, top_p: float) -> dict[tuple[int, ...], float]:
    """Return the probability of every text, from the unsplit model."""
    whole = site().whole
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(TOKENS):
        rows = torch.tensor([[*PROMPT, *text] for text in chances])
        laws = nucleus(whole(input_ids=rows, use_cache=False).logits[:, -1], temperature, top_p).tolist()
        chances = {
            (*text, token): chance * law[token]
            for (text, chance), law in zip(chances.items(), laws, strict=True)
            for token in range(VOCABULARY)
        }
    return chances


def nucleus(logits: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return the law (n, v) of the next token: the likeliest tokens, until their chances reach ``top_p``."""
    laws = torch.softmax(logits / temperature, -1)
    for law in laws:
        reached = 0.0
        for token in law.argsort(descending=True).tolist():
            chance, law[token] = float(law[token]), law[token] if reached < top_p else 0.0
            reached += chance
    return laws / laws.sum(-1, keepdim=True)


def p_value(texts: list[tuple[int, ...]], chances: Mapping[tuple[int, ...], float]) -> float:
    """Return the chi-square test's p-value; 0 where a text was drawn that cannot be."""
    counts, rest = Counter(texts), [0.0, 0.0]
    if any(chances[text] == 0 for text in counts):
        return 0.0
    observed, expected = list[float](), list[float]()
    for text in itertools.product(range(VOCABULARY), repeat=TOKENS):
        wanted = chances[text] * len(texts)
        if wanted >= FEWEST:
            observed.append(counts[text])
            expected.append(wanted)
        else:
            rest = [rest[0] + counts[text], rest[1] + wanted]
    if rest[1] > 0:
        observed.append(rest[0])
        expected.append(rest[1])
    scale = sum(observed) / sum(expected)  # 1 but for rounding, which the test does not suffer
    return float(chisquare(observed, [scale * each for each in expected]).pvalue)
