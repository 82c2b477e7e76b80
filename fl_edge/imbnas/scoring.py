"""The score of a path: a class mean over a validation split, after its BatchNorm statistics were estimated anew.

Source: the fitness of SPOS, accuracy after re-estimation, with the class mean in place of the plain one (specification,
sections 6 and 7). *Ours*: a head of its own for each candidate where the procedure says so, and the probability of the
right class in place of whether it was the most probable one: a balanced split is small, a head that is solved to its
optimum is as sure as its ridge lets it be, and a mean of probabilities changes with every image where that of right
answers has steps.

A tally adds up exactly, so tallies of any shards of the validation split come to that of the whole.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from fl_edge.data.images import ImageSet
from fl_edge.errors import DataError
from fl_edge.imbnas.adaptation import Adapted
from fl_edge.imbnas.batchnorm import statistics, store
from fl_edge.imbnas.chunks import in_chunks
from fl_edge.imbnas.config import AdaptConfig, BatchNormConfig
from fl_edge.imbnas.heads import fit_head, make_objective
from fl_edge.imbnas.search import Score
from fl_edge.imbnas.space import Architecture
from fl_edge.imbnas.supernet import Supernet
from fl_edge.imbnas.tally import Tally
from fl_edge.seeding import torch_rng


@dataclass(eq=False)
class Scorer:
    """Scores paths of an adapted super-network, one after another.

    Parameters
    ----------
    adapted
        See :func:`fl_edge.imbnas.adaptation.adapt`.
    config
        How many images the statistics take; ridge and loss of own heads.
    seed
        Of the experiment; decides which images the statistics take, the same for all paths.
    """

    adapted: Adapted
    config: AdaptConfig
    seed: int

    def __post_init__(self) -> None:
        device = next(self.adapted.supernet.parameters()).device
        self._images = on_device(self.adapted.images, device)
        self._batches = calibration(self._images, self.config.batchnorm, self.seed)

    def prepare(self, architecture: Architecture) -> nn.Module:
        """Store a path's statistics in the super-network and return the head that goes with it."""
        supernet = self.adapted.supernet
        found = statistics(supernet, architecture, self._batches, layerwise=self.config.batchnorm.layerwise)
        store(supernet, architecture, found)
        if self.adapted.head is not None:
            return self.adapted.head
        counts = self._images.label_counts()
        objective = make_objective(self.adapted.procedure.loss, counts, self.config.loss)
        inputs = features(supernet, architecture, self._images)
        return fit_head(inputs, self._images.labels, objective, self.config.head)

    def tally(self, architecture: Architecture, images: ImageSet) -> Tally:
        """Return a path's right answers by class, counted or expected, on a validation split or a shard of it."""
        head = self.prepare(architecture)
        return count(self.adapted.supernet, head, architecture, images, self.adapted.procedure.score)

    def on(self, images: ImageSet) -> Score:
        """Return the score of paths on a validation split, a class mean in [0, 1], as searches take it.

        Raises
        ------
        DataError
            A validation split without images.
        """
        if not len(images):
            raise DataError("the validation split has no images; a search needs at least one to score candidates")
        return lambda architecture: self.tally(architecture, images).balanced


def calibration(images: ImageSet, config: BatchNormConfig, seed: int) -> list[Tensor]:
    """Return the images that statistics are estimated from, float32 (b, c, h, w) each: a draw, or all there are."""
    chosen = torch.randperm(len(images), generator=torch_rng(seed, "batchnorm"))[: config.images]
    inputs, _ = images.batch(chosen.to(images.labels.device))
    return list(torch.split(inputs, config.batch_size))


@torch.no_grad()
def features(supernet: Supernet, architecture: Architecture, images: ImageSet) -> Tensor:
    """Return a path's features (n, d) with its stored statistics, images in order."""
    supernet.eval()
    return in_chunks(lambda part: supernet(part, architecture), images.batch()[0])


@torch.no_grad()
def count(supernet: Supernet, head: nn.Module, architecture: Architecture, images: ImageSet, score: str) -> Tally:
    """Return a path's right answers by class, counted or expected, with its stored statistics.

    An image's answer does not depend on the others, to the bit, so tallies of shards add up to that of the whole.

    Parameters
    ----------
    images
        A validation split, or one device's shard of it; it may be empty.
    score
        See :class:`fl_edge.imbnas.adaptation.Adaptation`.
    """
    supernet.eval()
    head.eval()
    images = on_device(images, next(supernet.parameters()).device)
    scores = in_chunks(lambda part: head(supernet(part, architecture)), images.batch()[0])
    if score == "accuracy":
        return Tally.of(scores.argmax(1), images.labels, len(images.classes))
    return Tally.expected(in_chunks(lambda part: part.double().softmax(1), scores), images.labels)


def on_device(images: ImageSet, device: torch.device) -> ImageSet:
    """Return the set with its tensors on a device."""
    return replace(images, images=images.images.to(device), labels=images.labels.to(device))
