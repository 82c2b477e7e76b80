"""Counts of right answers by class: what devices report, added exactly, and the accuracies that are read off them.

Source: class-mean accuracy as the score of a search on a tail is ours (specification, section 3), and so are expected
right answers; the groups many, medium and few are the long-tail literature's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fl_edge.errors import DataError
from fl_edge.imbnas.config import TailConfig

GROUPS = ("many", "medium", "few")

_GRID = 2.0**32  # probabilities are multiples of its inverse; those of up to 2^21 images add up exactly


@dataclass(frozen=True, eq=False)  # tensors have no single truth value to compare by
class Tally:
    """Right answers and samples of every class. They add up exactly: a sum over devices does not depend on its order.

    Attributes
    ----------
    correct
        int64 (C,); expected right answers, float64 multiples of 2^-32.
    total
        int64 (C,).
    """

    correct: Tensor
    total: Tensor

    @classmethod
    def empty(cls, classes: int) -> Tally:
        """Return the tally of no samples, where sums begin."""
        return cls(torch.zeros(classes, dtype=torch.int64), torch.zeros(classes, dtype=torch.int64))

    @classmethod
    def of(cls, predictions: Tensor, labels: Tensor, classes: int) -> Tally:
        """Count predicted and true classes, both int64 (n,)."""
        hits = labels[predictions == labels]
        return cls(torch.bincount(hits, minlength=classes).cpu(), torch.bincount(labels, minlength=classes).cpu())

    @classmethod
    def expected(cls, probabilities: Tensor, labels: Tensor) -> Tally:
        """Count how many would be right if every answer were drawn by its probabilities, float64 (n, C).

        An image counts by the probability of its own class, rounded.
        """
        right = (probabilities.gather(1, labels[:, None]).squeeze(1) * _GRID).round_().div_(_GRID)
        classes = probabilities.shape[1]
        correct = right.new_zeros(classes).index_add_(0, labels, right)
        return cls(correct.cpu(), torch.bincount(labels, minlength=classes).cpu())

    @classmethod
    def from_confusion(cls, matrix: Tensor) -> Tally:
        """Return the tally of a confusion matrix; see :func:`confusion_matrix`."""
        return cls(matrix.diagonal().clone(), matrix.sum(dim=1))

    def __add__(self, other: Tally) -> Tally:
        """Return the tally of both sample sets together."""
        return Tally(self.correct + other.correct, self.total + other.total)

    @property
    def per_class(self) -> Tensor:
        """Accuracy of every class in [0, 1], float64 (C,); NaN for a class without samples."""
        return self.correct / self.total.double()

    @property
    def balanced(self) -> float:
        """Mean of the classes' accuracies, over those that have samples: how often a class occurs plays no part.

        Raises
        ------
        DataError
            No class has samples.
        """
        return self.balanced_over(torch.arange(len(self.total)))

    @property
    def accuracy(self) -> float:
        """Share of all samples that were right; errors as :attr:`balanced`."""
        if not (total := int(self.total.sum())):
            raise DataError(f"none of {len(self.total)} classes has samples to be scored on")
        return float(self.correct.sum()) / total

    def balanced_over(self, classes: Tensor) -> float:
        """Return the class-mean accuracy of some classes, int64 (k,); errors as :attr:`balanced`."""
        scored = classes[self.total[classes] > 0]
        if not len(scored):
            raise DataError(f"none of {len(classes)} classes has samples to be scored on")
        return float(self.per_class[scored].mean())


def confusion_matrix(predictions: Tensor, labels: Tensor, classes: int) -> Tensor:
    """Return how often each class (rows) was taken for each (columns), int64 (C, C); matrices of devices add up."""
    pairs = torch.bincount(labels * classes + predictions, minlength=classes * classes)
    return pairs.reshape(classes, classes).cpu()


def groups(counts: Tensor, many: float = 100, few: float = 20) -> dict[str, Tensor]:
    """Return the classes of more than ``many`` training images, of fewer than ``few``, and those between.

    Parameters
    ----------
    counts
        n_c of the training set, (C,).
    many, few
        Bounds in images; the defaults are the literature's.

    Returns
    -------
    dict
        ``many``, ``medium`` and ``few`` to int64 (k,), k may be 0.
    """
    found = (counts > many, (counts >= few) & (counts <= many), counts < few)
    return {name: mask.nonzero().squeeze(1).cpu() for name, mask in zip(GROUPS, found, strict=True)}


def group_accuracies(tally: Tally, counts: Tensor, config: TailConfig) -> dict[str, float]:
    """Return the class-mean accuracy of every group that has classes with samples in the tally.

    Parameters
    ----------
    tally
        Of the test set.
    counts
        n_c of the *training* set, (C,).
    config
        Bounds, and whether they shrink with the largest class.
    """
    factor = int(counts.max()) / config.group_scale if config.group_scale else 1.0
    found = groups(counts, config.many * factor, config.few * factor)
    return {name: tally.balanced_over(classes) for name, classes in found.items() if tally.total[classes].any()}
