"""A device's side of gathering what its adapter learns from: its own states go up, the cloud's rows come down.

That the whole model teaches is HAT's; that the cloud's rows are fetched over the link, so that neither text nor
next-token labels leave the device, is *ours*.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from fl_edge.errors import ReplyError
from fl_edge.files import write_whole
from fl_edge.hat.distillation import Lessons
from fl_edge.hat.messages import Answer, Upload
from fl_edge.hat.split import DeviceModel

_ROWS = "rows"
_BATCH = 16  # sequences at once


class Study:
    """Asks the cloud about a device's texts, one sequence after the other.

    Parameters
    ----------
    model
        The device's part.
    texts
        (s, n) int64, sequences of full length.
    folder
        Where rows are kept, a file a sequence, and where those that an earlier process left are found; None: in memory
        alone.
    """

    def __init__(self, model: DeviceModel, texts: Tensor, folder: Path | None) -> None:
        self._model, self._texts, self._folder = model, texts, folder
        self._rows = dict(self._found()) if folder else dict[int, Tensor]()

    def next(self) -> Upload | None:
        """Return the states of the first sequence that has no rows yet; nothing when all have."""
        for number, tokens in enumerate(self._texts):
            if number not in self._rows:
                states = self._model.embed_and_run(tokens[None].to(self._model.device))[0]
                return Upload(number, 0, states, verify=True)
        return None

    def take_in(self, answer: Answer) -> None:
        """Keep the cloud's rows.

        Raises
        ------
        ReplyError
            Rows of a sequence that is not there, of another shape, or that are not finite.
        """
        number, rows = answer.request, answer.rows
        if not 0 <= number < len(self._texts) or not self._fits(rows):
            raise ReplyError(f"rows of shape {tuple(rows.shape)} came for sequence {number}; {self._due()} were due")
        self._rows[number] = rows
        if self._folder is not None:
            write_whole(self._file(self._folder, number), save({_ROWS: rows.contiguous()}))

    def lessons(self) -> Lessons:
        """Return what an adapter learns from.

        Raises
        ------
        ReplyError
            Sequences without rows: the device has not been taught, or another process was and left no files.
        """
        missing = len(self._texts) - len(self._rows)
        if missing:
            raise ReplyError(f"the cloud's rows are missing for {missing} of {len(self._texts)} sequences")
        states = torch.cat(
            [self._model.embed_and_run(part.to(self._model.device)).cpu() for part in torch.split(self._texts, _BATCH)]
        )
        rows = torch.stack([self._rows[number] for number in range(len(self._texts))])
        return Lessons(states, rows, torch.ones(self._texts.shape, dtype=torch.bool))

    def _fits(self, rows: Tensor) -> bool:
        due = (self._texts.shape[1], self._model.config.hidden_size)
        return tuple(rows.shape) == due and bool(torch.isfinite(rows).all())

    def _due(self) -> str:
        return f"finite ones of ({self._texts.shape[1]}, {self._model.config.hidden_size})"

    def _found(self) -> Iterator[tuple[int, Tensor]]:
        """Yield rows that are on disk; what cannot be used is fetched again."""
        assert self._folder is not None
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for number in range(len(self._texts)):
            try:
                rows = load(self._file(self._folder, number).read_bytes())[_ROWS]
            except (OSError, SafetensorError, KeyError):
                continue
            if self._fits(rows):
                yield number, rows

    @staticmethod
    def _file(folder: Path, number: int) -> Path:
        return folder / f"{number}.safetensors"
