"""What a device's adapter must be, and how much it counts."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_edge.errors import ConfigError, ReplyError
from fl_edge.fedspine.factors import Factors
from fl_edge.fedspine.replies import checked_adapter, checked_samples, named
from fl_edge.fedspine.weighting import adapter_norm, device_weights

SHAPES = {"layer.0.query": (6, 8), "layer.0.value": (4, 8)}  # kept rows and columns


def tensors(rank: int = 2) -> dict[str, Tensor]:
    adapter = {m: Factors(torch.randn(rank, columns), torch.randn(rows, rank)) for m, (rows, columns) in SHAPES.items()}
    return named(adapter)


def test_a_good_adapter_is_taken_as_it_is() -> None:
    sent = tensors()
    assert sorted(sent) == [f"{m}.lora_{side}.weight" for m in SHAPES for side in "AB"]
    adapter = checked_adapter(dict(reversed(sent.items())), SHAPES, 2)
    assert list(adapter) == list(SHAPES)
    assert adapter["layer.0.value"].a is sent["layer.0.value.lora_A.weight"]
    assert adapter["layer.0.value"].b is sent["layer.0.value.lora_B.weight"]
    assert named(adapter).keys() == sent.keys()


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("layer.0.query.lora_A.weight", None, "no tensor layer.0.query.lora_A.weight"),
        ("layer.0.value.lora_B.weight", None, "no tensor layer.0.value.lora_B.weight"),
        ("layer.1.query.lora_A.weight", torch.zeros(2, 8), "layer.1.query.lora_A.weight: no such tensor was sent"),
        ("layer.0.query.lora_A.weight", torch.zeros(3, 8), "rank 3 in a and 2 in b; 2 was given"),
        ("layer.0.query.lora_B.weight", torch.zeros(6, 1), "rank 2 in a and 1 in b; 2 was given"),
        ("layer.0.query.lora_B.weight", torch.zeros(5, 2), "5 rows and 8 columns; 6 and 8 were due"),
        ("layer.0.query.lora_A.weight", torch.zeros(2, 7), "6 rows and 7 columns; 6 and 8 were due"),
        ("layer.0.query.lora_A.weight", torch.zeros(2), "a matrix of floating type was due"),
        ("layer.0.query.lora_A.weight", torch.zeros(2, 8, dtype=torch.int64), "a matrix of floating type was due"),
        ("layer.0.query.lora_A.weight", torch.full((2, 8), math.nan), "lora_A.weight: numbers that are not all finite"),
        (
            "layer.0.value.lora_B.weight",
            torch.full((4, 2), -math.inf),
            "lora_B.weight: numbers that are not all finite",
        ),
    ],
)
def test_a_bad_adapter_is_one_line(name: str, value: Tensor | None, words: str) -> None:
    sent = tensors()
    if value is None:
        del sent[name]
    else:
        sent[name] = value
    with pytest.raises(ReplyError) as caught:
        checked_adapter(sent, SHAPES, 2)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_rank_that_was_not_given_is_refused() -> None:
    with pytest.raises(ReplyError, match="rank 4 in a and 4 in b; 2 was given"):
        checked_adapter(tensors(4), SHAPES, 2)


def test_a_device_without_samples_is_refused() -> None:
    assert checked_samples(1) == 1
    for samples in (0, -3):
        with pytest.raises(ReplyError, match="at least 1"):
            checked_samples(samples)


def test_weights_are_samples_times_what_the_device_has() -> None:
    samples, sparsity, ranks, norms = [10, 30], [0.5, 0.0], [4, 16], [3.0, 1.0]

    def weights(rule: str) -> list[float]:
        return device_weights(samples, sparsity, ranks, norms, rule)  # type: ignore[arg-type]

    assert weights("samples") == pytest.approx([0.25, 0.75])
    assert weights("sparsity") == pytest.approx([5 / 35, 30 / 35])
    assert weights("rank") == pytest.approx([2.5 / 32.5, 30 / 32.5])
    assert weights("norm") == pytest.approx([0.5, 0.5])
    assert device_weights(samples, sparsity, ranks, []) == pytest.approx(weights("sparsity"))
    assert device_weights(samples, sparsity, ranks, [0.0, 0.0], "norm") == pytest.approx(weights("samples"))


@pytest.mark.parametrize(
    ("samples", "sparsity", "rank", "norm", "rule"),
    [
        (0, 0.5, 4, 1.0, "samples"),
        (1, 1.0, 4, 1.0, "samples"),
        (1, -0.1, 4, 1.0, "samples"),
        (1, math.nan, 4, 1.0, "samples"),
        (1, 0.5, 0, 1.0, "samples"),
        (1, 0.5, 4, math.inf, "norm"),
        (1, 0.5, 4, -1.0, "norm"),
        (1, 0.5, 4, 1.0, "loss"),
    ],
)
def test_a_bad_weight_is_one_line(samples: int, sparsity: float, rank: int, norm: float, rule: str) -> None:
    with pytest.raises(ConfigError):
        device_weights([5, samples], [0.0, sparsity], [4, rank], [1.0, norm], rule)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no device"):
        device_weights([], [], [], [])


def test_the_norm_of_an_adapter_is_that_of_its_products() -> None:
    rng = np.random.default_rng(0)
    adapter = [
        Factors(torch.tensor(rng.normal(size=(r, 9)), dtype=torch.float32), torch.tensor(rng.normal(size=(7, r))))
        for r in (1, 3)
    ]
    dense = [f.b.double() @ f.a.double() for f in adapter]
    assert adapter_norm(adapter) == pytest.approx(float(sum((d**2).sum() for d in dense)) ** 0.5)
    assert adapter_norm([Factors(adapter[0].a, torch.zeros(7, 1))]) == 0
