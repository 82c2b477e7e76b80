"""Files of text over devices: whole files, each on one device, and others to test on. *Ours*."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from fl_edge.config import setting
from fl_edge.data.calibration import read_texts, sequences
from fl_edge.errors import ConfigError, DataError
from fl_edge.models.quiet import quiet
from fl_edge.seeding import numpy_rng, torch_rng

_TEST_SHARE = 0.2  # of the files


@dataclass(unsafe_hash=True)
class CorpusConfig:
    """Which text, and how much of it a device has."""

    source: str = setting(
        "", "a file or a folder of text; empty: for a small model, files of its library that it was not trained on"
    )
    partition: str = setting(
        "iid", "files in equal number, or in numbers that a Dirichlet draw says", choices=("iid", "dirichlet")
    )
    alpha: float = setting(1.0, "concentration of the Dirichlet draw; the smaller, the more unequal", low=1e-6)
    length: int = setting(128, "tokens of a sequence", low=32)
    sequences: int = setting(64, "most sequences that a device is calibrated on", low=1)
    test_sequences: int = setting(32, "sequences that perplexity is measured on", low=1)


def load_files(config: CorpusConfig, model: str) -> list[str]:
    """Return the texts of all files.

    Raises
    ------
    DataError
        No source for a model that has no files of its own, or one that cannot be read.
    """
    from fl_edge.models.small import SMALL_MODELS, unseen_sources  # noqa: PLC0415 - heavy

    if config.source:
        return read_texts(Path(config.source).expanduser())
    if model in SMALL_MODELS:
        return unseen_sources(model)
    raise DataError(f"data.source must be a file or a folder of text where model.name={model} is not a small model")


def load_tokenizer(folder: Path) -> Any:
    """Return the tokenizer in the folder of a model.

    Raises
    ------
    ConfigError
        None there.
    """
    import transformers  # noqa: PLC0415 - heavy

    try:
        with quiet():
            return transformers.AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # transformers raises a wide choice of classes of its own and of others
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(f"the tokenizer in {folder} cannot be loaded: {reason}") from None


def device_files(
    texts: list[str], config: CorpusConfig, seed: int, index: int, count: int
) -> tuple[list[str], list[str]]:
    """Return a device's texts, and those to test on, which are the same for all devices and on none.

    Raises
    ------
    DataError
        Fewer files than devices and one to test on, or a device that is not there.
    """
    if not 0 <= index < count:
        raise DataError(f"device {index} is not there; with {count} devices it must be at least 0 and below {count}")
    tests = max(round(_TEST_SHARE * len(texts)), 1)
    if len(texts) - tests < count:
        raise DataError(
            f"{len(texts)} files of text, {tests} of them to test on, cannot give {count} devices one each; give more "
            "files, or one .jsonl with a text a line"
        )
    order = numpy_rng(seed, "corpus", "files").permutation(len(texts))
    mine = np.split(order[tests:], _ends(len(texts) - tests, config, seed, count))[index]
    return [texts[place] for place in sorted(mine)], [texts[place] for place in sorted(order[:tests])]


def device_tokens(
    texts: list[str], config: CorpusConfig, seed: int, index: int, count: int, tokenizer: Any
) -> tuple[Tensor, Tensor]:
    """Return a device's sequences to calibrate on and those to test on, (s, n) int64.

    Raises
    ------
    DataError
        A device whose text is shorter than one sequence.
    """
    own, test = device_files(texts, config, seed, index, count)
    drawn = sequences(tokenizer, own, config.length, config.sequences, torch_rng(seed, "corpus", index))
    held_out = sequences(tokenizer, test, config.length, config.test_sequences, torch_rng(seed, "corpus", "test"))
    return drawn, held_out


def _ends(files: int, config: CorpusConfig, seed: int, count: int) -> list[int]:
    """Return where in the order of files each device's end, but for the last one; every device has one at least."""
    if config.partition == "iid":
        return [files * place // count for place in range(1, count)]
    shares = numpy_rng(seed, "corpus", "sizes").dirichlet(np.full(count, config.alpha))
    spare = np.floor(np.cumsum(shares)[:-1] * (files - count) + 1e-9).astype(int)
    return [int(end) + place for place, end in enumerate(spare, start=1)]
