"""Texts: what is collected, how it is masked and split, what a device and the test set hold."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_edge.config import check, resolve
from fl_edge.data import docstrings, instructions
from fl_edge.data.config import PARTITION_FIELDS, DataConfig, TextConfig
from fl_edge.data.docstrings import MASK, clean, distinct, docstring_texts
from fl_edge.data.instructions import instruction_pairs
from fl_edge.data.sources import documented, installed, source_files, version
from fl_edge.data.texts import load_text_device, load_text_test, open_texts, text_classes
from fl_edge.errors import DataError
from fl_edge.models.vocabulary import decoder_tokenizer, encoder_tokenizer

WORDS = (
    "alpha",
    "beta",
    "gamma",
    "delta",
    "rho",
    "sigma",
    "theta",
    "kappa",
    "omega",
    "zeta",
    "eta",
    "iota",
    "mu",
    "nu",
)


def sentence(seed: int, words: int = 12) -> str:
    rng = np.random.default_rng(seed)
    return " ".join(rng.choice(WORDS, words)).capitalize() + "."


def library(root: Path, name: str, functions: int, first: int) -> None:
    package = root / name
    (package / "tests").mkdir(parents=True)
    (package / "__init__.py").write_text(f'"""The {name} library."""\n')
    (package / "broken.py").write_text("def f(:\n")
    (package / "tests" / "test_it.py").write_text(f'def f():\n    """{sentence(10**6)}"""\n')
    for part in range(2):
        lines = []
        for number in range(first + part, first + functions, 2):
            lines += [
                f"def f{number}(a, b: int = {number}, *, {name}_{number}=None) -> None:",
                f'    """{sentence(number)}',
            ]
            lines += ["", f"    Uses {name} and {name.title()}Array.", "", "    Parameters", "    ----------", "    a"]
            lines += ['    """', ""]
        (package / f"part{part}.py").write_text("\n".join(lines))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Three small libraries on the path, and a folder for caches."""
    root = tmp_path_factory.mktemp("libraries")
    for index, name in enumerate(("heronlib", "ottolib", "plovlib")):
        library(root, name, 30, 1000 * index)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(root))
        patch.setenv("FL_EDGE_CACHE", str(root / "cache"))
        yield root


NAMES = ("heronlib", "ottolib", "plovlib")
SMALL: dict[str, Any] = {"libraries": " ".join(NAMES), "per_class": 20, "max_length": 32}


def test_documented_reads_signatures_and_docstrings_without_importing(libraries: Path) -> None:
    items = list(documented("heronlib"))
    assert len(items) == 30
    first = next(item for item in items if item.name == "f0")
    assert first.module == "heronlib.part0"
    assert first.signature == "f0(a, b=0, *, heronlib_0=None)"
    assert first.text.startswith(sentence(0))
    assert "heronlib" not in sys.modules
    assert items == list(documented("heronlib"))
    assert installed("heronlib")
    assert not installed("no_such_library")


def test_a_library_that_changes_has_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library(tmp_path, "changing", 4, 0)
    monkeypatch.syspath_prepend(str(tmp_path))
    before = version("changing")
    assert version("changing") == before
    (tmp_path / "changing" / "more.py").write_text("x = 1\n")
    assert version("changing") != before
    assert version("sklearn") == __import__("sklearn").__version__


def test_tests_and_foreign_packages_are_not_read() -> None:
    places = [file.as_posix() for file in source_files("python")]
    assert len(places) > 300
    assert not [place for place in places if "site-packages" in place or "/test/" in place or "/tests/" in place]
    assert [place for place in places if place.endswith("/json/decoder.py")]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Return a numpy array, NumPy's own.", "Return a library array, library's own."),
        ("A `numpy.ndarray` or :class:`~torch.Tensor`.", "A library.library or library.Tensor."),
        (
            "See np.dot and ``pd.Series``, but not jnp or npz.",
            "See library.dot and library.Series, but not jnp or npz.",
        ),
        ("Wraps a PyTorchModel of scikit-learn.", "Wraps a libraryModel of library."),
        ("A transformer, as transformers has them.", "A transformer, as library has them."),
        ("First line\n    goes on.\n\nSecond.", "First line goes on. Second."),
        ("Sum.\n\nParameters\n----------\nx : numpy", "Sum."),
        ("Sum.\n\nArgs:\n    x: y", "Sum."),
        ("Sum.\n\nMy heading\n----------\nx", "Sum."),
        ("Sum.\n\n>>> np.sum(1)", "Sum."),
    ],
)
def test_prose_is_kept_and_names_are_masked(text: str, expected: str) -> None:
    assert clean(text) == expected


@given(st.text(max_size=300))
def test_any_text_is_cleaned_to_one_line_without_names(text: str) -> None:
    cleaned = clean(f"{text} numpy Pandas {text} sklearn").lower()
    assert "\n" not in cleaned
    assert len(cleaned) <= 400 + 400  # lower case may be longer
    assert not {"numpy", "pandas", "sklearn"} & set(cleaned.split())


def jaccard(one: str, other: str) -> float:
    sets = []
    for text in (one, other):
        words = text.split()
        sets.append({tuple(words[i : i + 3]) for i in range(len(words) - 2)})
    union = sets[0] | sets[1]
    return len(sets[0] & sets[1]) / len(union) if union else 0.0


@given(st.lists(st.lists(st.sampled_from("abcd"), min_size=3, max_size=9).map(" ".join), max_size=25))
def test_near_duplicates_are_found_as_by_looking_at_every_pair(texts: list[str]) -> None:
    kept: list[int] = []
    for index, text in enumerate(texts):
        if not any(jaccard(text, texts[other]) > 0.5 for other in kept):
            kept.append(index)
    assert distinct(texts) == kept


def test_half_of_the_triples_in_common_is_not_yet_a_duplicate() -> None:
    assert distinct(["a b c d e f g h", "a b c d e f x y"]) == [0, 1]  # 4 of 8
    assert distinct(["a b c d e f g h i", "a b c d e f g x y"]) == [0]  # 5 of 9


def test_docstrings_are_distinct_masked_and_collected_once(libraries: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = docstring_texts(NAMES, 20)
    assert {name: len(found) for name, found in texts.items()} == dict.fromkeys(NAMES, 20)
    every = [text for found in texts.values() for text in found]
    assert distinct(every) == list(range(60))
    assert not [text for text in every if any(name in text.lower() for name in NAMES)]
    assert all(f"Uses {MASK} and {MASK}Array." in text for text in every)
    assert docstrings.collect(NAMES, 20) == texts

    def refuse(*args: Any) -> Any:
        raise AssertionError

    monkeypatch.setattr(docstrings, "collect", refuse)
    assert docstring_texts(NAMES, 20) == texts


def test_instructions_ask_for_signatures(libraries: Path) -> None:
    pairs = instruction_pairs(NAMES, 10)
    assert {name: len(found) for name, found in pairs.items()} == dict.fromkeys(NAMES, 10)
    instruction, response = pairs["ottolib"][0]
    number = int(response[5:].partition("(")[0])
    assert response == f"def f{number}(a, b={number}, *, ottolib_{number}=None):"
    assert instruction == f"# {sentence(number)}"
    everything = [pair for found in pairs.values() for pair in found]
    assert len({instruction for instruction, _ in everything}) == len({r for _, r in everything}) == 30
    assert instructions.collect(NAMES, 10) == pairs


def tokenizer(end: bool = False) -> Any:
    texts = [sentence(number) for number in range(50)]
    return decoder_tokenizer(texts, 320) if end else encoder_tokenizer(texts, 320)


@pytest.mark.parametrize("source", ["docstrings", "instructions"])
def test_every_sample_goes_to_one_device_or_to_the_test_set(libraries: Path, source: str) -> None:
    config = TextConfig(source=source, alpha=1.0, **SMALL)
    own = tokenizer(end=config.answers)
    train, test = open_texts(config, 3)
    assert text_classes(config, 3) == list(NAMES)
    assert (len(train.rows), len(test.rows)) == (48, 12)
    assert np.bincount(train.labels).tolist() == [16] * 3
    assert not set(train.rows["text"][:]) & set(test.rows["text"][:])
    devices = [load_text_device(config, 3, device, 4, own) for device in range(4)]
    whole = load_text_test(config, 3, own)
    assert whole.column_names == ["input_ids", "attention_mask", "labels"]
    assert sum(map(len, devices)) == 48
    rows = {tuple(row) for data in (*devices, whole) for row in data["input_ids"][:]}
    assert len(rows) == 60
    again = load_text_device(config, 3, 2, 4, own)
    assert again[:] == devices[2][:]
    assert max(map(len, devices[0]["input_ids"][:])) <= 32
    if not config.answers:
        assert devices[0].features["labels"].names == list(NAMES)
        assert np.bincount([label for data in devices for label in data["labels"]]).tolist() == [16] * 3


def test_another_process_holds_the_same_texts(libraries: Path) -> None:
    code = (
        "from fl_edge.data.config import TextConfig; from fl_edge.data.texts import open_texts; "
        f"train, test = open_texts(TextConfig(**{SMALL!r}), 3); print([train.rows['text'][:], test.rows['text'][:]])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=True, text=True,
        env={"PYTHONPATH": f"{libraries}:{Path(__file__).parent.parent}", "FL_EDGE_CACHE": str(libraries / "cache")},
    ).stdout.strip()  # fmt: skip
    assert found == str([split.rows["text"][:] for split in open_texts(TextConfig(**SMALL), 3)])


def test_the_seed_decides_the_split(libraries: Path) -> None:
    one, other = (open_texts(TextConfig(**SMALL), seed)[1].rows["text"][:] for seed in (1, 2))
    assert one != other


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"libraries": "heronlib nolib"}, r"^library=nolib is not an installed package; install it or choose another$"),
        ({"libraries": "heronlib"}, r"^libraries=heronlib is one class; it must be at least two names"),
        ({"libraries": "heronlib heronlib"}, r"^libraries=heronlib heronlib is one class"),
        ({"libraries": "heronlib ../x"}, r"^library=../x is not an installed package"),
        ({"libraries": "heronlib sys"}, r"^library=sys is not an installed package"),
        ({"max_length": 500}, r"^max_length=500 is not possible; the model takes 100$"),
        ({"min_samples": 40}, r"min_samples=40"),
        ({"test_fraction": 0.01}, r"^test_fraction=0.01 of 60 samples cannot be cut off class by class"),
    ],
)
def test_what_cannot_be_is_said_in_one_line(libraries: Path, settings: dict[str, Any], says: str) -> None:
    own = tokenizer()
    own.model_max_length = 100
    with pytest.raises(DataError, match=says) as raised:
        load_text_device(TextConfig(**(SMALL | settings)), 1, 0, 2, own)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("device", [-1, 4])
def test_there_is_no_data_for_a_device_that_is_not_there(libraries: Path, device: int) -> None:
    with pytest.raises(DataError, match=r"must be at least 0 and below 4$"):
        load_text_device(TextConfig(**SMALL), 1, device, 4, tokenizer())


def test_the_settings_can_be_given() -> None:
    check(TextConfig())
    config = resolve(TextConfig, None, {"alpha": "0.3", "max_length": "128", "text_column": "body"})
    assert (config.alpha, config.max_length, config.text_column) == (0.3, 128, "body")
    assert (TextConfig().alpha, DataConfig().alpha) == (0.5, 0.1)
    assert set(PARTITION_FIELDS) == {"partition", "alpha", "classes_per_device", "dominant_share", "min_samples"}
    assert config.loading() == TextConfig(max_length=128, text_column="body")
    assert not TextConfig().answers
    assert TextConfig(source="instructions").answers
    assert TextConfig(source="x", response_column="y").answers
