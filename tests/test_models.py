from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional

from fl_edge.config import resolve
from fl_edge.data.config import DataConfig
from fl_edge.data.images import load_test, load_train
from fl_edge.errors import ConfigError
from fl_edge.models.config import ModelConfig
from fl_edge.models.evaluation import evaluate
from fl_edge.models.images import build_model
from fl_edge.models.split import feature_bytes, feature_shape, split_at
from fl_edge.seeding import torch_rng

# specs/mergesfl.md, section 6: input, classes, feature, c in bytes, bottom, top (exact counts; the table rounds)
TABLE = {
    "alexnet": ((3, 32, 32), 10, (256, 4, 4), 16_384, 2_251_584, 33_603_594),
    "vgg16": ((3, 144, 144), 100, (512, 5, 5), 51_200, 14_723_136, 69_623_908),
    "cnn_h": ((1, 128, 9), 6, (32, 32, 2), 8_192, 3_608, 4_219_974),
    "cnn_s": ((1, 16_000), 35, (64, 14), 3_584, 12_160, 14_755),
    "digits": ((1, 8, 8), 10, (32, 2, 2), 512, 4_800, 8_906),
}


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Threads that wait for each other on a busy machine make small steps 30 times slower."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", TABLE)
def test_sizes_of_the_table(name: str) -> None:
    shape, classes, feature, c, bottom, top = TABLE[name]
    model = build_model(ModelConfig(name=name), shape, classes, 1)
    assert feature_shape(model.bottom, shape) == feature
    assert feature_bytes(model.bottom, shape) == c
    assert [sum(weight.numel() for weight in half.parameters()) for half in (model.bottom, model.top)] == [bottom, top]
    model.eval()
    assert model(torch.zeros(2, *shape)).shape == (2, classes)
    assert all(bool(value.isfinite().all()) for value in model.state_dict().values())


@pytest.mark.usefixtures("_one_thread")
@pytest.mark.parametrize("name", ["digits", "cnn_h", "cnn_s"])
def test_every_cut_is_the_same_model(name: str) -> None:
    shape, classes = TABLE[name][:2]
    inputs = torch.rand(3, *shape, generator=torch_rng(1, "inputs"))
    whole = build_model(ModelConfig(name=name), shape, classes, 1)
    layers = len(whole.bottom) + len(whole.top)
    for cut in range(1, layers):
        model = build_model(ModelConfig(name=name, cut=cut), shape, classes, 1)
        assert len(model.bottom) == cut
        assert torch.equal(model(inputs), whole(inputs))
        # no layer of a top may write into the features that came over the network
        features = model.bottom(inputs).detach().requires_grad_()
        functional.cross_entropy(model.top(features), torch.zeros(3, dtype=torch.int64)).backward()  # type: ignore[no-untyped-call]
        assert features.grad is not None


@pytest.mark.parametrize("cut", [0, 10, 99])
def test_cut_out_of_range_names_the_range(cut: int) -> None:
    with pytest.raises(ConfigError, match=f"cut={cut} is not allowed; .* at least 1 and at most 9"):
        build_model(ModelConfig(cut=cut), (1, 8, 8), 10, 1)


def test_weights_come_from_the_seed_and_global_state_stays() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    one, two, other = (build_model(ModelConfig(), (1, 8, 8), 10, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    for key, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[key])
    assert not torch.equal(one.bottom[0].weight, other.bottom[0].weight)  # type: ignore[arg-type]


def test_initial_weights_have_the_bounds_of_torch() -> None:
    model = build_model(ModelConfig(name="cnn_h"), (1, 128, 9), 6, 1)
    drawn = {
        tuple(module.weight.shape): module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)
    }
    dense = drawn[(1024, 4096)]
    assert float(dense.weight.detach().abs().max()) == pytest.approx(1 / 64, rel=1e-3)
    assert 0 < float(dense.bias.detach().abs().max()) <= 1 / 64  # type: ignore[union-attr]
    norm = build_model(ModelConfig(name="cnn_s"), (1, 16_000), 35, 1).bottom[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert torch.equal(norm.weight, torch.ones(32))
    assert torch.equal(norm.running_var, torch.ones(32))  # type: ignore[arg-type]
    assert int(norm.num_batches_tracked) == 0  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "shape", "classes", "says"),
    [
        ("digits", (8, 8), 10, r"digits takes inputs of shape \(channels, height, width\)"),
        ("digits", (1, 8, 8), 1, "at least 2 classes"),
        ("digits", (1, 3, 3), 10, r"an input of shape \(1, 3, 3\) is too small for digits"),
        ("alexnet", (3, 7, 7), 10, "is too small for alexnet"),
        ("cnn_s", (1, 900), 35, "is too small for cnn_s"),
        ("cnn_s", (1, 8, 8), 35, r"cnn_s takes inputs of shape \(channels, samples\)"),
        ("resnet", (3, 32, 32), 10, "name=resnet is not allowed; it must be one of digits, alexnet, vgg16"),
    ],
)
def test_what_does_not_fit_is_said_in_one_line(name: str, shape: tuple[int, ...], classes: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        build_model(ModelConfig(name=name), shape, classes, 1)
    assert "\n" not in str(caught.value)


def test_unknown_model_ends_in_resolve() -> None:
    with pytest.raises(ConfigError, match="name=resnet is not allowed; it must be one of digits, alexnet"):
        resolve(ModelConfig, None, {"name": "resnet"})


def test_feature_shape_leaves_the_bottom_as_it_was() -> None:
    bottom = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Dropout())
    bottom[1].eval()
    before = {key: value.clone() for key, value in bottom.state_dict().items()}
    assert feature_shape(bottom, (1, 5, 5)) == (2, 3, 3)
    assert [module.training for module in bottom] == [True, False, True]
    assert all(torch.equal(value, before[key]) for key, value in bottom.state_dict().items())
    with pytest.raises(ConfigError, match=r"an input of shape \(3, 5, 5\) does not fit the model"):
        feature_shape(bottom, (3, 5, 5))


def test_any_chain_can_be_cut() -> None:
    layers = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    model = split_at(layers, 2)
    inputs = torch.rand(5, 4, generator=torch_rng(1, "inputs"))
    assert torch.equal(model(inputs), layers(inputs))
    with pytest.raises(ConfigError, match="at least 1 and at most 2"):
        split_at(layers, 3)


@pytest.mark.usefixtures("_one_thread")
def test_digits_are_learned_within_300_steps() -> None:
    train, test = load_train(DataConfig(), 1), load_test(DataConfig(), 1)
    model = build_model(ModelConfig(), train.shape, len(train.classes), 1)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    generator = torch_rng(1, "batches")
    for _ in range(300):
        images, labels = train.batch(torch.randint(len(train), (64,), generator=generator))
        optimiser.zero_grad()
        functional.cross_entropy(model(images), labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
    assert evaluate(model, *test.batch())[0] > 0.94
