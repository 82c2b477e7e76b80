"""HAT's command line: text as a terminal shows it, what goes wrong, and two real processes."""

from __future__ import annotations

import io
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers

from fl_edge.clients.hat.__main__ import KEYS, main
from fl_edge.clients.hat.typed import Conversation, Unfolding, load_tokenizer
from tests.served_hat import NEW, TEXT, Model, Process, lines_of

pytestmark = pytest.mark.usefixtures("in_time", "impatient")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


# --- text at a terminal ---


def metaspace() -> Any:
    words = {"▁Hello": 0, "▁world": 1, "s": 2, "[UNK]": 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="[UNK]"))
    made.decoder = tokenizers.decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)  # type: ignore[no-untyped-call]


def test_no_part_of_a_character_is_shown(model: Model) -> None:
    tokens = model.tokenizer(TEXT + "Ωmega 🦜")["input_ids"]
    pieces: list[str] = []
    unfolding = Unfolding(model.tokenizer, pieces.append)
    for token in tokens:
        unfolding.add([token])
    assert "".join(pieces) == unfolding.text == TEXT + "Ωmega 🦜"
    assert len(pieces) > 30
    cut: list[str] = []
    unfolding = Unfolding(model.tokenizer, cut.append)
    unfolding.add(tokens[:-1])
    unfolding.end()
    assert "".join(cut) == TEXT + "Ωmega "


def test_words_keep_the_spaces_between_them() -> None:
    pieces: list[str] = []
    unfolding = Unfolding(metaspace(), pieces.append)
    for token in (0, 1, 2, 1):
        unfolding.add([token])
    assert pieces == ["Hello", " world", "s", " world"]


def test_nothing_steers_the_terminal(model: Model) -> None:
    unfolding = Unfolding(model.tokenizer, lambda _: None)
    unfolding.add(model.tokenizer("a\x1b[31mb\x07\r\n\tc")["input_ids"])
    assert unfolding.text == "a[31mb\n\tc"


def test_a_conversation_is_the_prompt_where_there_is_a_template(model: Model) -> None:
    tokenizer = load_tokenizer(model.folder)
    plain = Conversation(tokenizer)
    plain.answered("before", "that")
    assert tokenizer.decode(plain.prompt("now")) == "now"
    tokenizer.chat_template = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}a:"
    told = Conversation(tokenizer)
    told.answered("before", "that")
    assert tokenizer.decode(told.prompt("now")) == "u:before;a:that;u:now;a:"
    told.forget()
    assert tokenizer.decode(told.prompt("now")) == "u:now;a:"


# --- the command line ---


def test_keys_are_made_once_and_for_their_owner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert main(["keys", str(folder), "--host", "jetson", "--host", "10.0.0.7"]) == 0
    assert {file.name for file in folder.iterdir()} == set(KEYS)
    assert [(folder / name).stat().st_mode & 0o077 for name in ("server.key", "token")] == [0, 0]
    assert len((folder / "token").read_text().strip()) == 64
    assert main(["keys", str(folder)]) == 1
    assert "is there already" in capsys.readouterr().err
    for wrong in (["--host", "größe"], ["--days", "9999999"]):
        assert main(["keys", str(tmp_path / "no keys"), *wrong]) == 1
        assert "no certificate can have --host" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--listen", "0.0.0.0"], "0.0.0.0:9095 can be reached from other machines; that needs a token and a cert"),
        (["--listen", "localhost:x"], "localhost:x is not allowed; it must be host or host:port"),
        (
            ["--listen", "127.0.0.1:0", "--token-file", "{}/short"],
            "short has a token of 5 bytes; it must be at least 16",
        ),
        (["--token-file", "{}/none"], "none cannot be read: No such file"),
        (["--certificate", "{}/short"], "--certificate and --key are needed both"),
        (["--certificate", "{}/short", "--key", "{}/short"], "short is not a PEM file"),
        (["--batch-tokens", "few"], "batch_tokens=few"),
        (["--set", "lease_s"], "--set lease_s is not allowed; it must be key=value"),
        (["--listen", "127.0.0.1:{port}"], "cannot listen on 127.0.0.1:{port}: Address already in use"),
        (["--listen", "127.0.0.1:0"], "is not the folder of a model"),
    ],
)
def test_what_cannot_be_served_is_one_line(
    arguments: list[str], line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "short").write_text("abcde\n")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        filled = [each.format(tmp_path, port=port) for each in arguments]
        model = tmp_path / "no-model" if arguments == ["--listen", "127.0.0.1:0"] else tmp_path
        assert main(["serve", str(model), *filled]) == 1
    said = capsys.readouterr().err
    assert line.format(port=port) in said
    assert said.count("\n") == 1


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    assert main(["keys", str(tmp_path / "keys")]) == 0
    return tmp_path / "keys"


def test_ctrl_c_ends_a_chat_also_where_its_exception_is_lost() -> None:
    code = """
import os, signal, time
from contextlib import suppress
from fl_edge.clients.hat.__main__ import ending_for_certain
with ending_for_certain(0.2):
    with suppress(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    time.sleep(60)
"""
    assert subprocess.run([sys.executable, "-c", code], check=False, timeout=50).returncode == 130


def test_two_processes_with_tls_and_a_token(
    model: Model, keys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two devices, to be quick one of them in this process: one has no more prompts, the other gets Ctrl-C."""
    chat_with = ["chat", "--model", model.folder, "--shallow", 2, "--keys", keys, "--new-tokens", NEW, "--server"]
    with Process("serve", model.folder, "--shallow", 2, "--listen", "localhost:0", "--keys", keys) as server:
        server.says("Ctrl-C ends")
        chat_with.append(f"localhost:{server.told.decode().split('localhost:')[1].split(',')[0]}")
        with Process(*chat_with, "--name", "one", "--adapter", model.adapter_file) as one:
            capsys.readouterr()
            monkeypatch.setattr(sys, "stdin", io.StringIO("def wetter\nreturn"))
            assert main([*map(str, chat_with), "--name", "two"]) == 0
            shown, told = capsys.readouterr()
            assert shown == lines_of(model.answer("def wetter"), model.answer("return"))
            assert told.count("TTFT") == told.count("\n") == 2
            one.type("wann\n")
            one.says("TTFT")
            assert one.interrupt()[:2] == (130, lines_of(model.answer("wann")))
        server.says("one is out")
        code, shown, told = server.interrupt()
        assert (code, shown) == (0, "")
        for line in ("one is here", "two is here", "two has left", "one is out: ", "stopped"):
            assert line in told
        assert told.count("TTFT") == 3
        assert not [word for word in ("wann", "wetter", "return", "Traceback", "Warning") if word in told]
        assert (keys / "token").read_text().strip() not in told
