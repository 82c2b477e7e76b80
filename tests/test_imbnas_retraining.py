"""Training an architecture from scratch: the schedule, that it is repeatable, and that re-weighting does its part."""

import functools
from dataclasses import replace

import pytest
import torch

from fl_edge.config import check
from fl_edge.data.config import DataConfig
from fl_edge.data.images import load_test, load_train
from fl_edge.errors import ConfigError, DataError, TrainingError
from fl_edge.imbnas.config import LossConfig, RetrainConfig, TailConfig
from fl_edge.imbnas.longtail import LongTailTask, make_task
from fl_edge.imbnas.losses import NormedLinear, make_loss
from fl_edge.imbnas.retraining import confusion, make_network, retrain, train_network
from fl_edge.imbnas.space import Space, Stage
from fl_edge.imbnas.tally import Tally

SPACE = Space(4, (Stage(4, 1, 1), Stage(8, 1, 2)), ("conv3", "sep3", "identity"))
PATH = (0, 0)
BRIEF = RetrainConfig(epochs=12, batch_size=32, crop_padding=0, flip=False, first_factor=0.1, second_factor=0.01)


@functools.cache
def task() -> LongTailTask:
    return make_task(load_train(DataConfig(), 0), load_test(DataConfig(), 0), TailConfig(ratio=50), seed=0)


def tally(loss: str, recipe: RetrainConfig = BRIEF, seed: int = 0) -> Tally:
    return Tally.from_confusion(retrain(SPACE, PATH, task(), loss, LossConfig(), recipe, seed))


def test_the_schedule_is_that_of_200_epochs() -> None:
    recipe = RetrainConfig()
    rates = {epoch: recipe.learning_rate_at(epoch / 200) for epoch in range(200)}
    assert rates[0] == 0
    assert rates[1] == pytest.approx(0.1 / 5)
    assert rates[5] == rates[159] == 0.1
    assert rates[160] == rates[179] == pytest.approx(0.1 * 0.01)
    assert rates[180] == rates[199] == pytest.approx(0.1 * 0.0001)
    assert replace(recipe, warmup=0.0).learning_rate_at(0) == 0.1
    with pytest.raises(ConfigError, match="must not fall"):
        check(replace(recipe, second_drop=0.5))


@pytest.mark.parametrize("loss", ["ce", "drw", "ldam_drw", "balanced_softmax"])
def test_training_from_scratch_learns_and_repeats(loss: str) -> None:
    one, two = tally(loss), tally(loss)
    assert torch.equal(one.correct, two.correct)
    assert torch.equal(one.total, task().test.label_counts())
    assert one.balanced > 0.35


def test_another_seed_is_another_training() -> None:
    assert not torch.equal(tally("ce").correct, tally("ce", seed=1).correct)


def test_rare_classes_gain_from_balanced_softmax() -> None:
    few = torch.arange(6, 10)
    gains = [
        tally("balanced_softmax", seed=seed).balanced_over(few) - tally("ce", seed=seed).balanced_over(few)
        for seed in range(2)
    ]
    assert min(gains) > 0.05


def test_networks_of_one_seed_begin_alike_and_take_the_head_of_their_loss() -> None:
    plain, margins = (make_network(SPACE, PATH, task().train, loss, 0) for loss in ("ce", "ldam"))
    one, two = plain.features.state_dict(), margins.features.state_dict()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert isinstance(margins.head, NormedLinear)
    assert isinstance(plain.head, torch.nn.Linear)


def test_a_confusion_matrix_does_not_depend_on_the_batch_size() -> None:
    network = make_network(SPACE, PATH, task().train, "ce", 0)
    whole = confusion(network, task().test)
    assert torch.equal(whole, confusion(network, task().test, batch_size=7))
    assert torch.equal(whole.sum(1), task().test.label_counts())


def test_what_cannot_be_trained_is_one_line() -> None:
    network = make_network(SPACE, PATH, task().train, "ce", 0)
    loss = make_loss("ce", task().counts, LossConfig())
    with pytest.raises(DataError, match="at least 2"):
        train_network(network, task().train.subset(torch.tensor([0])), loss, BRIEF, 0)
    with pytest.raises(TrainingError, match="learning rate below 1e"):
        train_network(network, task().train, loss, replace(BRIEF, learning_rate=1e38, warmup=0.0), 0)
