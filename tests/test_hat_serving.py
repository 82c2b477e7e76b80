"""HAT without Flower's SuperLink: a server that stays, devices that come and go, a person at each."""

from __future__ import annotations

import io
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
import tokenizers
import torch
import transformers
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from fl_edge.clients.hat import HatClient, HatWorkload, chat
from fl_edge.clients.hat.__main__ import KEYS, main
from fl_edge.clients.hat.chat import ANEW, Chat, Door, NoServerError
from fl_edge.clients.hat.typed import Conversation, Unfolding, load_tokenizer
from fl_edge.errors import ConfigError
from fl_edge.hat.adapter import new_adapter, save_adapter
from fl_edge.hat.config import CloudConfig, HatConfig
from fl_edge.hat.split import load_device
from fl_edge.link.content import config_of, tensors_of
from fl_edge.link.resident.client import LinkClient
from fl_edge.link.resident.clientapp import reply_to
from fl_edge.link.resident.codec import decode
from fl_edge.link.resident.config import OPEN, TLS, LinkConfig
from fl_edge.link.resident.frames import Buffer
from fl_edge.link.resident.invitation import own_invitation
from fl_edge.link.resident.open import OpenGrid
from fl_edge.models.vocabulary import decoder_tokenizer
from fl_edge.seeding import torch_rng
from fl_edge.strategies import hat as strategy
from fl_edge.strategies.hat import Hat
from tests.link_site import ACKNOWLEDGEMENT, Proxy, Raw, credentials, eventually
from tests.tiny_hat import CPU, load_whole, save_model

pytestmark = pytest.mark.usefixtures("in_time", "impatient")

NEW, TOKEN = 12, b"a token of tests, long enough"
TEXT = "def schönes_wetter(wann):\n    return '☀️ 🙂 日本'\n"
CLOUD = CloudConfig(capacity=128, cache_tokens=128 * 4, batch_tokens=16)
LINK = LinkConfig(grace_s=1.0, max_message_mib=OPEN.max_message_mib)


class Model:
    """A model on disk with a tokenizer and an adapter, and what the unsplit one says."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer: Any = decoder_tokenizer([TEXT], 280)
        self.folder = save_model(folder / "model", vocab_size=len(self.tokenizer))
        self.tokenizer.save_pretrained(self.folder)
        self.whole: Any = load_whole(self.folder)
        self.device = load_device(self.folder, 2, CPU)
        self.adapter = new_adapter(self.device, torch_rng(0, "adapter")).double()
        self.adapter_file = folder / "adapter.safetensors"
        save_adapter(self.adapter, self.device, self.adapter_file)

    def answer(self, prompt: str, new_tokens: int = NEW) -> str:
        tokens = torch.tensor([self.tokenizer(prompt)["input_ids"]])
        stop = self.tokenizer.eos_token_id
        found = self.whole.generate(
            tokens, max_new_tokens=new_tokens, do_sample=False, eos_token_id=stop, pad_token_id=stop
        )
        pieces: list[str] = []
        unfolding = Unfolding(self.tokenizer, pieces.append)
        unfolding.add(found[0, tokens.shape[1] :].tolist())
        unfolding.end()
        return unfolding.text

    def work(self, **changes: Any) -> HatWorkload:
        made = HatWorkload(
            device="desk",
            model=self.device,
            adapter=self.adapter,
            prompt=lambda _: None,
            hear=lambda *_: None,
            config=HatConfig(new_tokens=NEW, threshold=0.0, shortest_chunk=4, longest_chunk=8),
            stops=(self.tokenizer.eos_token_id,),
        )
        return replace(made, **changes)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "_LOOK_S", 0.02)
    monkeypatch.setattr(chat, "_AGAIN_S", 0.05)


class Served:
    """A server in a thread of this process."""

    def __init__(
        self, model: Model, cloud: CloudConfig = CLOUD, port: int = 0, tls: TLS | None = None, shallow: int = 2
    ) -> None:
        self.grid = OpenGrid(f"127.0.0.1:{port}", tls, TOKEN, LINK)
        self.hat = Hat(model.folder, shallow, cloud, min_devices=0, observers=[lambda *_: None])
        self._stop = threading.Event()
        self._thread = threading.Thread(
            target=self.hat.start, args=(self.grid, None), kwargs={"until": self._stop.is_set}
        )
        self._thread.start()

    def door(self, **changes: Any) -> Door:
        return replace(Door("127.0.0.1", self.grid.port, TOKEN, b""), **changes)

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self.grid.close("the server was stopped")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Shown(io.StringIO):
    """What is shown, and something to do when it is."""

    def __init__(self, then: Callable[[], None] | None = None) -> None:
        super().__init__()
        self._then = then

    def write(self, text: str) -> int:
        then, self._then = self._then, None
        if then:
            then()
        return super().write(text)


def converse(
    own: Model, door: Door, typed: Sequence[str | Callable[[], str]], shown: Shown | None = None, **changes: Any
) -> tuple[str, list[str]]:
    """Chat; a callable is called when it would be typed. Returns what was shown, and what else was said."""
    lines, shown, told = iter(typed), shown or Shown(), io.StringIO()

    def read() -> str | None:
        line = next(lines, None)
        return line() if callable(line) else line

    Chat(door, own.work(**changes), own.tokenizer, read, shown, told, LINK, patience_s=5.0).run()
    return shown.getvalue(), told.getvalue().splitlines()


def lines_of(*answers: str) -> str:
    return "".join(answer if answer.endswith("\n") or not answer else f"{answer}\n" for answer in answers)


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


# --- chats ---


def test_a_chat_has_the_whole_models_text_and_says_nothing_of_it(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[bytes] = []
    send = LinkClient.send

    def listening(self: LinkClient, parts: Sequence[Buffer]) -> None:
        sent.append(b"".join(parts))
        send(self, parts)

    monkeypatch.setattr(LinkClient, "send", listening)
    with Served(model) as served:
        shown, told = converse(model, served.door(), [TEXT.replace("\n", " "), "", ANEW, "def schönes"])
        eventually(lambda: not served.grid.get_node_ids())
        assert served.hat.cloud.requests == 0
    assert shown == lines_of(model.answer(TEXT.replace("\n", " ")), model.answer("def schönes"))
    assert len(told) == 2
    assert all("TTFT" in line and "TBT" in line and "accept length" in line and "MB up" in line for line in told)
    numbers = {"request", "base", "last", "verify", "handled_s", "next", "end"}  # counts, places, yes or no
    for message in (decode([data]) for data in sent):
        said = config_of(message)
        assert said.keys() <= numbers | {"device", "model", "account"}
        assert all(type(said[name]) in (int, float, bool) for name in numbers & said.keys())
        assert all(tensor.dtype == torch.float64 and tensor.shape[1] == 32 for tensor in tensors_of(message).values())
    whole = b"".join(sent)
    assert len(sent) > 6
    assert not [word for word in ("def", "schönes", "wetter", "wann", "return") if word.encode() in whole]


class Silent:
    """A device in the middle of a request, which does nothing more."""

    def __init__(self, model: Model, served: Served) -> None:
        self.client = LinkClient(own_invitation(served.door().address, TOKEN, b"", LINK))
        self.told: list[str] = []
        self._app, self._context = ClientApp(), Context(1, 7, {}, RecordDict(), {})
        work = model.work(prompt=lambda _: torch.arange(9), tell=lambda _, reason: self.told.append(reason))
        HatClient(lambda _: work).register(self._app)
        self.messages = self.client.messages()
        self.answer(3)  # who it is, a chunk, another
        eventually(lambda: served.hat.cloud.requests == 1)

    def answer(self, messages: int) -> None:
        for _, chunks in zip(range(messages), self.messages, strict=False):
            self.client.send(reply_to(self._app, chunks, self._context, None, 2**20))

    def kill(self) -> None:
        """As when its process is killed."""
        self.client._stop.set()
        assert self.client._call
        self.client._call.cancel()


def test_devices_come_and_go_while_others_generate(model: Model) -> None:
    """A device that is lost in the middle of a request leaves nothing behind; who came later has its whole text."""
    with Served(model) as served:
        lost = Silent(model, served)

        def go() -> str:
            lost.kill()
            return "def"

        others: list[tuple[str, list[str]]] = []
        threads = [
            threading.Thread(target=lambda: others.append(converse(model, served.door(), ["return", "wann"])))
            for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        shown, _ = converse(model, served.door(), ["wetter", go])
        for thread in threads:
            thread.join()
        assert shown == lines_of(model.answer("wetter"), model.answer("def"))
        assert [shown for shown, _ in others] == [lines_of(model.answer("return"), model.answer("wann"))] * 2
        eventually(lambda: served.hat.cloud.requests == 0)
        assert served.hat.report.accounts == {}


def test_a_connection_that_breaks_is_made_again_and_nothing_is_lost(model: Model) -> None:
    with Served(model) as served, Proxy(served.grid.port) as proxy:
        host, _, port = proxy.address.rpartition(":")
        shown, told = converse(model, served.door(host=host, port=int(port)), ["wann", "return"], Shown(proxy.cut))
        assert shown == lines_of(model.answer("wann"), model.answer("return"))
        assert len(told) == 2
        assert proxy.connections == 3  # a knock first


def test_a_device_that_is_silent_for_too_long_has_to_ask_again(model: Model) -> None:
    with Served(model, replace(CLOUD, lease_s=0.2)) as served:
        silent = Silent(model, served)
        eventually(lambda: served.hat.cloud.requests == 0)
        silent.answer(2)  # what is to be verified; that it will not be
        assert "its lease has run out" in silent.told[0]
        silent.client.close("the test is over")


def test_answers_that_cannot_be_end_the_answer_and_not_the_chat(model: Model) -> None:
    with Served(model) as served:
        step: Any = served.hat.cloud.step
        odd = 0

        def wrong(now: float) -> Any:
            nonlocal odd
            owed = step(now)
            odd += len(owed)
            return [(name, replace(answer, rows=answer.rows * torch.nan)) for name, answer in owed] if odd < 3 else owed

        served.hat.cloud.step = wrong  # type: ignore[method-assign]
        shown, told = converse(model, served.door(), ["wann", "def"])
        assert shown == lines_of(model.answer("def"))
        assert "(the cloud answered 1 rows of hidden states; 1 finite ones were due); it will be asked again" in told[0]
        assert told[1].startswith("the answer ends here, the server was lost (the cloud answered")
        assert len(told) == 3


def test_what_cannot_be_answered_is_told_and_the_next_is_answered(model: Model) -> None:
    with Served(model, replace(CLOUD, cache_tokens=128)) as served:
        shown, told = converse(model, served.door(), ["wann " * 200, "wann"])
        assert shown == lines_of(model.answer("wann"))
        assert "allowed are 1 to 127 tokens" in told[0]
        assert len(told) == 2
        middle = served.hat.cloud._middle.pool
        taken = middle.take()  # somebody else's
        assert taken is not None

        def give_back() -> str:
            middle.give_back(taken)
            return "return"

        shown, told = converse(model, served.door(), ["wann", give_back])
        assert shown == lines_of(model.answer("return"))
        assert "all 1 requests that the cloud has memory for are under way; try again later" in told[0]


def test_a_server_that_is_restarted_in_the_middle_of_an_answer(model: Model) -> None:
    served = [Served(model)]
    port = served[0].grid.port

    def restart() -> None:
        served[-1].close()
        served.append(Served(model, port=port))

    door = served[0].door()
    shown, told = converse(model, door, ["wann", "return"], Shown(restart))
    assert shown.endswith(lines_of(model.answer("return")))
    begun = shown.removesuffix(lines_of(model.answer("return"))).removesuffix("\n")
    assert begun
    assert model.answer("wann").startswith(begun)
    assert told[0] == "the answer ends here, the server was lost (the server was stopped); it can be asked again"
    assert len(told) == 2

    def again() -> str:
        restart()
        return "wetter"

    shown, told = converse(model, door, ["def", again])  # before anything of the answer was there
    assert shown == lines_of(model.answer("def"), model.answer("wetter"))
    assert "it will be asked again" in told[1]
    served[-1].close()
    with pytest.raises(NoServerError, match=r"no server at 127\.0\.0\.1"):
        converse(model, door, ["def"])


def test_who_may_not_come_in_is_told_why(model: Model, certificates: TLS, tmp_path: Path) -> None:
    with Served(model) as served:
        with pytest.raises(NoServerError, match="refused this client; is its token another one"):
            converse(model, served.door(token=b"another token, as long as it"), ["def"])
        with pytest.raises(NoServerError, match="has no certificate"):
            served.door(authority=certificates.authority).knock()
        with pytest.raises(NoServerError, match=r"shallow \(1 and not 2\), weights differ"):
            converse(model, served.door(), ["def"], model=load_device(model.folder, 1, CPU), adapter=None)
        assert converse(model, served.door(), ["def"])[0] == lines_of(model.answer("def"))
    with Served(model, tls=certificates) as served:
        door = served.door(authority=certificates.authority)
        assert converse(model, door, ["def"])[0] == lines_of(model.answer("def"))
        with pytest.raises(NoServerError, match="say whom to trust"):
            served.door().knock()
        with pytest.raises(NoServerError, match="damaged"):
            served.door(authority=b"-----BEGIN nothing").knock()
        assert main(["keys", str(tmp_path / "other")]) == 0
        with pytest.raises(NoServerError, match="is not trusted: "):
            served.door(authority=(tmp_path / "other/ca.pem").read_bytes()).knock()
    with socket.create_server(("127.0.0.1", 0)) as nobody:
        port = nobody.getsockname()[1]
    with pytest.raises(NoServerError, match=f"no server at 127.0.0.1:{port}: Connection refused"):
        Door("127.0.0.1", port, TOKEN, b"").knock()


# --- who comes in ---


def test_the_token_begins_sessions_and_takes_none_over() -> None:
    with OpenGrid("127.0.0.1:0", None, TOKEN, LINK) as grid:
        with Raw(grid.port, credentials(5, TOKEN)) as first:
            own = first.welcome()
            assert grid.get_node_ids() == [5]
            first.send(ACKNOWLEDGEMENT)  # its own token is there, and the common one no longer good for it
            eventually(lambda: not grid._server._sessions[5].tokens.accept(TOKEN))
            others = [
                *(credentials(5, TOKEN), credentials(6, TOKEN[:-1]), credentials(6, b""), credentials(6, own)),
                *(
                    credentials(0, TOKEN),
                    credentials(2**63, TOKEN),
                    credentials("x", TOKEN),
                    credentials(6, TOKEN, "1.0"),
                ),
            ]
            for other in others:
                with Raw(grid.port, other) as raw:
                    assert raw.outcome()[1:3] == (grpc.StatusCode.UNAUTHENTICATED, "refused")
            assert grid.get_node_ids() == [5]
        with Raw(grid.port, credentials(5, own)) as again:
            again.welcome()
            assert grid.get_node_ids() == [5]


def test_other_machines_need_token_and_certificate(certificates: TLS) -> None:
    for tls, token in ((None, TOKEN), (certificates, b""), (None, b"")):
        for host in ("0.0.0.0", "[::]", "192.0.2.1", "jetson"):
            with pytest.raises(ConfigError, match="can be reached from other machines"):
                OpenGrid(f"{host}:0", tls, token)
    for host in ("127.0.0.1", "localhost"):
        OpenGrid(f"{host}:0").close()
    OpenGrid("0.0.0.0:0", certificates, TOKEN).close()


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


class Process:
    """The command line in a process of its own."""

    def __init__(self, *arguments: object) -> None:
        self.child = subprocess.Popen(
            [sys.executable, "-u", "-m", "fl_edge.clients.hat", *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.child.stdout
        assert self.child.stderr
        self.shown, self.told = bytearray(), bytearray()
        self._threads = [
            threading.Thread(target=self._follow, args=pair)
            for pair in ((self.child.stdout, self.shown), (self.child.stderr, self.told))
        ]
        for thread in self._threads:
            thread.start()

    @staticmethod
    def _follow(stream: Any, into: bytearray) -> None:
        while data := os.read(stream.fileno(), 65_536):
            into += data

    def type(self, text: str) -> None:
        assert self.child.stdin
        self.child.stdin.write(text.encode())
        self.child.stdin.flush()

    def end(self) -> tuple[int, str, str]:
        """Wait for the end; return exit code, what was shown, and what else was said."""
        assert self.child.stdin
        self.child.stdin.close()
        code = self.child.wait(60)
        for thread in self._threads:
            thread.join()
        for stream in (self.child.stdout, self.child.stderr):
            assert stream
            stream.close()
        return code, self.shown.decode(), self.told.decode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self.child.poll() is None:
            self.child.kill()
            self.end()


@pytest.fixture
def keys(tmp_path: Path) -> Path:
    assert main(["keys", str(tmp_path / "keys")]) == 0
    return tmp_path / "keys"


def test_two_processes_with_tls_and_a_token(
    model: Model, keys: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two devices, to be quick one of them in this process: one has no more prompts, the other gets Ctrl-C."""
    chat_with = ["chat", "--model", model.folder, "--shallow", 2, "--keys", keys, "--new-tokens", NEW, "--server"]
    with Process("serve", model.folder, "--shallow", 2, "--listen", "localhost:0", "--keys", keys) as server:
        eventually(lambda: b"Ctrl-C ends" in server.told)
        chat_with.append(f"localhost:{server.told.decode().split('localhost:')[1].split(',')[0]}")
        with Process(*chat_with, "--name", "one", "--adapter", model.adapter_file) as one:
            capsys.readouterr()
            monkeypatch.setattr(sys, "stdin", io.StringIO("def wetter\nreturn"))
            assert main([*map(str, chat_with), "--name", "two"]) == 0
            shown, told = capsys.readouterr()
            assert shown == lines_of(model.answer("def wetter"), model.answer("return"))
            assert told.count("TTFT") == told.count("\n") == 2
            one.type("wann\n")
            eventually(lambda: b"TTFT" in one.told)
            one.child.send_signal(signal.SIGINT)
            assert one.end()[:2] == (130, lines_of(model.answer("wann")))
        eventually(lambda: b"one is out" in server.told)
        server.child.send_signal(signal.SIGINT)
        code, shown, told = server.end()
        assert (code, shown) == (0, "")
        for line in ("one is here", "two is here", "two has left", "one is out: ", "stopped"):
            assert line in told
        assert told.count("TTFT") == 3
        assert not [word for word in ("wann", "wetter", "return", "Traceback", "Warning") if word in told]
        assert (keys / "token").read_text().strip() not in told
