"""Byte-level BPE tokenizers trained on local text: the same texts give the same files on any machine.

WordPiece, BERT's own kind, is not used: its trainer in the tokenizers library walks a hash map, so that two processes
get two vocabularies.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PAD, _CLASS, _SEPARATOR = "[PAD]", "[CLS]", "[SEP]"
_END = "<|end|>"


def encoder_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer in lower case with at most ``size`` tokens, at least 259.

    A text becomes ``[CLS] text [SEP]``, a pair ``[CLS] one [SEP] other [SEP]``.
    """
    from tokenizers import normalizers, processors  # noqa: PLC0415 - heavy
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - heavy

    # a space before the first word too: it is the same word elsewhere
    tokenizer = _byte_pairs(texts, size, [_PAD, _CLASS, _SEPARATOR], normalizers.Lowercase(), first_space=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_CLASS} $A {_SEPARATOR}",
        pair=f"{_CLASS} $A {_SEPARATOR} $B:1 {_SEPARATOR}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (_CLASS, _SEPARATOR)],
    )
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer, pad_token=_PAD, cls_token=_CLASS, sep_token=_SEPARATOR
    )


def decoder_tokenizer(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with at most ``size`` tokens, at least 257; its one special token ends a text and pads."""
    from transformers import PreTrainedTokenizerFast  # noqa: PLC0415 - heavy

    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=_byte_pairs(texts, size, [_END], None, first_space=False), eos_token=_END, pad_token=_END
    )


def _byte_pairs(texts: Iterable[str], size: int, special: list[str], normalizer: Any, *, first_space: bool) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 - heavy

    tokenizer = Tokenizer(models.BPE())
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=first_space)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
