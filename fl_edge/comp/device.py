"""A device's side of a pruning that somebody else decides: its copy of the model, its text, and the folder it fills."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_edge.comp.checkpoint import Checkpoint
from fl_edge.comp.config import CompConfig
from fl_edge.comp.history import Step
from fl_edge.comp.onlooker import Onlooker
from fl_edge.comp.output import Output
from fl_edge.comp.participant import Participant
from fl_edge.comp.pooled import Answer, Dense, Measure, Question, Similar
from fl_edge.comp.sums import Form, Sums
from fl_edge.comp.survey import similarities, skipped_losses
from fl_edge.comp.workbench import Workbench
from fl_edge.errors import ReplyError
from fl_edge.pruning import PruningPlan


class Device:
    """Answers questions about a text, follows the steps that come of them, and writes the pruned model on the way.

    Parameters
    ----------
    base
        Folder of the unpruned model.
    folder
        Where the pruned one goes.
    tokens
        (s, n) int64: the device's text.
    config
        Of the method.
    accelerator
        Where layers are computed.
    """

    def __init__(self, base: Path, folder: Path, tokens: Tensor, config: CompConfig, accelerator: torch.device) -> None:
        self.folder, self.config, self._tokens = folder, config, tokens
        self._checkpoint = Checkpoint(base, accelerator)
        self._bench = Workbench(self._checkpoint)
        self._onlooker = Onlooker(self._bench, tokens)
        self._participant: Participant | None = None
        self._output: Output | None = None

    @property
    def steps(self) -> int:
        """How many steps it has followed."""
        return 0 if self._participant is None else self._participant.steps

    @property
    def bytes_read(self) -> int:
        """From the model's files."""
        return self._checkpoint.bytes_read

    def follow(self, first: int, steps: list[Step], *, measures: bool) -> None:
        """Take the steps that it has not taken; where the first of them is not its next one, none.

        Parameters
        ----------
        first
            Number of the first of ``steps``.
        measures
            Whether it takes its text along.

        Raises
        ------
        ReplyError
            Steps that do not follow each other.
        """
        if self.steps < first:
            return
        for step in steps[self.steps - first :]:
            self._begun(measures).follow(step)

    def answer(self, question: Question, form: Form) -> Answer | None:
        """Return its sums, or nothing where it has to follow more steps first.

        Raises
        ------
        ReplyError
            A question about a layer that it has passed.
        """
        if isinstance(question, Dense):
            return self._onlooker.sums(question.layers)
        if isinstance(question, Measure):
            if question.steps != self.steps:
                return None
            statistics, weight = self._begun(measures=True).statistics(question.layer, question.unit)
            return {(question.layer, question.unit): Sums.of(statistics, weight, form)}
        if isinstance(question, Similar):
            return similarities(self._checkpoint, self._tokens, question.removed)
        return skipped_losses(self._checkpoint, self._tokens, question.removed, question.candidates)

    def finish(self, plan: PruningPlan) -> None:
        """Make a model of what was written.

        Raises
        ------
        RunFolderError
            A disk that is full or read-only.
        ReplyError
            Layers that are missing.
        """
        if self._participant is None or self._participant.layer != len(plan.layers):
            raise ReplyError("it has not followed every step of the pruning that is to be finished")
        output = self._writing()
        output.outside()
        output.finish(plan)

    def snapshot(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Return (tensors, record) of where it stands, or nothing where that is in the middle of a layer."""
        if self._participant is not None and self._participant.between:
            part = self._participant
            record = {"steps": part.steps, "layer": part.layer, "place": part.place, "scale": part.scale}
            return part.snapshot(), {**record, "measures": part.measures}
        if self._participant is None and self._onlooker.layer >= 0:
            return self._onlooker.snapshot(), {"steps": 0, "looked": self._onlooker.layer}
        return None

    def restore(self, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
        """Stand where a snapshot was taken; the layers that were written by then lie in the folder."""
        if "looked" in record:
            self._onlooker.restore(tensors, int(record["looked"]))
            return
        self._participant = self._make(measures=bool(record["measures"]))
        steps, layer, place = (int(record[name]) for name in ("steps", "layer", "place"))
        self._participant.restore(tensors, steps, layer, place, float(record["scale"]))

    def _begun(self, measures: bool) -> Participant:
        if self._participant is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._onlooker = Onlooker(self._bench, self._tokens)  # gives its hidden states back
            self._participant = self._make(measures)
            self._participant.begin()
        return self._participant

    def _make(self, measures: bool) -> Participant:
        def keep(place: int, tensors: dict[str, Tensor]) -> None:
            self._writing().layer(place, tensors)

        return Participant(self._bench, self._tokens if measures else None, self.config.target, keep)

    def _writing(self) -> Output:
        if self._output is None:
            self._output = Output(self._checkpoint, self.folder)
        return self._output
