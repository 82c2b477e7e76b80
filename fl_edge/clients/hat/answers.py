"""Answers as files on the device: the text of each grows as its tokens come."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fl_edge.files import write_whole


class AnswerFiles:
    """Writes each answer to ``<number>.txt``, behind its prompt, and its tokens beside it.

    The tokens let another process go on with the text: bytes of one character may come in two pieces.

    Parameters
    ----------
    folder
        Made when the first tokens come.
    tokenizer
        Of Hugging Face.
    prompts
        (n,) int64 each.
    """

    def __init__(self, folder: Path, tokenizer: Any, prompts: Sequence[Tensor]) -> None:
        self.folder = folder
        self._tokenizer, self._prompts = tokenizer, prompts

    def prompt(self, number: int) -> Tensor | None:
        """Return the prompt with a number; nothing after the last."""
        return self._prompts[number] if number < len(self._prompts) else None

    def hear(self, number: int, tokens: Sequence[int]) -> None:
        """Add new tokens to an answer, or begin it anew when there are none.

        Raises
        ------
        RunFolderError
            The files cannot be written.
        """
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        kept = self.folder / f"{number}.tokens"
        before = [int(word) for word in kept.read_text().split()] if tokens and kept.exists() else []
        answer = [*before, *tokens]
        write_whole(kept, " ".join(map(str, answer)) + "\n")
        text = self._tokenizer.decode([*self._prompts[number].tolist(), *answer], skip_special_tokens=True)
        write_whole(self.folder / f"{number}.txt", text + "\n")
