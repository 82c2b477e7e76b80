"""Clients that are processes of their own: frozen, killed, forked, forgotten, and what they may log."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from fl_edge.link.resident.client import Invitation
from fl_edge.link.resident.config import TLS, LinkConfig
from tests.link_site import MIB, PATIENCE_S, Site, eventually, why

pytestmark = pytest.mark.usefixtures("in_time", "impatient", "no_thread_is_left")


SCRIPT = """
import dataclasses, json, logging, multiprocessing, os, sys, threading
from fl_edge.link.resident.client import Invitation, LinkClient
invitation = json.loads(sys.stdin.readline())
for name in ("authority", "token"):
    invitation[name] = bytes.fromhex(invitation[name])
client = LinkClient(Invitation(**invitation))
"""


@contextmanager
def process(invitation: Invitation, script: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Run a client in a process of its own."""
    given = dataclasses.asdict(invitation)
    given |= {name: given[name].hex() for name in ("authority", "token")}
    started = subprocess.Popen(
        [sys.executable, "-W", "error", "-c", SCRIPT + textwrap.dedent(script)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, **environment},
    )  # fmt: skip
    try:
        assert started.stdin
        started.stdin.write(json_line(given))
        started.stdin.flush()
        yield started
    finally:
        started.kill()
        started.communicate()


def json_line(value: object) -> str:
    import json

    return json.dumps(value) + "\n"


def test_closing_does_not_wait_for_a_frozen_client() -> None:
    config = LinkConfig(heartbeat_s=3600.0)
    with Site(config) as site, process(site.invitation(1), "list(client.messages())") as frozen:
        eventually(lambda: site.server.state(1) == "connected")
        other = site.connected(2)
        frozen.send_signal(signal.SIGSTOP)
        for _ in range(30):
            site.server.send(1, [bytes(MIB)])
        site.server.close("the run has ended", 0.5)
        assert why(other) == "the run has ended"
        assert site.ended == []


def test_a_killed_client_is_missed_after_the_grace() -> None:
    config = LinkConfig(grace_s=0.5)
    with Site(config) as site, process(site.invitation(1), "list(client.messages())") as killed:
        eventually(lambda: site.server.state(1) == "connected")
        killed.kill()
        eventually(lambda: site.ended)
        assert site.ended == [(1, "no connection for 0.5 s")]


def test_a_client_may_fork_as_data_loaders_do() -> None:
    """The children inherit the socket and gRPC's locks; the session must not notice."""
    script = """
        def work(number):
            return number * number
        for chunks in client.messages():
            with multiprocessing.get_context("fork").Pool(2) as pool:
                client.send([repr(pool.map(work, range(4))).encode()])
        print(client.reason)
    """
    with Site() as site, process(site.invitation(1), script) as forking:
        for _ in range(3):
            site.server.send(1, [b"go"])
        eventually(lambda: len(site.messages[1]) == 3)
        assert site.messages[1] == [b"[0, 1, 4, 9]"] * 3
        site.server.release(1, "thank you")
        output, _ = forking.communicate(timeout=PATIENCE_S)
        assert output.splitlines()[-1] == "thank you"
        assert "Traceback" not in output


def test_no_thread_keeps_a_process_alive_that_forgot_to_close() -> None:
    script = """
        from fl_edge.link.resident.config import LinkConfig
        from fl_edge.link.resident.server import LinkServer
        server = LinkServer(LinkConfig(), "127.0.0.1:0", None, lambda *_: None, lambda *_: None)
        own = dataclasses.replace(client._invitation, address=f"127.0.0.1:{server.port}", token=server.admit(1))
        another = LinkClient(own)
        server.send(1, [b"hello"])
        next(another.messages())
        another.send([b"x"])
        print(server.state(1))
    """
    with Site() as site, process(site.invitation(1), script) as forgetful:
        output, _ = forgetful.communicate(timeout=PATIENCE_S)
        assert output.splitlines()[0] == "connected"
        assert "Traceback" not in output
        assert forgetful.returncode == 0


@pytest.mark.parametrize("verbosity", ["INFO", "DEBUG"])
def test_no_token_is_in_any_log(certificates: TLS, tmp_path: Path, verbosity: str) -> None:
    """A session with cuts, refusals and ends, everything that can be logged logged, by gRPC too."""
    files = []
    for name in ("certificate", "key", "authority"):
        files.append(tmp_path / name)
        files[-1].write_bytes(getattr(certificates, name))
    script = f"""
        import secrets
        logging.basicConfig(level=logging.DEBUG)
        issued, make = [], secrets.token_bytes
        secrets.token_bytes = lambda size: issued.append(make(size)) or issued[-1]
        from fl_edge.link.resident.config import TLS, LinkConfig
        from fl_edge.link.resident.server import LinkServer
        tls = TLS.from_files(*{[str(file) for file in files]!r})
        server = LinkServer(LinkConfig(), "127.0.0.1:0", tls, lambda *_: None, lambda *_: None)
        address = f"127.0.0.1:{{server.port}}"
        client.close("this one is not needed")
        for node in range(3):
            own = dataclasses.replace(
                client._invitation, address=address, authority=tls.authority, node_id=node, token=server.admit(node)
            )
            print(own, tls, server._sessions[node], server._sessions[node].tokens)
            one = LinkClient(own)
            server.send(node, [b"hello"])
            next(one.messages())
            one._call.cancel()
            server.send(node, [b"hello"])
            next(one.messages())
            another = LinkClient(own)
            print(list(another.messages()), another.reason)
            server.expel(node, "enough") if node else one.close("enough")
        logging.debug("the end")
        server.close("done")
        print("issued", *[token.hex() for token in issued])
    """
    with Site() as site, process(site.invitation(1), script, GRPC_VERBOSITY=verbosity) as talkative:
        output, _ = talkative.communicate(timeout=PATIENCE_S)
    log, _, issued = output.rpartition("issued ")
    assert talkative.returncode == 0, output
    assert "DEBUG:root:the end" in log
    tokens = [bytes.fromhex(token) for token in issued.split()]
    assert len(tokens) >= 6
    for token in tokens:
        assert not [form for form in written(token) if form in log]
    key = certificates.key.decode().splitlines()[1]
    assert key not in log


def written(secret: bytes) -> list[str]:
    from base64 import b64encode, urlsafe_b64encode

    plain = [b64encode(secret).decode().rstrip("="), urlsafe_b64encode(secret).decode().rstrip("=")]
    return [secret.hex(), secret.hex().upper(), repr(secret)[2:-1], *plain]
