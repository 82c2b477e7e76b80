"""Texts in the form that models of `transformers` take: one tokenised Hugging Face data set for a device, one to test.

Where they come from (:class:`~fl_edge.data.config.TextConfig`): docstrings of installed libraries to classify, their
signatures as answers to learn, or any data set with a column of texts in a local folder or on the hub.
"""

from __future__ import annotations

import functools
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fl_edge.data.columns import classes, label_column, label_values, pick, testing_split, training_split
from fl_edge.data.config import TextConfig
from fl_edge.data.docstrings import LIBRARIES, docstring_texts
from fl_edge.data.holdout import hold_out
from fl_edge.data.hub import open_splits
from fl_edge.data.instructions import instruction_pairs
from fl_edge.data.partition import device_indices
from fl_edge.data.tokens import tokenize_answers, tokenize_texts
from fl_edge.errors import DataError

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_LOADING = threading.RLock()  # clients in threads of one process would load the same data side by side
_TEXT_NAMES = ("text", "sentence", "content", "instruction", "prompt", "question", "sentence1", "premise")
_CATEGORY_NAMES = ("category", "label", "labels", "topic", "task", "source")


@dataclass(frozen=True, eq=False)
class Texts:
    """One split, not tokenised.

    Attributes
    ----------
    rows
        The Hugging Face data set.
    columns
        Of the text, and of the second text or the answer where there is one.
    labels
        int64 (n,), in [0, len(classes)): what is to be predicted, or the category of an instruction.
    classes
        Names.
    """

    rows: Dataset
    columns: tuple[str, ...]
    labels: NDArray[np.int64]
    classes: list[str]

    def take(self, indices: NDArray[np.int64]) -> Texts:
        """Return some rows, in that order."""
        return Texts(self.rows.select(indices), self.columns, self.labels[indices], self.classes)

    def strings(self) -> list[list[str]]:
        """Return the texts of every column.

        Raises
        ------
        DataError
            A row without text.
        """
        found = [list(self.rows[column][:]) for column in self.columns]
        for column, values in zip(self.columns, found, strict=True):
            if (missing := next((row for row, value in enumerate(values) if not isinstance(value, str)), -1)) >= 0:
                raise DataError(f"row {missing} holds no text in {column}")
        return found


def load_text_device(
    config: TextConfig, seed: int, device: int, num_devices: int, tokenizer: PreTrainedTokenizerBase
) -> Dataset:
    """Return the training samples of one device, tokenised.

    Parameters
    ----------
    config
        Data set and partition.
    seed
        Of the experiment; decides the partition, and the test split where a data set has none.
    device
        Index, 0 to ``num_devices - 1``.
    num_devices
        Devices that share the training set.
    tokenizer
        Of the model that will be trained.

    Returns
    -------
    Dataset
        Columns ``input_ids``, ``attention_mask``, ``labels``, at most ``config.max_length`` tokens a row. To classify,
        ``labels`` is one ClassLabel a row; to answer, a token id or -100 a token.

    Raises
    ------
    DataError
        A data set that is not there or does not hold what the config names; a partition that cannot be; a device that
        is not there.
    """
    if not 0 <= device < num_devices:
        raise DataError(
            f"device {device} has no data; with {num_devices} devices it must be at least 0 and below {num_devices}"
        )
    train, _ = open_texts(config, seed)
    with _LOADING:
        partition = _partition(type(config)(**vars(config)), seed, num_devices)
    if isinstance(partition, DataError):
        raise DataError(str(partition))
    return tokenized(train.take(partition[device]), config, tokenizer)


def load_text_test(config: TextConfig, seed: int, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Return the test set, tokenised; see :func:`load_text_device`."""
    return tokenized(open_texts(config, seed)[1], config, tokenizer)


def text_classes(config: TextConfig, seed: int) -> list[str]:
    """Return the names of the classes, or of the categories of instructions."""
    return open_texts(config, seed)[0].classes


def head_classes(config: TextConfig, seed: int) -> list[str] | None:
    """Return the classes that a model's head tells apart; None for a causal language model, which has no such head."""
    return None if config.answers else text_classes(config, seed)


def open_texts(config: TextConfig, seed: int) -> tuple[Texts, Texts]:
    """Return (training, test) split, not tokenised; cached by process. See :func:`load_text_device`."""
    with _LOADING:
        return _open(config.loading(), seed)


def tokenized(texts: Texts, config: TextConfig, tokenizer: PreTrainedTokenizerBase) -> Dataset:
    """Tokenise a split; see :func:`load_text_device`."""
    import datasets  # noqa: PLC0415 - heavy

    if config.max_length > tokenizer.model_max_length:
        raise DataError(f"max_length={config.max_length} is not possible; the model takes {tokenizer.model_max_length}")
    first, *second = texts.strings()
    if config.answers:
        return datasets.Dataset.from_dict(tokenize_answers(tokenizer, first, second[0], config.max_length))
    values: dict[str, Any] = tokenize_texts(tokenizer, first, second[0] if second else None, config.max_length)
    tokens = datasets.List(datasets.Value("int64"))
    features = dict.fromkeys(values, tokens) | {"labels": datasets.ClassLabel(names=texts.classes)}
    return datasets.Dataset.from_dict(values | {"labels": texts.labels}, features=datasets.Features(features))


@functools.lru_cache(maxsize=4)
def _partition(config: TextConfig, seed: int, num_devices: int) -> list[NDArray[np.int64]] | DataError:
    """Return the partition, or why there is none: one that cannot be takes seconds, and every device asks for it."""
    try:
        return device_indices(open_texts(config, seed)[0].labels, num_devices, config, seed)
    except DataError as error:
        return error


@functools.lru_cache(maxsize=2)
def _open(config: TextConfig, seed: int) -> tuple[Texts, Texts]:
    train, test = _bundled(config) if config.source in config.BUNDLED else _stored(config)
    if test is None:
        kept, held = hold_out(train.labels, config, seed)
        return train.take(kept), train.take(held)
    return train, test


def _bundled(config: TextConfig) -> tuple[Texts, None]:
    import datasets  # noqa: PLC0415 - heavy

    libraries = tuple(dict.fromkeys(config.libraries.split())) or LIBRARIES
    if len(libraries) < 2:
        raise DataError(f"libraries={config.libraries} is one class; it must be at least two names with spaces between")
    if config.source == "docstrings":
        texts = docstring_texts(libraries, config.per_class)
        rows = {"text": [text for found in texts.values() for text in found]}
    else:
        pairs = instruction_pairs(libraries, config.per_class)
        rows = {n: [pair[i] for found in pairs.values() for pair in found] for i, n in enumerate(("text", "response"))}
    sizes = [len(found) for found in (texts if config.source == "docstrings" else pairs).values()]
    labels = np.repeat(np.arange(len(libraries)), sizes)
    return Texts(datasets.Dataset.from_dict(rows), tuple(rows), labels, list(libraries)), None


def _stored(config: TextConfig) -> tuple[Texts, Texts | None]:
    splits = open_splits(config)
    train = training_split(config, list(splits))
    test = testing_split(config, [name for name in splits if name != train])
    rows = splits[train]
    strings = [name for name, feature in rows.features.items() if getattr(feature, "dtype", "") in _STRINGS]
    text = pick(config, "text_column", _without(strings, config), _TEXT_NAMES, list(rows.features))
    columns = [text]
    for key in ("pair_column", "response_column"):
        if getattr(config, key):
            columns.append(pick(config, key, [name for name in strings if name != text], (), []))
    others = [name for name in rows.features if name not in columns]
    label = label_column(config, rows, others) if not config.answers else _category(config, others)
    for name in (train, test):
        for column in columns:
            if name and column not in splits[name].column_names:
                raise DataError(f"{column} is not in split {name} of {config.source}")
    kept = [name for name in (train, test) if name]
    if not label:
        found = {
            name: Texts(splits[name], tuple(columns), np.zeros(len(splits[name]), np.int64), ["all"]) for name in kept
        }
    else:
        values = {name: label_values(config, splits[name], label) for name in kept}
        names, labels = classes(config, rows.features[label], values)
        found = {name: Texts(splits[name], tuple(columns), labels[name], names) for name in kept}
    return found[train], found[test] if test else None


_STRINGS = ("string", "large_string")


def _without(strings: list[str], config: TextConfig) -> list[str]:
    return [n for n in strings if n not in (config.label_column, config.pair_column, config.response_column)]


def _category(config: TextConfig, others: list[str]) -> str:
    """Return the column of an instruction's category; empty where there is none, which leaves sizes to be unequal."""
    if config.label_column and config.label_column not in others:
        raise DataError(
            f"label_column={config.label_column} is not in {config.source}; it must be one of {', '.join(others)}"
        )
    return config.label_column or next((name for name in _CATEGORY_NAMES if name in others), "")
