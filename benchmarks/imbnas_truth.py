"""What the paths of a space are worth: each trained from scratch on the tail, many trainings of a path at once.

``fl_edge.imbnas.retraining`` trains one network after another, which for networks as small as those of digits is mostly
waiting between operations. Here all ratios and seeds of such a path are trained side by side: parameters stacked, the
network mapped over them by ``torch.func.vmap``; no training knows of another. The schedule is the library's, as shares
of a fixed number of steps, so that tails of every ratio get as many; the loss is balanced softmax.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import Tensor
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional

from benchmarks.imbnas_tasks import BALANCED, PAIRS, architectures, make_target, unseen
from fl_edge.data.images import ImageSet
from fl_edge.data.once import content_key, made_once
from fl_edge.imbnas.config import RetrainConfig
from fl_edge.imbnas.extraction import fresh_network
from fl_edge.imbnas.space import Architecture, Space
from fl_edge.imbnas.tally import Tally
from fl_edge.seeding import torch_rng

_FORM = 1  # raised when the same settings give other figures
_TOGETHER = 4  # paths whose figures are kept as one file
_QUICK = 4  # times fewer steps


class Training(NamedTuple):
    """One of the trainings that run side by side: the set, what it is tested on, the seed."""

    train: ImageSet
    test: ImageSet
    seed: int


def truths(pair: str, seeds: Sequence[int], quick: bool) -> dict[int, NDArray[np.float64]]:
    """Return the class-mean accuracy of every path by ratio, (seeds, paths); trained at the first use.

    The balanced set is ratio 1.
    """
    what, paths, ratios = PAIRS[pair], architectures(pair, quick), (BALANCED, *PAIRS[pair].ratios)
    steps = what.steps // _QUICK if quick else what.steps
    parts = []
    for start in range(0, len(paths), _TOGETHER):
        chosen = paths[start : start + _TOGETHER]

        def make(folder: Path, chosen: list[Architecture] = chosen, start: int = start) -> None:
            trainings = [
                Training(make_target(pair, ratio, seed).train, unseen(pair, ratio, seed), seed)
                for ratio in ratios
                for seed in seeds
            ]
            groups = [trainings[first : first + what.at_once] for first in range(0, len(trainings), what.at_once)]
            found = [
                np.concatenate([train_together(what.space, path, group, what.truth, steps) for group in groups])
                for path in chosen
            ]
            save_file({"accuracy": np.array(found).T.copy()}, folder / "truth.safetensors")
            print(f"{pair}: {start + len(chosen)} of {len(paths)} paths are trained", flush=True)

        key = content_key(
            _FORM, what.data, what.target_classes, what.space, what.truth, steps, ratios, tuple(seeds), chosen
        )
        folder = made_once("imbnas_truth", key, make, "truth")
        parts.append(load_file(folder / "truth.safetensors")["accuracy"])
    joined = np.concatenate(parts, axis=1).reshape(len(ratios), len(seeds), len(paths))
    return {ratio: joined[place] for place, ratio in enumerate(ratios)}


def train_together(
    space: Space, architecture: Architecture, trainings: Sequence[Training], recipe: RetrainConfig, steps: int
) -> list[float]:
    """Train fresh networks of one path side by side; return the class-mean accuracy of each on its test images.

    Parameters
    ----------
    trainings
        Of images of one shape and as many classes.
    recipe
        Optimiser, batch size and schedule; its epochs are not looked at.
    steps
        Of each training.
    """
    first = trainings[0].train
    classes = len(first.classes)
    networks = [
        fresh_network(space, architecture, first.shape[0], classes, torch_rng(each.seed, "truth")).train()
        for each in trainings
    ]
    stacked, buffers = stack_module_state(networks)
    parameters = {name: value.detach().requires_grad_() for name, value in stacked.items()}
    shell = copy.deepcopy(networks[0]).to("meta")

    def forward(weights: dict[str, Tensor], state: dict[str, Tensor], inputs: Tensor) -> Tensor:
        scores: Tensor = functional_call(shell, (weights, state), (inputs,))
        return scores

    inputs, labels = _padded([each.train for each in trainings])
    prior = torch.stack([each.train.label_counts().clamp_min(1).log() for each in trainings])
    batches = torch.stack([_batches(len(each.train), recipe.batch_size, steps, each.seed) for each in trainings])
    optimiser = torch.optim.SGD(
        list(parameters.values()), recipe.learning_rate, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )
    # pooling falls back to a loop over the trainings, of a thousandth of the time
    warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
    rows = torch.arange(len(trainings))[:, None]
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate_at(step / steps)
        chosen = batches[:, step]
        scores = vmap(forward)(parameters, buffers, inputs[rows, chosen]) + prior[:, None]
        optimiser.zero_grad()
        loss = functional.cross_entropy(scores.flatten(0, 1), labels[rows, chosen].flatten(), reduction="sum")
        (loss / recipe.batch_size).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    shell.eval()
    accuracies = []
    with torch.no_grad():
        for place, each in enumerate(trainings):
            own = [{name: value[place] for name, value in state.items()} for state in (parameters, buffers)]
            images, truth = each.test.batch()
            accuracies.append(Tally.of(forward(own[0], own[1], images).argmax(1), truth, classes).balanced)
    return accuracies


def _batches(images: int, size: int, steps: int, seed: int) -> Tensor:
    """Return the images of every step, int64 (steps, size): one shuffled epoch behind the other."""
    generator = torch_rng(seed, "truth batches")
    epochs = -(-steps * size // images)
    shuffled = torch.cat([torch.randperm(images, generator=generator) for _ in range(epochs)])
    return shuffled[: steps * size].view(steps, size)


def _padded(sets: Sequence[ImageSet]) -> tuple[Tensor, Tensor]:
    """Return images (sets, most, c, h, w) and labels (sets, most), zeros behind the shorter sets."""
    pairs = [each.batch() for each in sets]
    most = max(map(len, sets))
    images = torch.stack([torch.cat([one, one.new_zeros(most - len(one), *one.shape[1:])]) for one, _ in pairs])
    return images, torch.stack([functional.pad(two, (0, most - len(two))) for _, two in pairs])
