"""Memory of a server process with many resident clients, exchange after exchange.

:func:`measure_memory` starts two kinds of processes: the server, which is measured and has nothing but a real
ResidentGrid, TLS on; and a few that hold the clients, each a real resident ClientApp in a thread of its own, which
sends back what it gets. Flower's part, handing the invitations out, is played by :class:`Door`: so many SuperNodes with
their ClientApps would need more memory than the machines that this runs on have.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from flwr.app import Array, ArrayRecord, Context, Message, RecordDict
from flwr.serverapp import Grid

ROOT = Path(__file__).resolve().parent.parent
_MALLINFO = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
EVERY = 10  # exchanges from one look at the memory to the next


def measure_memory(nodes: int, size: int, exchanges: int, processes: int) -> dict[str, Any]:
    """Run the exchanges, in a server process of their own, and return its memory at every tenth of them.

    Parameters
    ----------
    size
        Bytes of one message, in each direction.
    processes
        How many processes share the clients.

    Returns
    -------
    dict
        ``curve`` of (number of the exchange, resident MiB, MiB that are allocated), and ``times_ms``.
    """
    with tempfile.TemporaryDirectory(prefix="fl_edge-link-") as folder:
        settings = {"nodes": nodes, "size": size, "exchanges": exchanges, "processes": processes, "folder": folder}
        command = [sys.executable, "-m", "benchmarks.link_memory", "serve", json.dumps(settings)]
        process = subprocess.Popen(command, cwd=ROOT)
        try:
            if process.wait():
                raise RuntimeError(f"the server process has ended with status {process.returncode}")
        except BaseException:
            process.terminate()  # the others end when their pipe does
            process.wait()
            raise
        return dict(json.loads((Path(folder) / "memory.json").read_text()))


class Door(Grid):
    """Flower's part: hands invitations to the processes that hold the clients, in turn, and knows no replies."""

    def __init__(self, nodes: Sequence[int], processes: Sequence[subprocess.Popen[bytes]]) -> None:
        self._nodes, self._processes = list(nodes), list(processes)
        self._numbers = 0

    def set_run(self, run: Any) -> None:
        """Do nothing: there is no run."""

    @property
    def run(self) -> Any:
        """Not there."""
        return None

    def create_message(self, *arguments: Any, **named: Any) -> Message:
        """Not there: nobody asks a door for messages."""
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        """Return the ids of all nodes."""
        return self._nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Hand out invitations."""
        from fl_edge.link.resident.codec import encode

        ids = []
        for message in messages:
            pipe = self._processes[self._numbers % len(self._processes)].stdin
            assert pipe is not None
            data = b"".join(encode(message))
            pipe.write(len(data).to_bytes(4, "little") + data)
            pipe.flush()
            self._numbers += 1
            ids.append(f"invitation-{self._numbers}")
        return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:  # noqa: ARG002
        """Return nothing: nobody leaves early."""
        return []

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Not there: nobody waits at a door for replies."""
        raise NotImplementedError


def serve(nodes: int, size: int, exchanges: int, processes: int, folder: str) -> None:
    """Be the server process: every node gets back, in each exchange, what it sent in the one before."""
    import psutil

    from fl_edge.link.certificates import make_certificates
    from fl_edge.link.flower import identify_process
    from fl_edge.link.resident import TLS, ResidentGrid

    logging.getLogger("flwr").setLevel(logging.WARNING)
    identify_process(1)
    authority, certificate, key = (Path(folder) / name for name in ("ca.pem", "server.pem", "server.key"))
    make_certificates(authority, certificate, key)
    tls = TLS.from_files(certificate, key, authority)
    command = [sys.executable, "-m", "benchmarks.link_memory", "clients"]
    holders = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(processes)]
    this = psutil.Process()
    try:
        with ResidentGrid(Door(range(1, nodes + 1), holders), tls=tls) as grid:
            sent = {node: _record(os.urandom(size)) for node in grid.get_node_ids()}
            first = {node: _data(content) for node, content in sent.items()}
            curve = []
            times_ms = []
            said_at = time.monotonic()
            for number in range(1, exchanges + 1):
                started = time.perf_counter()
                messages = [Message(content, node, "query.echo") for node, content in sent.items()]
                replies = grid.send_and_receive(messages)
                times_ms.append(1000 * (time.perf_counter() - started))
                sent = {reply.metadata.src_node_id: reply.content for reply in replies}
                del messages, replies
                mib = this.memory_info().rss / 2**20
                if number % EVERY == 0:
                    curve.append((number, mib, held_mib()))
                if time.monotonic() - said_at > 5:
                    said_at = time.monotonic()
                    print(f"  exchange {number} of {exchanges}, {mib:.0f} MiB", flush=True)
            if {node: _data(content) for node, content in sent.items()} != first:
                raise RuntimeError("what came back in the end is not what was sent in the beginning")
        (Path(folder) / "memory.json").write_text(json.dumps({"curve": curve, "times_ms": times_ms}))
    finally:
        for holder in holders:
            if holder.stdin:
                with suppress(OSError):
                    holder.stdin.close()
            holder.terminate()
            holder.wait()


def held_mib() -> float:
    """Return what the C library's malloc has given away and not got back; what is resident beyond it, it keeps.

    0 where the library is not glibc 2.33 or newer.
    """

    class Information(ctypes.Structure):
        _fields_ = tuple((name, ctypes.c_size_t) for name in _MALLINFO)

    try:
        mallinfo = ctypes.CDLL(None).mallinfo2
    except (AttributeError, OSError):
        return 0.0
    mallinfo.restype = Information
    found = mallinfo()
    return float(found.uordblks + found.hblkhd) / 2**20


def _record(data: bytes) -> RecordDict:
    return RecordDict({"features": ArrayRecord({"data": Array("uint8", (len(data),), "bytes", data)})})


def _data(content: RecordDict) -> bytes:
    return content.array_records["features"]["data"].data


def hold_clients(invitations: IO[bytes]) -> None:
    """Be a process with clients: each invitation is followed by a ClientApp in a thread of its own."""
    from fl_edge.link.flower import identify_process
    from fl_edge.link.resident import ClientApp
    from fl_edge.link.resident.codec import decode

    identify_process(1)
    app = ClientApp()

    @app.query("echo")
    def echo(message: Message, context: Context) -> Message:  # noqa: ARG001
        return Message(message.content, reply_to=message)

    while header := invitations.read(4):
        message = decode([invitations.read(int.from_bytes(header, "little"))])
        context = Context(1, message.metadata.dst_node_id, {}, RecordDict(), {})
        threading.Thread(target=app, args=(message, context), daemon=True).start()


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(**json.loads(sys.argv[2]))
    else:
        hold_clients(sys.stdin.buffer)
