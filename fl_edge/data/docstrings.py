"""Texts to classify that need no network: docstrings of installed libraries; the class is the library.

The libraries' names and the usual names of their modules in code are masked, so that what a text is *about* decides.
*Ours*: the task as a whole; it stands in for the benchmarks of sentences that come from a hub.
"""

from __future__ import annotations

import json
import logging
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from pathlib import Path
from typing import Any

from fl_edge.data.once import content_key, made_once
from fl_edge.data.sources import documented, version
from fl_edge.errors import DataError
from fl_edge.files import write_whole

log = logging.getLogger("flwr.fl_edge")

LIBRARIES = ("numpy", "scipy", "sklearn", "pandas", "torch", "transformers")
MASK = "library"  # stands where a library's name stood
_LONGEST = 400  # characters of a text; 64 tokens are about 300
_FEWEST_WORDS = 8
_SIMILAR = 0.5  # Jaccard index of the sets of word triples above which two texts count as one

_WRITTEN = {  # how else a library is called in text and code
    "numpy": ("np", "ndarray"),
    "scipy": ("sp",),
    "sklearn": ("scikit-learn", "scikit"),
    "pandas": ("pd",),
    "matplotlib": ("mpl", "plt", "pyplot", "pylab"),
    "torch": ("pytorch",),
    "transformers": ("hugging face", "huggingface"),
    "networkx": ("nx",),
    "sympy": (),
}
_FORM = 1  # raised when the same sources give other texts
_INSIDE = 5  # a name at least this long is masked inside longer words too, as in NumpyArray
_SECTION = re.compile(
    r"^\s*(-{3,}|={3,}|~{3,}|>>>|\.\. |[A-Z][A-Za-z ]*:$|(Parameters|Returns|Examples?|Notes?)$)", re.M
)
_ROLE = re.compile(r":[\w:+-]+:`")
_MARKUP = re.compile(r"`~?|\*+|\|\w+\|")
_WORD = re.compile(r"[a-z]+")


def clean(text: str, libraries: Sequence[str] = LIBRARIES) -> str:
    """Return the prose at a docstring's beginning in one line, without markup, names of libraries masked.

    Parameters
    ----------
    text
        A docstring, dedented.
    libraries
        Whose names are masked.
    """
    if section := _SECTION.search(text, 1):
        head = text[: section.start()]
        # a line of dashes or the like underlines the heading before it
        text = head.rstrip().rpartition("\n")[0] if section.group(1)[0] in "-=~" else head
    words = " ".join(_MARKUP.sub("", _ROLE.sub("`", text)).split())
    return _masked(words, libraries)[:_LONGEST].strip()


def _masked(text: str, libraries: Sequence[str]) -> str:
    names = {name.lower() for library in libraries for name in (library, *_WRITTEN.get(library, ()))}
    # "transformers" is the plural of a kind of model too, and common inside longer names
    patterns = [
        re.escape(name)
        if len(name) >= _INSIDE and name != "transformers"
        else rf"(?<![a-z0-9]){re.escape(name)}(?![a-z0-9])"
        for name in sorted(names, key=lambda name: (-len(name), name))
    ]
    return re.sub("|".join(patterns), MASK, text, flags=re.IGNORECASE)


def distinct(texts: Sequence[str]) -> list[int]:
    """Return the indices of texts that have no near-duplicate among those kept before them, ascending.

    Two texts are near-duplicates if the sets of their word triples have a Jaccard index above 0.5. Such sets share one
    of the rarest triples of either (prefix filter; Bayardo et al., WWW 2007), so few pairs are looked at.
    """
    sets = [set(zip(words, words[1:], words[2:], strict=False)) for words in map(_words, texts)]
    frequency = Counter(triple for triples in sets for triple in triples)
    kept: list[int] = []
    owners: dict[tuple[str, str, str], list[int]] = {}
    for index, triples in enumerate(sets):
        rarest = sorted(triples, key=lambda triple: (frequency[triple], triple))
        prefix = rarest[: len(triples) - int(_SIMILAR * len(triples))]
        near = {other for triple in prefix for other in owners.get(triple, ())}
        if any(_jaccard(triples, sets[other]) > _SIMILAR for other in near):
            continue
        kept.append(index)
        for triple in prefix:
            owners.setdefault(triple, []).append(index)
    return kept


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _jaccard(one: Set[Any], other: Set[Any]) -> float:
    shared = len(one & other)
    return shared / (len(one) + len(other) - shared)


def collect(libraries: Sequence[str] = LIBRARIES, per_class: int = 1000) -> dict[str, list[str]]:
    """Return texts by library: distinct, at most ``per_class`` each, always the same for the same versions.

    Raises
    ------
    DataError
        A library that is not installed or documents too little.
    """
    texts: list[str] = []
    owners: list[str] = []
    for library in libraries:
        found = _first(_texts(library, libraries), 2 * per_class)  # numpy has no more
        texts += found
        owners += [library] * len(found)
    classes: dict[str, list[str]] = {library: [] for library in libraries}
    for index in distinct(texts):
        if len(classes[owners[index]]) < per_class:
            classes[owners[index]].append(texts[index])
    for library, kept in classes.items():
        if len(kept) < 2:
            raise DataError(f"library={library} documents too little to be a class: {len(kept)} texts; choose another")
    return classes


def docstring_texts(libraries: Sequence[str] = LIBRARIES, per_class: int = 1000) -> dict[str, list[str]]:
    """Return what :func:`collect` returns; collected once a machine and set of versions, which takes some seconds."""
    key = content_key(_FORM, sys.version_info[:2], [(library, version(library)) for library in libraries], per_class)
    what = f"docstrings of {', '.join(libraries)}"

    def make(folder: Path) -> None:
        log.info("collecting the %s", what)
        write_whole(folder / "texts.json", json.dumps(collect(libraries, per_class)))

    texts: dict[str, list[str]] = json.loads((made_once("docstrings", key, make, what) / "texts.json").read_text())
    return texts


def _texts(library: str, libraries: Sequence[str]) -> Iterable[str]:
    for item in documented(library):
        text = clean(item.text, libraries)
        if len(text.split()) >= _FEWEST_WORDS:
            yield text


def _first(texts: Iterable[str], count: int) -> list[str]:
    found: dict[str, None] = {}
    for text in texts:
        found[text] = None
        if len(found) == count:
            break
    return list(found)
