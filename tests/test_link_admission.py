"""Who may come to a LinkServer: tokens, strangers at the door, certificates, addresses."""

from __future__ import annotations

import dataclasses
import select
import socket
import threading
from contextlib import ExitStack, suppress
from pathlib import Path

import grpc
import pytest

from fl_edge.errors import ConfigError
from fl_edge.link.resident import server as server_module
from fl_edge.link.resident.config import TLS, LinkConfig
from fl_edge.link.resident.frames import NODE_KEY, POSITION_KEY, TOKEN_KEY, Position, read_frame
from fl_edge.link.resident.server import LinkServer
from tests.link_site import (
    ACKNOWLEDGEMENT,
    CHANNEL,
    MIB,
    PATIENCE_S,
    PREFACE,
    Metadata,
    Proxy,
    Raw,
    Site,
    answers,
    credentials,
    data_frame,
    echo,
    eventually,
    make_tls,
    why,
)

pytestmark = pytest.mark.usefixtures("in_time", "impatient", "no_thread_is_left")

# --- who may come ---


def test_all_who_are_refused_see_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with Site() as site:
        tokens = {node: site.server.admit(node) for node in (1, 2, 4, 5, 6)}
        site.server.release(4, "released")
        site.server.expel(5, "expelled")
        with Raw(site.server.port, credentials(6, tokens[6])) as raw:
            successor = raw.welcome()
            raw.send(ACKNOWLEDGEMENT, data_frame(1))
            eventually(lambda: site.messages[6])
        void = site.server.admit(2)  # begins another session
        assert void != tokens[2]
        strangers: dict[str, Metadata] = {
            "nothing at all": (),
            "no token": ((NODE_KEY, "1"), (POSITION_KEY, "0.0")),
            "empty token": credentials(1, b""),
            "wrong token": credentials(1, bytes(32)),
            "half a token": credentials(1, tokens[1][:16]),
            "too long a token": credentials(1, tokens[1] + b"x"),
            "token as text": ((NODE_KEY, "1"), ("fl-edge-token", tokens[1].hex()), (POSITION_KEY, "0.0")),
            "unknown node": credentials(99, bytes(32)),
            "unknown node, a good token": credentials(99, tokens[1]),
            "token of another node": credentials(1, successor),
            "used token": credentials(6, tokens[6]),
            "token of an older session": credentials(2, tokens[2]),
            "released": credentials(4, tokens[4]),
            "expelled": credentials(5, tokens[5]),
            "no node": ((TOKEN_KEY, tokens[1]), (POSITION_KEY, "0.0")),
            "no number": credentials("one", tokens[1]),
            "negative": credentials(-1, tokens[1]),
            "huge": credentials("1" * 300, tokens[1]),
            "no position": ((NODE_KEY, "1"), (TOKEN_KEY, tokens[1])),
            "nonsense position": credentials(1, tokens[1], "here"),
        }
        seen = {}
        for name, metadata in strangers.items():
            with Proxy(site.server.port) as proxy, Raw(int(proxy.address.rpartition(":")[2]), metadata) as raw:
                assert raw.outcome() == ([], grpc.StatusCode.UNAUTHENTICATED, "refused", (), ()), name
                seen[name] = answers(b"".join(proxy.seen))
        assert len(seen["nothing at all"]) == 1
        assert {name for name, answer in seen.items() if answer != seen["nothing at all"]} == set()
        with Raw(site.server.port, credentials(1, tokens[1])) as raw:
            raw.welcome()  # none of them has used it up


def test_a_refused_client_says_so(security: TLS | None) -> None:
    with Site(tls=security) as site:
        for node, token in ((1, bytes(32)), (9, b""), (2**64 - 1, b"x" * 32)):
            assert why(site.client(node, token)) == f"the server at 127.0.0.1:{site.server.port} refused this client"
        assert site.ended == []


def test_a_token_works_once() -> None:
    with Site() as site:
        token = site.server.admit(1)
        with Raw(site.server.port, credentials(1, token)) as first:
            second_token = first.welcome()
            first.send(data_frame(1))
            eventually(lambda: site.messages[1])  # which shows that the second has arrived
            with Raw(site.server.port, credentials(1, token)) as thief:
                assert thief.outcome()[:3] == ([], grpc.StatusCode.UNAUTHENTICATED, "refused")
            first.send(data_frame(2, b"unharmed"))
            eventually(lambda: site.messages[1][1:] == [b"unharmed"])
        with Raw(site.server.port, credentials(1, second_token)) as back:
            assert back.welcome() not in (token, second_token)


def test_an_idle_client_confirms_its_new_token_as_well() -> None:
    with Site() as site:
        token = site.server.admit(1)
        client = site.client(1, token)
        eventually(lambda: client._token != token)
        eventually(lambda: not site.server._sessions[1].tokens.accept(token))
        with Raw(site.server.port, credentials(1, token)) as thief:
            assert thief.outcome()[:3] == ([], grpc.StatusCode.UNAUTHENTICATED, "refused")
        assert site.server.state(1) == "connected"


def test_a_welcome_that_was_lost_does_not_lock_the_client_out() -> None:
    with Site() as site:
        token = site.server.admit(1)
        tokens = [token]
        for _ in range(3):
            with Raw(site.server.port, credentials(1, token)) as raw:  # it does not see, or not use, its new token
                tokens.append(raw.welcome())
        assert len(set(tokens)) == 4
        with Raw(site.server.port, credentials(1, tokens[1])) as raw:  # a successor that was succeeded
            assert raw.outcome()[1] == grpc.StatusCode.UNAUTHENTICATED
        with Raw(site.server.port, credentials(1, tokens[3])) as raw:
            raw.welcome()


def test_a_late_frame_of_an_old_connection_confirms_no_newer_token() -> None:
    with Site() as site:
        token = site.server.admit(1)
        with Raw(site.server.port, credentials(1, token)) as raw:
            second = raw.welcome()
            raw.send(ACKNOWLEDGEMENT, data_frame(1))
            eventually(lambda: site.messages[1])
        session = site.server._sessions[1]
        with Raw(site.server.port, credentials(1, second)) as lost:
            lost.welcome()
            # what the reader of the first connection had still in hand, while the welcome of the second got lost
            site.server._receive(session, 1, read_frame(data_frame(2, b"late")))
            assert site.messages[1] == [b"x"]
        with Raw(site.server.port, credentials(1, second)) as back:
            back.welcome()
            back.send(data_frame(2, b"again"))
            eventually(lambda: site.messages[1] == [b"x", b"again"])


def test_a_client_out_of_step_is_told_and_the_session_waits_for_a_better_one() -> None:
    with Site() as site:
        token = site.server.admit(1)
        with Raw(site.server.port, credentials(1, token, Position(5, 0))) as raw:
            assert raw.outcome()[:3] == ([], grpc.StatusCode.FAILED_PRECONDITION, "out of step")
        assert site.server.state(1) == "invited"
        with Raw(site.server.port, credentials(1, token)) as raw:
            raw.welcome()


def test_another_session_ends_the_older_one() -> None:
    with Site() as site:
        old = site.connected(1)
        site.server.send(1, [b"to the old one"])
        new = site.client(1)
        assert [bytes(chunks[0]) for chunks in old.messages()] == [b"to the old one"]
        assert old.reason == "another session was begun for this node"
        site.server.send(1, [b"to the new one"])
        assert bytes(next(new.messages())[0]) == b"to the new one"
        new.send([b"from the new one"])
        eventually(lambda: site.messages[1] == [b"from the new one"])
        assert site.ended == []


def test_no_more_than_max_nodes() -> None:
    with Site(LinkConfig(max_nodes=2)) as site:
        first = site.connected(1)
        site.server.admit(2)
        with pytest.raises(ConfigError, match=r"^2 nodes are connected, no more are allowed \(max_nodes\)$"):
            site.server.admit(3)
        assert site.server.state(3) == "absent"
        site.server.admit(2)  # in the place of its own
        site.server.release(1, "enough")
        assert why(first) == "enough"
        site.connected(3)


# --- strangers at the door ---


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that waits less long for a handshake."""
    monkeypatch.setattr(server_module, "_HANDSHAKE_S", 1)


def hung_up(peer: socket.socket) -> bool:
    """Return whether the server has hung up on a peer to which it says nothing."""
    with suppress(BlockingIOError, ConnectionResetError):
        return peer.recv(4096, socket.MSG_DONTWAIT | socket.MSG_PEEK) == b""
    return bool(select.select([peer], [], [], 0)[0])


def dropped(peer: socket.socket) -> bool:
    """Wait until the server hangs up."""
    peer.settimeout(PATIENCE_S)
    with suppress(ConnectionResetError):
        while peer.recv(4096):
            pass
    return True


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize(
    "words", [b"", b"GET / HTTP/1.1\r\n\r\n", PREFACE, PREFACE + b"\0\0\0\4\0\0\0\0\0", b"\x16\x03\x01\x02\x00"]
)
def test_a_peer_without_a_call_is_dropped(security: TLS | None, words: bytes) -> None:
    with Site(tls=security) as site:
        address = ("127.0.0.1", site.server.port)
        with socket.create_connection(address) as peer:
            peer.sendall(words)
            assert dropped(peer)
        with echo(site.client(1)):
            site.server.send(1, [b"still there"])
            eventually(lambda: site.messages[1])


@pytest.mark.usefixtures("hasty")
def test_a_channel_without_a_call_is_closed() -> None:
    with Site() as site, Proxy(site.server.port) as proxy, grpc.insecure_channel(proxy.address, CHANNEL) as channel:
        grpc.channel_ready_future(channel).result(PATIENCE_S)
        eventually(lambda: not proxy._sockets)
        assert proxy.connections == 1


@pytest.mark.usefixtures("hasty")
def test_a_good_client_is_served_among_many_silent_ones(security: TLS | None) -> None:
    """Twice as many as the server takes at once: it forgets them one by one."""
    config = LinkConfig(max_nodes=2, grace_s=60.0)
    with Site(config, security) as site, ExitStack() as stack:
        for _ in range(80):
            stack.enter_context(socket.create_connection(("127.0.0.1", site.server.port)))
        stack.enter_context(echo(site.client(1)))
        site.server.send(1, [bytes(2 * MIB)])
        eventually(lambda: site.messages[1] == [bytes(2 * MIB)])


def test_more_connections_than_nodes_could_need_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "_HANDSHAKE_S", 3600)
    config = LinkConfig(max_nodes=2)
    most = 2 * (config.max_nodes + server_module._SPARE_CALLS)
    with Site(config) as site, echo(site.connected(1)), ExitStack() as stack:
        address = ("127.0.0.1", site.server.port)
        peers = [stack.enter_context(socket.create_connection(address)) for _ in range(most + 20)]
        eventually(lambda: sum(map(hung_up, peers)) >= 20)
        site.server.send(1, [b"still there"])
        eventually(lambda: site.messages[1])


def test_an_idle_client_is_not_taken_for_a_silent_one(hasty: None) -> None:
    with Site() as site, Proxy(site.server.port) as proxy, echo(site.connected(1, address=proxy.address)):
        threading.Event().wait(2.5)
        assert proxy.connections == 1
        site.server.send(1, [b"hello"])
        eventually(lambda: site.messages[1])
        assert site.ended == []


def test_metadata_have_a_limit() -> None:
    with Site() as site:
        token = site.server.admit(1)
        for size in (5_000, 60_000):
            with Raw(site.server.port, (*credentials(1, token), ("junk", "x" * size))) as raw:
                assert raw.outcome()[1] == grpc.StatusCode.RESOURCE_EXHAUSTED
        with Raw(site.server.port, (*credentials(1, token), ("junk", "x" * 1000))) as raw:
            raw.welcome()


def test_other_methods_are_not_there() -> None:
    with Site() as site:
        token = site.server.admit(1)
        for method in ("/fl_edge.Link/Leave", "/", "/fl_edge.Link/Stay/"):
            with Raw(site.server.port, credentials(1, token), method) as raw:
                assert raw.outcome()[:2] == ([], grpc.StatusCode.UNIMPLEMENTED)


def test_a_client_in_the_clear_and_a_server_with_tls_and_the_reverse(certificates: TLS, tmp_path: Path) -> None:
    another = make_tls(tmp_path)
    for server_tls, authority in (
        (certificates, b""),
        (None, certificates.authority),
        (certificates, another.authority),
        (certificates, b"no certificate"),
    ):
        with Site(LinkConfig(grace_s=0.5), server_tls) as site:
            client = site.client(1, authority=authority)
            address = f"127.0.0.1:{site.server.port}"
            assert why(client).startswith(f"no connection to {address} for 0.5 s: ")
            assert len(client.reason) > len(f"no connection to {address} for 0.5 s: ") + 5
            assert site.server.state(1) == "invited"
            with echo(site.client(2)):
                site.server.send(2, [b"still there"])
                eventually(lambda: site.messages[2])
            site.server.release(1, "enough")


def test_a_certificate_is_for_its_host(certificates: TLS) -> None:
    with Site(LinkConfig(grace_s=0.5), certificates) as site:
        assert "no connection to 127.0.0.2" in why(site.client(1, address=f"127.0.0.2:{site.server.port}"))
        with echo(site.client(2, address=f"localhost:{site.server.port}")):
            site.server.send(2, [b"hello"])
            eventually(lambda: site.messages[2])


def start(listen: str, tls: TLS | None = None, config: LinkConfig | None = None) -> LinkServer:
    return LinkServer(config or LinkConfig(), listen, tls, lambda *_: None, lambda *_: None)


@pytest.mark.parametrize(
    "listen",
    ["", "nowhere", "127.0.0.1", "127.0.0.1:", "127.0.0.1:port", "127.0.0.1:99999", "127.0.0.1:-1", "1.2.3.4:0", ":"],
)
def test_an_address_that_cannot_be_listened_on(security: TLS | None, listen: str) -> None:
    with pytest.raises(ConfigError, match=r"must be host:port with a free port of this machine") as caught:
        start(listen, security)
    assert str(caught.value).startswith(f"cannot listen on {listen}: ")
    assert "\n" not in str(caught.value)


def test_a_port_in_use() -> None:
    with Site() as site, pytest.raises(ConfigError, match=f"^cannot listen on 127.0.0.1:{site.server.port}: "):
        start(f"127.0.0.1:{site.server.port}")


def test_certificates_that_do_not_work(certificates: TLS, tmp_path: Path) -> None:
    another = make_tls(tmp_path)
    for wrong in (
        dataclasses.replace(certificates, key=another.key),
        dataclasses.replace(certificates, key=certificates.certificate),
        dataclasses.replace(certificates, certificate=certificates.key),
        dataclasses.replace(certificates, certificate=b"-----BEGIN CERTIFICATE-----\nnonsense"),
    ):
        with pytest.raises(ConfigError, match=r"certificate and key must belong together$") as caught:
            start("127.0.0.1:0", wrong)
        assert "\n" not in str(caught.value)


def test_settings_out_of_range_do_not_start() -> None:
    with pytest.raises(ConfigError, match=r"^heartbeat_s=0.0 is not allowed"):
        start("127.0.0.1:0", config=LinkConfig(heartbeat_s=0.0))
