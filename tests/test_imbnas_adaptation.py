"""Adapting a super-network and scoring its paths: what stays, what is trained, and that scores add up."""

import copy
import functools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fl_edge.data.config import DataConfig
from fl_edge.data.images import ImageSet, load_test, load_train
from fl_edge.errors import ConfigError, DataError, TrainingError
from fl_edge.imbnas.adaptation import OWN, PROCEDURES, Adaptation, Source, Turn, adapt, train_head
from fl_edge.imbnas.batchnorm import norms
from fl_edge.imbnas.config import (
    AdaptConfig,
    BatchNormConfig,
    HeadConfig,
    LossConfig,
    SearchConfig,
    SuperConfig,
    TailConfig,
)
from fl_edge.imbnas.longtail import LongTailTask, make_task
from fl_edge.imbnas.losses import make_head, make_loss
from fl_edge.imbnas.scoring import Scorer, calibration, count, features
from fl_edge.imbnas.search import evolve, winner
from fl_edge.imbnas.space import Space, Stage
from fl_edge.imbnas.supernet import Supernet
from fl_edge.imbnas.supertraining import train_supernet

SPACE = Space(4, (Stage(4, 2, 1), Stage(8, 1, 2)), ("conv3", "sep3", "identity"))
BRIEF = AdaptConfig(
    head=HeadConfig(epochs=12, batch_size=32),
    scratch=SuperConfig(epochs=2),
    batchnorm=BatchNormConfig(images=64),
)
PATH = (0, 1, 0)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@functools.cache
def digits() -> tuple[ImageSet, ImageSet]:
    return load_train(DataConfig(), 0), load_test(DataConfig(), 0)


@functools.cache
def task() -> LongTailTask:
    train, test = digits()
    return make_task(train, test, TailConfig(ratio=20, validation_per_class=8), seed=0)


@functools.cache
def source() -> Source:
    """Return a super-network that was trained for a few epochs; tests must leave it as it is."""
    supernet = Supernet(SPACE, 1, generator())
    head = make_head("ce", SPACE.features, 10, generator(1))
    train_supernet(supernet, head, digits()[0], SuperConfig(epochs=6), seed=0)
    supernet.zero_grad()
    return Source(supernet, head, digits()[0])


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("name", list(PROCEDURES))
def test_every_procedure_does_what_its_attributes_say_and_leaves_the_source_alone(name: str) -> None:
    """The backbone of P1 is the same before and after, to the bit (test 4)."""
    procedure = PROCEDURES[name]
    before = weights(source().supernet), weights(source().head)
    adapted = adapt(procedure, source(), task(), BRIEF, seed=3)
    scorer = Scorer(adapted, BRIEF, seed=3)
    assert 0 <= scorer.tally(PATH, task().validation).balanced <= 1
    assert same(before[0], weights(source().supernet))
    assert same(before[1], weights(source().head))
    assert all(parameter.grad is None for parameter in source().supernet.parameters())
    trained = procedure.backbone in ("tuned", "scratch")
    assert (adapted.supernet is source().supernet) != trained
    assert same(weights(adapted.supernet), before[0]) != trained
    assert (adapted.head is None) == (procedure.head == "own")
    assert (adapted.head is source().head) == (procedure.head == "kept")
    assert (adapted.images is source().images) == (name == "P0")


def test_the_same_seed_gives_the_same_head_and_another_one_another() -> None:
    one, two, other = (adapt(PROCEDURES["P1"], source(), task(), BRIEF, seed).head for seed in (1, 1, 2))
    assert one is not None
    assert two is not None
    assert other is not None
    assert same(weights(one), weights(two))
    assert not same(weights(one), weights(other))


def test_a_tuned_backbone_starts_from_the_source_and_one_from_scratch_does_not() -> None:
    start = next(source().supernet.parameters())
    moved = {}
    for name in ("P2", "P3"):
        weight = next(adapt(PROCEDURES[name], source(), task(), BRIEF, seed=3).supernet.parameters())
        moved[name] = float((weight - start).detach().norm() / start.detach().norm())
    assert 0 < moved["P2"] < 0.5 < moved["P3"]


def test_the_rate_of_a_tuned_backbone_is_its_own() -> None:
    still = replace(BRIEF, head=replace(BRIEF.head, backbone_rate=0.0))
    adapted = adapt(PROCEDURES["P2"], source(), task(), still, seed=3)
    assert adapted.supernet is not source().supernet
    assert same(weights(adapted.supernet), weights(source().supernet))
    assert adapted.head is not None
    fixed = adapt(PROCEDURES["P1"], source(), task(), BRIEF, seed=3).head
    assert same(weights(adapted.head), weights(fixed))  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["P0", "P1"])
def test_statistics_are_those_of_the_source_without_adaptation_and_of_the_target_with_it(name: str) -> None:
    adapted = adapt(PROCEDURES[name], source(), task(), BRIEF, 0)
    Scorer(adapted, BRIEF, seed=5).prepare(PATH)
    images = source().images if name == "P0" else task().train
    inputs = torch.cat(calibration(images, BRIEF.batchnorm, seed=5))
    assert len(inputs) == BRIEF.batchnorm.images
    weight = next(adapted.supernet.parameters())
    channels = torch.nn.functional.conv2d(inputs, weight, padding=1).detach()
    stored = norms(adapted.supernet, PATH)[0]
    torch.testing.assert_close(stored.mean, channels.mean((0, 2, 3)), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(stored.variance, channels.var((0, 2, 3), correction=0), atol=1e-5, rtol=1e-4)


def test_a_target_of_other_classes_gets_a_head_even_without_adaptation() -> None:
    train, test = digits()

    def four(images: ImageSet) -> ImageSet:
        return replace(images.subset((images.labels < 4).nonzero().squeeze(1)), classes=list("abcd"))

    small = make_task(four(train), four(test), TailConfig(ratio=5), seed=0)
    adapted = adapt(PROCEDURES["P0"], source(), small, BRIEF, seed=0)
    assert adapted.head is not None
    assert adapted.head is not source().head
    assert same(weights(adapted.supernet), weights(source().supernet))
    assert len(Scorer(adapted, BRIEF, 0).tally(PATH, small.validation).total) == 4


def test_retrained_heads_are_better_than_chance_and_own_heads_better_still() -> None:
    scores = {}
    for name in ("P1", "own"):
        score = Scorer(adapt(PROCEDURES[name], source(), task(), BRIEF, 0), BRIEF, 0).on(task().test)
        scores[name] = sum(score(path) for path in SPACE.all()) / SPACE.size
    assert scores["P1"] > 0.12
    assert scores["own"] > scores["P1"] + 0.1


def test_paths_of_devices_are_the_same_and_batches_are_not() -> None:
    """Paths come from the round's seed, batches from the device's; a device's part follows the global progress."""
    seen: dict[str, list[float]] = {}
    loss = make_loss("ce", task().counts, LossConfig())
    paths: dict[str, list[tuple[int, ...]]] = {}
    for device in ("a", "b"):
        asked: list[tuple[int, ...]] = []
        supernet = copy.deepcopy(source().supernet)
        supernet.register_forward_pre_hook(lambda module, inputs, asked=asked: asked.append(inputs[1]))
        progress: list[float] = []
        head = make_head("ce", SPACE.features, 10, generator())

        def noting(logits: Tensor, labels: Tensor, done: float, progress: list[float] = progress) -> Tensor:
            progress.append(done)
            return loss(logits, labels, done)

        train_head(supernet, head, task().train, noting, BRIEF.head, 0, turn=Turn(3, 5, device))
        seen[device], paths[device] = progress, asked
        weights_of = head.weight.detach().clone()
        seen.setdefault("sums", []).append(float(weights_of.sum()))
    assert paths["a"] == paths["b"]
    assert len(set(paths["a"])) > 1
    assert seen["sums"][0] != seen["sums"][1]
    assert seen["a"] == sorted(seen["a"])
    assert 3 / 5 == seen["a"][0] <= seen["a"][-1] < 4 / 5


def test_the_head_sees_re_weighting_from_its_switch_on() -> None:
    """Before drw_start P1 is P1-CE, to the bit; a switch at 0 differs from the first step on."""
    heads = {}
    for start in (0.0, 1.0):
        config = replace(BRIEF, loss=LossConfig(drw_start=start))
        heads[start] = adapt(PROCEDURES["P1"], source(), task(), config, 0).head
    plain = adapt(PROCEDURES["P1-CE"], source(), task(), BRIEF, 0).head
    assert plain is not None
    assert all(head is not None for head in heads.values())
    assert same(weights(heads[1.0]), weights(plain))  # type: ignore[arg-type]
    assert not same(weights(heads[0.0]), weights(plain))  # type: ignore[arg-type]


@given(shards=st.lists(st.integers(0, 5), min_size=80, max_size=80), name=st.sampled_from(["P1", "own"]))
@settings(max_examples=15, deadline=None)
def test_tallies_of_shards_add_up_to_the_central_one(shards: list[int], name: str) -> None:
    """Federated score = centralised score, exactly (test 10)."""
    scorer = scorer_of(name)
    whole = scorer.tally(PATH, task().validation)
    head = scorer.prepare(PATH)
    owners, supernet, procedure = torch.tensor(shards), scorer.adapted.supernet, scorer.adapted.procedure
    parts = [
        count(supernet, head, PATH, task().validation.subset((owners == device).nonzero().squeeze(1)), procedure.score)
        for device in range(6)
    ]
    total = functools.reduce(lambda one, two: one + two, parts)
    assert torch.equal(total.correct, whole.correct)
    assert torch.equal(total.total, whole.total)
    assert total.balanced == whole.balanced


@functools.cache
def scorer_of(name: str) -> Scorer:
    return Scorer(adapt(PROCEDURES[name], source(), task(), BRIEF, 0), BRIEF, 0)


def test_a_score_does_not_depend_on_which_paths_were_scored_before() -> None:
    score = scorer_of("P1").on(task().validation)
    first = [score(path) for path in SPACE.all()]
    again = [score(path) for path in reversed(list(SPACE.all()))]
    assert first == again[::-1]
    assert len(set(first)) > 1


def test_own_heads_are_scored_by_the_probability_of_the_right_class_and_shared_ones_by_accuracy() -> None:
    validation = task().validation
    for name in ("P1", "own"):
        scorer = scorer_of(name)
        head = scorer.prepare(PATH)
        with torch.no_grad():
            answers = head(features(source().supernet, PATH, validation)).double().softmax(1)
        right = answers.argmax(1) == validation.labels if name == "P1" else answers[range(80), validation.labels]
        means = [float(right[validation.labels == label].double().mean()) for label in range(10)]
        assert scorer.on(validation)(PATH) == pytest.approx(sum(means) / 10, abs=1e-7)


def test_search_over_a_super_network_avoids_the_useless_option() -> None:
    """A zero block lets nothing through (test 9), here with a trained super-network and own heads."""
    space = Space(4, (Stage(4, 2, 1), Stage(8, 1, 2)), ("conv3", "sep3", "zero"))
    supernet, head = Supernet(space, 1, generator()), make_head("ce", space.features, 10, generator(1))
    train_supernet(supernet, head, digits()[0], SuperConfig(epochs=3), seed=0)
    adapted = adapt(OWN, Source(supernet, head, digits()[0]), task(), BRIEF, 0)
    config = SearchConfig(population=6, top=2, generations=2, mutants=2, crosses=2, mutation=0.3)
    history = evolve(space, Scorer(adapted, BRIEF, 0).on(task().validation), config, seed=0)
    dead = [entry for entry in history if "zero" in space.names(entry.architecture)]
    assert dead
    assert all(entry.score == pytest.approx(0.1, abs=0.05) for entry in dead)
    assert "zero" not in space.names(winner(history).architecture)
    assert winner(history).score > 0.4


@pytest.mark.parametrize("name", ["P1", "P2", "own"])
def test_classes_of_one_or_no_image(name: str) -> None:
    rare = task().train
    keep = torch.cat([(rare.labels == label).nonzero().squeeze(1)[:size] for label, size in ((0, 40), (1, 9), (2, 1))])
    tail = replace(task(), train=rare.subset(keep))
    assert tail.counts.tolist() == [40, 9, 1, 0, 0, 0, 0, 0, 0, 0]
    tally = Scorer(adapt(PROCEDURES[name], source(), tail, BRIEF, 0), BRIEF, 0).tally(PATH, tail.validation)
    assert 0 < tally.balanced <= 0.4
    assert tally.correct[3:].sum() <= (0.02 if name == "own" else 0) * tally.total[3:].sum()


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        (("thawed", "shared", "ce"), "backbones are source, frozen, tuned, scratch"),
        (("frozen", "none", "ce"), "heads kept, shared, own"),
        (("tuned", "kept", "ce"), "head=kept does not go with backbone=tuned"),
        (("source", "own", "ce"), "head=own does not go with backbone=source"),
        (("frozen", "own", "ldam"), "must be one of ce, cb, drw, balanced_softmax"),
        (("frozen", "own", "ce", "loss"), "score=loss is not allowed; it must be one of accuracy, probability"),
    ],
)
def test_attributes_that_do_not_go_together_are_one_line(attributes: tuple[str, ...], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        Adaptation(*attributes)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_adapted_or_scored_is_one_line() -> None:
    empty = task().train.subset(torch.tensor([], dtype=torch.int64))
    loss = make_loss("ce", task().counts, LossConfig())
    head = make_head("ce", SPACE.features, 10, generator())
    with pytest.raises(DataError, match="without images"):
        train_head(source().supernet, head, empty, loss, BRIEF.head, 0)
    with pytest.raises(DataError, match="no images"):
        scorer_of("P1").on(empty)
    wild = replace(BRIEF.head, learning_rate=1e38)
    with pytest.raises(TrainingError, match="learning rate below 1e"):
        train_head(source().supernet, head, task().train, loss, wild, 0)
