"""Instructions and answers that need no network: a function's first line of documentation, and its signature.

The category of a pair is its library; libraries differ in how they name and order arguments, so a split by category is
unequal in what is to be learnt. *Ours*: the task as a whole; it stands in for Dolly and its like. The standard library
is left out, since the small language model is pretrained on its source.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from fl_edge.data.docstrings import LIBRARIES
from fl_edge.data.once import content_key, made_once
from fl_edge.data.sources import documented, version
from fl_edge.errors import DataError
from fl_edge.files import write_whole

log = logging.getLogger("flwr.fl_edge")

_LONGEST = 120  # characters of an answer, and of an instruction
_FEWEST_WORDS = 3
_FORM = 1  # raised when the same sources give other pairs

Pair = tuple[str, str]  # instruction, response


def collect(libraries: Sequence[str] = LIBRARIES, per_class: int = 1000) -> dict[str, list[Pair]]:
    """Return (instruction, response) pairs by library: no instruction twice, no response twice.

    Raises
    ------
    DataError
        A library that is not installed or documents too little.
    """
    instructions: set[str] = set()
    responses: set[str] = set()
    classes: dict[str, list[Pair]] = {}
    for library in libraries:
        pairs = classes[library] = []
        for item in documented(library):
            summary = " ".join(item.text.split("\n\n")[0].split())
            response = f"def {item.signature}:"
            fits = len(summary) <= _LONGEST and len(response) <= _LONGEST and len(summary.split()) >= _FEWEST_WORDS
            if item.signature and fits and summary.lower() not in instructions and response not in responses:
                instructions.add(summary.lower())
                responses.add(response)
                pairs.append((f"# {summary}", response))
                if len(pairs) == per_class:
                    break
        if len(pairs) < 2:
            raise DataError(f"library={library} documents too little to be a category: {len(pairs)} functions")
    return classes


def instruction_pairs(libraries: Sequence[str] = LIBRARIES, per_class: int = 1000) -> dict[str, list[Pair]]:
    """Return what :func:`collect` returns; collected once a machine and set of versions, which takes some seconds."""
    key = content_key(_FORM, sys.version_info[:2], [(library, version(library)) for library in libraries], per_class)
    what = f"signatures of {', '.join(libraries)}"

    def make(folder: Path) -> None:
        log.info("collecting the %s", what)
        write_whole(folder / "pairs.json", json.dumps(collect(libraries, per_class)))

    kept = json.loads((made_once("instructions", key, make, what) / "pairs.json").read_text())
    return {library: [(instruction, response) for instruction, response in pairs] for library, pairs in kept.items()}
