"""Text as a person at a terminal has it: typed in, and shown while it comes."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fl_edge.errors import DataError
from fl_edge.models.quiet import quiet

_BROKEN = "\ufffd"  # what a decoder gives for bytes that are no character, or not yet


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer of a model's folder; no code of the folder runs.

    Raises
    ------
    DataError
        There is none that can be read.
    """
    from transformers import AutoTokenizer  # noqa: PLC0415 - heavy

    try:
        with quiet():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{folder} has no tokenizer that can be read: {reason}") from None


def stop_tokens(folder: Path, tokenizer: Any) -> list[int]:
    """Return the tokens that end a text: the tokenizer's, and those of the model's generation settings."""
    from transformers import GenerationConfig  # noqa: PLC0415 - heavy

    try:
        named = GenerationConfig.from_pretrained(folder).eos_token_id
    except (OSError, ValueError):
        named = None
    found = [tokenizer.eos_token_id, *(named if isinstance(named, list) else [named])]
    return sorted({token for token in found if isinstance(token, int)})


class Conversation:
    """Turns what a person types into tokens of a prompt.

    With a chat template the prompt is the conversation so far; without one, a text to go on from, and each stands
    alone.

    Parameters
    ----------
    tokenizer
        Of Hugging Face.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._said: list[dict[str, str]] = []

    def prompt(self, typed: str) -> Tensor:
        """Return the tokens (n,) int64 of a prompt that ends with what was typed."""
        with quiet():  # whether a prompt is too long is for others to say
            if self._tokenizer.chat_template is None:
                tokens = self._tokenizer(typed)["input_ids"]
            else:
                said = [*self._said, {"role": "user", "content": typed}]
                tokens = self._tokenizer.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        return torch.tensor(tokens, dtype=torch.long)

    def answered(self, typed: str, answer: str) -> None:
        """Note what was typed and answered."""
        if self._tokenizer.chat_template is not None:
            self._said += [{"role": "user", "content": typed}, {"role": "assistant", "content": answer}]

    def forget(self) -> None:
        """Begin anew."""
        self._said.clear()


class Unfolding:
    """Shows a text while its tokens come: never a part of a character, and nothing that steers a terminal.

    Parameters
    ----------
    tokenizer
        Of Hugging Face.
    show
        Called with what is new.

    Attributes
    ----------
    text
        That was shown.
    """

    def __init__(self, tokenizer: Any, show: Callable[[str], None]) -> None:
        self._tokenizer, self._show = tokenizer, show
        self._tokens: list[int] = []
        self._from = self._shown = 0  # tokens that the newest are decoded with, and those that were shown
        self.text = ""

    def add(self, tokens: Sequence[int]) -> None:
        """Take new tokens, and show what they bring."""
        for token in tokens:
            self._tokens.append(token)
            self._unfold(whole=False)

    def end(self) -> None:
        """Show what was held back, but for what is no character."""
        self._unfold(whole=True)

    def _unfold(self, *, whole: bool) -> None:
        # a piece may look otherwise at the start of a text, so it is decoded behind the one before it
        before = self._decoded(self._tokens[self._from : self._shown])
        text = self._decoded(self._tokens[self._from :])
        if text.endswith(_BROKEN) and not whole:
            return
        new = text[len(before) :].rstrip(_BROKEN) if whole else text[len(before) :]
        self._from, self._shown = self._shown, len(self._tokens)
        if new := "".join(each for each in new if _harmless(each)):
            self.text += new
            self._show(new)

    def _decoded(self, tokens: Sequence[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


def _harmless(character: str) -> bool:
    return character in "\n\t" or unicodedata.category(character) != "Cc"
