"""What `benchmarks imbnas` compares: targets, what truth is measured on, trainings side by side."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.imbnas_ranks import adapting
from benchmarks.imbnas_tasks import OTHER, PAIRS, SAME, SYNTHETIC, architectures, fixed, make_target, tail, unseen
from benchmarks.imbnas_truth import Training, train_together
from fl_edge.data.images import ImageSet, load_train
from fl_edge.imbnas.source import balanced_source

RECIPE = PAIRS[SAME].truth


def rows(images: ImageSet) -> set[bytes]:
    return {image.numpy().tobytes() for image in images.images}


@pytest.mark.parametrize("pair", [SAME, OTHER])
def test_truth_is_measured_on_what_nothing_of_the_target_sees(pair: str) -> None:
    task, rest = make_target(pair, 100, 0), unseen(pair, 100, 0)
    assert not rows(rest) & (rows(task.train) | rows(task.validation))
    whole = make_target(pair, 1, 0)
    assert rows(rest) == rows(task.test) | (rows(whole.train) - rows(task.train))
    assert (rest.label_counts() >= task.test.label_counts()).all()


def test_other_classes_share_no_image_with_the_target() -> None:
    task = make_target(OTHER, 100, 0)
    assert task.train.classes == ["1", "3", "5", "7", "9"]
    whole = load_train(PAIRS[OTHER].data, 0)
    even = replace(whole.subset((whole.labels % 2 == 0).nonzero().squeeze(1)), classes=whole.classes)
    assert not rows(even) & rows(task.train)
    assert int(task.train.labels.max()) == 4


def test_the_source_of_the_same_classes_has_no_validation_image() -> None:
    task = make_target(SAME, 100, 0)
    images = balanced_source(load_train(PAIRS[SAME].data, 0), task.test, tail(1), 0)
    assert not rows(images) & rows(task.validation)
    assert rows(task.train) <= rows(images)


def test_trainings_side_by_side_do_not_know_of_each_other() -> None:
    """Together or alone, a network ends with the same accuracy; sums in another order may turn a single image."""
    torch.set_num_threads(1)
    trainings = [Training(make_target(SAME, ratio, 0).train, unseen(SAME, ratio, 0), seed) for ratio, seed in
                 [(10, 0), (100, 0), (100, 1)]]  # fmt: skip
    space, path = PAIRS[SAME].space, (3, 3, 0, 3)
    together = train_together(space, path, trainings, RECIPE, 30)
    alone = [train_together(space, path, [each], RECIPE, 30)[0] for each in trainings]
    np.testing.assert_allclose(together, alone, atol=0.02)
    assert len(set(together)) == 3


def test_more_steps_get_more_right() -> None:
    torch.set_num_threads(1)
    training = [Training(make_target(OTHER, 1, 0).train, unseen(OTHER, 1, 0), 0)]
    few, many = (train_together(PAIRS[OTHER].space, (0, 0, 0, 0), training, RECIPE, steps)[0] for steps in (2, 80))
    assert few < 0.5
    assert many > 0.8


def test_paths_are_all_of_the_space_or_a_draw_with_the_small_resnet() -> None:
    assert len(architectures(SAME, quick=False)) == len(set(architectures(SAME, quick=False))) == 192
    for pair, quick in ((SYNTHETIC, False), (SAME, True)):
        drawn = architectures(pair, quick)
        assert drawn[0] == fixed(pair)
        assert len(set(drawn)) == len(drawn) == 20
        assert drawn == architectures(pair, quick)


def test_a_search_from_scratch_has_as_many_steps_as_the_source() -> None:
    for ratio in (10, 100):
        recipe = adapting(SAME, ratio, quick=False).scratch
        steps = recipe.epochs * -(-len(make_target(SAME, ratio, 0).train) // recipe.batch_size)
        source = PAIRS[SAME].supernet.epochs * -(-len(make_target(SAME, 1, 0).train) // recipe.batch_size)
        assert source <= steps < 1.1 * source
