"""The ClientApp: every workload that a device can be asked for."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from flwr.app import Context

from fl_edge.clients.comp import CompClient, CompWorkload
from fl_edge.clients.fedspine import FedSpineClient, FedSpineWorkload
from fl_edge.clients.hat import HatClient, HatWorkload
from fl_edge.clients.hat.answers import AnswerFiles
from fl_edge.clients.imbnas import ImbNasClient, ImbNasWorkload
from fl_edge.clients.mergesfl import MergeSFLClient, Workload
from fl_edge.comp.outcome import base_digest
from fl_edge.data.corpus import device_files, device_tokens, load_files, load_tokenizer
from fl_edge.data.images import ImageSet, load_test, load_train
from fl_edge.data.partition import load_device as load_images
from fl_edge.data.prompts import device_prompts
from fl_edge.data.texts import head_classes, load_text_device
from fl_edge.edge.costs import compute_seconds_per_sample, macs_per_second, transfer_seconds_per_sample
from fl_edge.edge.profiles import DeviceProfile, device_profile
from fl_edge.errors import ConfigError
from fl_edge.files import default_folder
from fl_edge.hat.split import DeviceModel, load_device
from fl_edge.imbnas.longtail import make_task
from fl_edge.imbnas.source import device_shards
from fl_edge.link.resident import ClientApp
from fl_edge.models.accelerator import find_accelerator
from fl_edge.models.images import build_model
from fl_edge.models.language import load_language_model, model_folder
from fl_edge.models.pretraining import weights_digest
from fl_edge.models.split import feature_bytes
from fl_edge.seeding import derive_seed
from simulations.scenario import (
    CompScenario,
    FedSpineScenario,
    HatScenario,
    ImbNasScenario,
    MergeSFLScenario,
    Scenario,
    read_scenario,
)

app = ClientApp()


@dataclass(frozen=True)
class Place:
    """Which device of how many this node is, in which run."""

    run_config: tuple[tuple[str, Any], ...]
    index: int
    count: int
    name: str
    kind: str

    @classmethod
    def of(cls, context: Context) -> Place:
        """Read it from the node's configuration."""
        node = context.node_config
        if "partition-id" not in node or "num-partitions" not in node:
            raise ConfigError(
                'partition-id and num-partitions must be set: --node-config "partition-id=0 num-partitions=4"'
            )
        index, count = int(node["partition-id"]), int(node["num-partitions"])
        name, kind = str(node.get("device-id", f"device-{index}")), str(node.get("device-kind", ""))
        return cls(tuple(sorted(context.run_config.items())), index, count, name, kind)

    def profile(self, scenario: Scenario, server_round: int) -> DeviceProfile:
        """Return what this device can do in a round."""
        return device_profile(scenario.edge, scenario.seed, self.index, self.count, server_round, self.kind)


@lru_cache(maxsize=256)
def _mergesfl(place: Place) -> Workload:
    scenario = read_scenario(dict(place.run_config), on_device=True)
    if not isinstance(scenario, MergeSFLScenario):
        raise ConfigError(f"this device runs simulation={scenario.simulation}; it was asked for MergeSFL")
    own = load_images(scenario.data, scenario.seed, place.index, place.count)
    bottom = build_model(scenario.model, own.shape, len(own.classes), scenario.seed).bottom
    per_sample = feature_bytes(bottom, own.shape)

    def costs(server_round: int) -> tuple[float, float]:
        profile = place.profile(scenario, server_round)
        return compute_seconds_per_sample(profile, scenario.edge), transfer_seconds_per_sample(profile, per_sample)

    return Workload(
        device=place.name,
        bottom=bottom,
        labels=own.labels,
        num_classes=len(own.classes),
        batch=lambda indices: own.batch(indices)[0],
        costs=costs if scenario.edge.clock == "virtual" else None,
        threads=scenario.threads,
    )


@lru_cache(maxsize=2)
def _base(run_config: tuple[tuple[str, Any], ...]) -> tuple[Any, Any, str]:
    """Return (base model, tokenizer, hash): the same for all devices that this process serves."""
    scenario = _fedspine_scenario(run_config)
    torch.set_num_threads(scenario.threads)
    base, tokenizer = load_language_model(scenario.model, scenario.seed, head_classes(scenario.data, scenario.seed))
    return base, tokenizer, weights_digest(base)


def _fedspine_scenario(run_config: tuple[tuple[str, Any], ...]) -> FedSpineScenario:
    scenario = read_scenario(dict(run_config), on_device=True)
    if not isinstance(scenario, FedSpineScenario):
        raise ConfigError(f"this device runs simulation={scenario.simulation}; it was asked for FedSpine")
    return scenario


@lru_cache(maxsize=256)
def _fedspine(place: Place) -> FedSpineWorkload:
    scenario = _fedspine_scenario(place.run_config)
    base, tokenizer, digest = _base(place.run_config)

    def costs(server_round: int) -> tuple[float, float]:
        profile = place.profile(scenario, server_round)
        return macs_per_second(profile, scenario.edge), profile.bandwidth_bps

    return FedSpineWorkload(
        device=place.name,
        base=lambda: copy.deepcopy(base),
        base_digest=digest,
        dataset=load_text_device(scenario.data, scenario.seed, place.index, place.count, tokenizer),
        pad_id=tokenizer.pad_token_id,
        costs=costs if scenario.edge.clock == "virtual" else None,
        accelerator=find_accelerator(scenario.accelerator),
        threads=scenario.threads,
    )


@lru_cache(maxsize=2)
def _corpus(run_config: tuple[tuple[str, Any], ...]) -> tuple[CompScenario, Path, Any, list[str]]:
    """Return scenario, folder of the base, tokenizer and texts: the same for all devices that this process serves."""
    scenario = read_scenario(dict(run_config), on_device=True)
    if not isinstance(scenario, CompScenario):
        raise ConfigError(f"this device runs simulation={scenario.simulation}; it was asked for COMP")
    torch.set_num_threads(scenario.threads)
    base = model_folder(scenario.model)
    return scenario, base, load_tokenizer(base), load_files(scenario.data, scenario.model.name)


@lru_cache(maxsize=256)
def _comp(place: Place) -> CompWorkload:
    scenario, base, tokenizer, texts = _corpus(place.run_config)
    own, test = device_tokens(texts, scenario.data, scenario.seed, place.index, place.count, tokenizer)
    return CompWorkload(
        device=place.name,
        base=base,
        base_digest=base_digest(base),
        calibration=own,
        test=test,
        accelerator=find_accelerator(scenario.accelerator),
        threads=scenario.threads,
    )


@lru_cache(maxsize=2)
def _split(run_config: tuple[tuple[str, Any], ...]) -> tuple[HatScenario, DeviceModel, Any, list[str]]:
    """Return scenario, a device's part of the model, tokenizer and texts: the same for all that this process serves."""
    scenario = read_scenario(dict(run_config), on_device=True)
    if not isinstance(scenario, HatScenario):
        raise ConfigError(f"this device runs simulation={scenario.simulation}; it was asked for HAT")
    torch.set_num_threads(scenario.threads)
    base, place = model_folder(scenario.model), torch.device(find_accelerator(scenario.accelerator))
    model = load_device(base, scenario.hat.shallow, place)
    return scenario, model, load_tokenizer(base), load_files(scenario.data, scenario.model.name)


@lru_cache(maxsize=256)
def _hat(place: Place, run_id: int) -> HatWorkload:
    scenario, model, tokenizer, texts = _split(place.run_config)
    own, _ = device_tokens(texts, scenario.data, scenario.seed, place.index, place.count, tokenizer)
    _, test = device_files(texts, scenario.data, scenario.seed, place.index, place.count)
    prompts = device_prompts(scenario.prompts, test, scenario.seed, place.index, place.count, tokenizer)
    answers = AnswerFiles(default_folder() / "answers" / str(run_id) / place.name, tokenizer, prompts)
    return HatWorkload(
        device=place.name,
        model=model,
        adapter=None,
        prompt=answers.prompt,
        hear=answers.hear,
        config=scenario.hat,
        seed=derive_seed(scenario.seed, "hat", place.name),
        stops=() if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,),
        texts=own,
        threads=scenario.threads,
    )


@lru_cache(maxsize=2)
def _shards(
    run_config: tuple[tuple[str, Any], ...], count: int
) -> tuple[ImbNasScenario, list[tuple[ImageSet, ImageSet]]]:
    """Return scenario and every device's images: the same for all devices that this process serves."""
    scenario = read_scenario(dict(run_config), on_device=True)
    if not isinstance(scenario, ImbNasScenario):
        raise ConfigError(f"this device runs simulation={scenario.simulation}; it was asked for IMB-NAS")
    train, test = load_train(scenario.data, scenario.seed), load_test(scenario.data, scenario.seed)
    task = make_task(train, test, scenario.tail, scenario.seed)
    return scenario, device_shards(task, count, scenario.data, scenario.seed)


@lru_cache(maxsize=256)
def _imbnas(place: Place) -> ImbNasWorkload:
    scenario, shards = _shards(place.run_config, place.count)
    train, validation = shards[place.index]
    return ImbNasWorkload(
        device=place.name,
        train=train,
        validation=validation,
        accelerator=find_accelerator(scenario.accelerator),
        threads=scenario.threads,
    )


MergeSFLClient(lambda context: _mergesfl(Place.of(context))).register(app)
FedSpineClient(lambda context: _fedspine(Place.of(context))).register(app)
CompClient(lambda context: _comp(Place.of(context))).register(app)
HatClient(lambda context: _hat(Place.of(context), context.run_id)).register(app)
ImbNasClient(lambda context: _imbnas(Place.of(context))).register(app)
