"""Classifiers of MergeSFL's experiments and a small one for digits, as flat chains that can be cut behind any layer.

Source: layer sizes and default cuts of the four larger models are those of MergeSFL's released code. *Ours*: the digits
model, with He's initialisation (0.97 instead of 0.90 accuracy after 300 steps at 0.1; the others start from torch's
default); no log-softmax at the end (cross-entropy has it); VGG's pools round up, which gives the 5x5 features that the
released top expects of 144x144 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from fl_edge.errors import ConfigError
from fl_edge.models.config import MODELS, ModelConfig
from fl_edge.models.split import SplitModel, feature_shape, split_at
from fl_edge.seeding import torch_rng

Layers = list[nn.Module]

_VGG16 = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))  # channels, a pool behind each group
_ALEXNET = ((64, True), (192, True), (384, False), (256, False), (256, True))  # channels, pooled
_SHAPES = {  # number of axes of an input, what they are
    "digits": (3, "(channels, height, width)"),
    "alexnet": (3, "(channels, height, width)"),
    "vgg16": (3, "(channels, height, width)"),
    "cnn_h": (3, "(channels, steps, sensors)"),
    "cnn_s": (2, "(channels, samples)"),
}


def build_model(config: ModelConfig, input_shape: Sequence[int], num_classes: int, seed: int) -> SplitModel:
    """Build a model, weights drawn from the seed alone, and cut it.

    No global random state is read or changed, and the weights of a layer do not depend on the cut.

    Parameters
    ----------
    config
        Which model, where to cut.
    input_shape
        Of one sample: (channels, height, width) for images, (channels, samples) for ``cnn_s``.
    num_classes
        Scores at the end, at least 2.
    seed
        Of the experiment.

    Raises
    ------
    ConfigError
        An unknown model, a cut out of range, an input that the model cannot take.
    """
    if config.name not in MODELS:
        raise ConfigError(f"name={config.name} is not allowed; it must be one of {', '.join(MODELS)}")
    axes, meaning = _SHAPES[config.name]
    shape = tuple(input_shape)
    if len(shape) != axes or min(shape) < 1 or num_classes < 2:
        raise ConfigError(
            f"{config.name} takes inputs of shape {meaning} and at least 2 classes, not {shape} and {num_classes}"
        )
    with torch.device("meta"):  # shapes only; thread-local, and nothing is drawn
        layers, cut = _BUILDERS[config.name](shape, num_classes, config)
    layers.to_empty(device="cpu")
    _initialise(layers, torch_rng(seed, "model", config.name), he=config.name == "digits")
    return split_at(layers, cut if config.cut == -1 else config.cut)


def _initialise(layers: nn.Sequential, generator: torch.Generator, *, he: bool) -> None:
    """Draw weights in the layers' order: uniformly, He's bounds (for ReLU; biases 0) or torch's default bounds."""
    for module in layers.modules():
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d):
            bound = math.sqrt((6 if he else 1) / module.weight[0].numel())
            nn.init.uniform_(module.weight, -bound, bound, generator=generator)
            if module.bias is not None:
                limit = 0.0 if he else bound
                nn.init.uniform_(module.bias, -limit, limit, generator=generator)
        elif isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.reset_parameters()  # constants; draws nothing


def _chain(features: Layers, head: Callable[[int], Layers], shape: tuple[int, ...], name: str) -> nn.Sequential:
    """Join features and a head that is told how many values come out of them."""
    try:
        values = math.prod(feature_shape(nn.Sequential(*features), shape))
    except ConfigError:
        values = 0
    if not values:  # some pools return nothing instead of refusing
        raise ConfigError(f"an input of shape {shape} is too small for {name}")
    return nn.Sequential(*features, *head(values))


def _conv3(inputs: int, outputs: int) -> Layers:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]


def _large_head(num_classes: int, dropout: float) -> Callable[[int], Layers]:
    def head(values: int) -> Layers:
        return [
            *(nn.Flatten(), nn.Dropout(dropout), nn.Linear(values, 4096), nn.ReLU()),
            *(nn.Dropout(dropout), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, num_classes)),
        ]

    return head


def _digits(shape: tuple[int, ...], num_classes: int, config: ModelConfig) -> tuple[nn.Sequential, int]:
    features = [*_conv3(shape[0], 16), nn.MaxPool2d(2), *_conv3(16, 32), nn.MaxPool2d(2)]

    def head(values: int) -> Layers:
        return [nn.Flatten(), nn.Linear(values, 64), nn.ReLU(), nn.Linear(64, num_classes)]

    return _chain(features, head, shape, config.name), len(features)


def _alexnet(shape: tuple[int, ...], num_classes: int, config: ModelConfig) -> tuple[nn.Sequential, int]:
    features: Layers = []
    channels = shape[0]
    for outputs, pooled in _ALEXNET:
        features += _conv3(channels, outputs) + ([nn.MaxPool2d(2)] if pooled else [])
        channels = outputs
    return _chain(features, _large_head(num_classes, config.dropout), shape, config.name), len(features)


def _vgg16(shape: tuple[int, ...], num_classes: int, config: ModelConfig) -> tuple[nn.Sequential, int]:
    features: Layers = []
    channels = shape[0]
    for block in _VGG16:
        for outputs in block:
            features += [nn.Conv2d(channels, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            channels = outputs
        features.append(nn.MaxPool2d(2, ceil_mode=True))
    return _chain(features, _large_head(num_classes, config.dropout), shape, config.name), len(features)


def _cnn_h(shape: tuple[int, ...], num_classes: int, config: ModelConfig) -> tuple[nn.Sequential, int]:
    bottom = [*_conv3(shape[0], 12), nn.MaxPool2d(2), *_conv3(12, 32), nn.MaxPool2d(2)]

    def head(values: int) -> Layers:
        return [nn.Flatten(), nn.Linear(values, 1024), nn.ReLU(), nn.Linear(1024, num_classes)]

    return _chain([*bottom, *_conv3(32, 64)], head, shape, config.name), len(bottom)


def _cnn_s(shape: tuple[int, ...], num_classes: int, config: ModelConfig) -> tuple[nn.Sequential, int]:
    def block(inputs: int, outputs: int, kernel: int, stride: int) -> Layers:
        conv = nn.Conv1d(inputs, outputs, kernel, stride)
        return [conv, nn.BatchNorm1d(outputs), nn.ReLU(), nn.MaxPool1d(4)]

    bottom = [*block(shape[0], 32, 80, 16), *block(32, 32, 3, 1), *block(32, 64, 3, 1)]
    features = [*bottom, *block(64, 64, 3, 1), nn.AdaptiveAvgPool1d(1), nn.Flatten()]
    return _chain(features, lambda values: [nn.Linear(values, num_classes)], shape, config.name), len(bottom)


_BUILDERS: dict[str, Callable[[tuple[int, ...], int, ModelConfig], tuple[nn.Sequential, int]]] = {
    "digits": _digits,
    "alexnet": _alexnet,
    "vgg16": _vgg16,
    "cnn_h": _cnn_h,
    "cnn_s": _cnn_s,
}
