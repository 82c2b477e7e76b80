"""The bare loop that the link is measured against: gRPC for Python and nothing else, the same bytes there and back.

One bidirectional stream a node, one frame a message, plain threads, no encoding, no checks, no limits. Each node is a
process (``python -m benchmarks.link_bare ADDRESS AUTHORITY``) that sends back what it receives.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Self

import grpc

ROOT = Path(__file__).resolve().parent.parent
METHOD = "/bare/echo"
_UNLIMITED = (("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1))
_START_S = 60.0


class BareLoop:
    """A server with its echoing processes; as a context manager, it leaves none behind.

    Parameters
    ----------
    nodes
        How many processes.
    tls
        Files of the server's certificate, its key, and the authority; without them all goes in the clear.
    """

    def __init__(self, nodes: int, tls: Sequence[str] | None = None) -> None:
        self._outboxes: list[SimpleQueue[bytes | None]] = []
        self._arrived: list[bytes] = []
        self._complete = threading.Event()
        self._nodes = nodes
        self._server = grpc.server(ThreadPoolExecutor(nodes), options=_UNLIMITED)
        handler: grpc.RpcMethodHandler[bytes, bytes] = grpc.stream_stream_rpc_method_handler(self._stay)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bare", {"echo": handler}),))
        if tls:
            certificate, key, authority = tls
            pair = (Path(key).read_bytes(), Path(certificate).read_bytes())
            port = self._server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair]))
        else:
            authority = ""
            port = self._server.add_insecure_port("127.0.0.1:0")
        self._command = [sys.executable, "-m", "benchmarks.link_bare", f"127.0.0.1:{port}", authority]
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        self._server.start()
        try:
            for _ in range(self._nodes):
                self._processes.append(subprocess.Popen(self._command, cwd=ROOT))
            if not self._complete.wait(_START_S):
                raise RuntimeError(f"{len(self._outboxes)} of {self._nodes} echoing processes came")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def exchange(self, payloads: Sequence[bytes]) -> list[bytes]:
        """Send one payload to each node, and return what came back, in the order of arrival."""
        self._arrived = []
        self._complete.clear()
        for outbox, payload in zip(self._outboxes, payloads, strict=True):
            outbox.put(payload)
        if not self._complete.wait(_START_S):
            raise RuntimeError(f"{len(self._arrived)} of {self._nodes} echoes came back")
        return self._arrived

    def close(self) -> None:
        """End the streams and the processes."""
        for outbox in self._outboxes:
            outbox.put(None)
        self._server.stop(2.0).wait()
        for process in self._processes:
            process.terminate()
            process.wait()

    def _stay(self, requests: Iterator[bytes], context: Any) -> Iterator[bytes]:
        """Serve one stream: what stands in its outbox goes out, what comes in is counted by a thread of its own."""
        outbox: SimpleQueue[bytes | None] = SimpleQueue()
        threading.Thread(target=self._read, args=(requests,), daemon=True).start()
        context.add_callback(lambda: outbox.put(None))
        self._outboxes.append(outbox)
        if len(self._outboxes) == self._nodes:
            self._complete.set()
        return iter(outbox.get, None)

    def _read(self, requests: Iterator[bytes]) -> None:
        try:
            for data in requests:
                self._arrived.append(data)
                if len(self._arrived) == self._nodes:
                    self._complete.set()
        except grpc.RpcError:
            pass  # the stream was ended


def echo(address: str, authority: str) -> None:
    """Send back what comes, until the server ends the stream."""
    channel = (
        grpc.secure_channel(address, grpc.ssl_channel_credentials(Path(authority).read_bytes()), _UNLIMITED)
        if authority
        else grpc.insecure_channel(address, _UNLIMITED)
    )
    outbox: SimpleQueue[bytes] = SimpleQueue()
    method: grpc.StreamStreamMultiCallable[bytes, bytes] = channel.stream_stream(METHOD)
    try:
        for data in method(iter(outbox.get, None), wait_for_ready=True):
            outbox.put(data)
    except grpc.RpcError:
        pass  # the server has gone
    os._exit(0)  # gRPC's own threads may be waiting in the outbox


if __name__ == "__main__":
    echo(sys.argv[1], sys.argv[2])
