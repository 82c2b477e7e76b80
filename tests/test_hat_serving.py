"""HAT without Flower's SuperLink: a server that stays, devices that come and go, a person at each."""

from __future__ import annotations

import socket
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from flwr.app import Context, RecordDict
from flwr.clientapp import ClientApp

from fl_edge.clients.hat import HatClient, chat
from fl_edge.clients.hat.__main__ import main
from fl_edge.clients.hat.chat import ANEW, Door, NoServerError
from fl_edge.errors import ConfigError
from fl_edge.hat.split import load_device
from fl_edge.link.content import config_of, tensors_of
from fl_edge.link.resident.client import LinkClient
from fl_edge.link.resident.clientapp import reply_to
from fl_edge.link.resident.codec import decode
from fl_edge.link.resident.config import TLS
from fl_edge.link.resident.frames import Buffer
from fl_edge.link.resident.invitation import own_invitation
from fl_edge.link.resident.open import OpenGrid
from fl_edge.strategies import hat as strategy
from tests.link_site import ACKNOWLEDGEMENT, Proxy, Raw, credentials, eventually
from tests.served_hat import CLOUD, LINK, TEXT, TOKEN, Model, Served, Shown, converse, lines_of
from tests.tiny_hat import CPU

pytestmark = pytest.mark.usefixtures("in_time", "impatient")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strategy, "_LOOK_S", 0.02)
    monkeypatch.setattr(chat, "_AGAIN_S", 0.05)


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
