"""Ten thousand attempts on one server."""

from __future__ import annotations

import gc
import random
import struct
import threading

import grpc
import psutil
import pytest

from fl_edge.link.resident.config import LinkConfig
from fl_edge.link.resident.frames import METHOD, NODE_KEY, POSITION_KEY, TOKEN_KEY, Kind, make_frame
from tests.link_site import CHANNEL, MIB, PREFACE, Raw, Site, answers, credentials, data_frame, echo, eventually, knock

pytestmark = pytest.mark.usefixtures("in_time", "impatient", "no_thread_is_left")


STRANGE = [
    b"",
    b"\0",
    b"\xff" * 40,
    "ä½".encode(),
    b"%00",
    b"0.0",
    b"1" * 3000,
    b"../..",
    bytes(range(1, 120)),
    b"\r\nx: y",
]


def mutated_frame(source: random.Random, number: int, config: LinkConfig) -> bytes:
    """Return a valid frame for message `number`, or one that is valid no longer."""
    content = source.randbytes(source.choice([1, 30, config.frame_bytes]))
    choice = source.random()
    frame = bytearray(data_frame(number, content))
    if choice < 0.25:  # a field
        offset, size = source.choice([(0, 2), (2, 1), (3, 1), (4, 4), (8, 8), (16, 8), (24, 8)])
        values = [0, 1, 2, 3, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1, source.getrandbits(64), number + 1]
        frame[offset : offset + size] = (source.choice(values) % 2 ** (8 * size)).to_bytes(size, "little")
    elif choice < 0.4:
        del frame[source.randrange(len(frame)) :]
    elif choice < 0.5:
        frame += source.randbytes(source.choice([1, 8, 100]))
    elif choice < 0.6:
        for _ in range(source.randint(1, 5)):
            frame[source.randrange(len(frame))] ^= 1 << source.randrange(8)
    elif choice < 0.65:
        return source.randbytes(source.randrange(100))
    elif choice < 0.7:
        return make_frame(
            source.choice(list(Kind)), source.choice([0, 0, 5]), [source.randbytes(source.choice([0, 44, 9]))]
        )
    elif choice < 0.75:
        return data_frame(
            number, bytes(config.frame_bytes), total=source.choice([config.frame_bytes + 1, 2**41, 2**63])
        )
    elif choice < 0.85:
        return data_frame(source.choice([0, 1, number - 1, number + 1, number + 2]) % 2**64, content)
    return bytes(frame)


def header(name: bytes, value: bytes) -> bytes:
    """Return a header field as HPACK has it, never indexed."""
    return b"\x10" + hpack_text(name) + hpack_text(value)


def hpack_text(text: bytes) -> bytes:
    size = len(text)
    if size < 127:
        return bytes([size]) + text
    size -= 127
    coded = b"\x7f"
    while size >= 128:
        coded, size = coded + bytes([size % 128 + 128]), size // 128
    return coded + bytes([size]) + text


def http2_frame(kind: int, flags: int, number: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, number) + payload


HELLO = PREFACE + http2_frame(4, 0, 0, b"")


def mutated_request(source: random.Random, token: bytes) -> list[tuple[bytes, bytes]]:
    from base64 import b64encode

    fields = [
        (b":method", b"POST"), (b":scheme", b"http"), (b":path", METHOD.encode()), (b":authority", b"localhost"),
        (b"te", b"trailers"), (b"content-type", b"application/grpc"),
        (NODE_KEY.encode(), b"1"), (TOKEN_KEY.encode(), b64encode(token)), (POSITION_KEY.encode(), b"0.0"),
    ]  # fmt: skip
    for _ in range(source.randint(1, 3)):
        at = source.randrange(len(fields))
        name, value = fields[at]
        fields[at : at + 1] = source.choice(
            [
                [],
                [(name, source.choice(STRANGE))],
                [(name, value), (name, source.choice(STRANGE))],
                [(name, value[: len(value) // 2])],
                [(name, source.randbytes(source.randrange(60)))],
                [(source.choice(STRANGE) or b"x", value)],
                [(name.upper(), value)],
                [(name, value)] * 20,
            ]
        )
        if not fields:
            break
    return fields


class Storm:
    """Attempts on one server, by node 1 and by strangers."""

    def __init__(self, site: Site, seed: int) -> None:
        self.site, self.source = site, random.Random(seed)
        self.address = ("127.0.0.1", site.server.port)
        self.attempts = 0

    def frames(self, count: int) -> None:
        """Send frames as an admitted node, which is admitted again when its session has ended."""
        until = self.attempts + count
        while self.attempts < until:
            token = self.site.server.admit(1)
            number = 1
            for _ in range(self.source.randint(1, 3)):  # connections
                with Raw(self.site.server.port, credentials(1, token)) as raw:
                    token = raw.welcome()
                    frames = []
                    for _ in range(self.source.randint(2, 6)):
                        frames.append(mutated_frame(self.source, number, self.site.config))
                        frames += [data_frame(number)] * self.source.randint(0, 2)
                        number += 1
                    if self.source.random() < 0.2:
                        self.source.shuffle(frames)
                    raw.send(*frames)
                    self.attempts += len(frames)
                    raw.hang_up()
                    raw.outcome()
                if self.site.server.state(1) == "absent":
                    break

    def calls(self, count: int) -> None:
        """Try to connect with metadata that gRPC itself would send."""
        source = self.source
        with grpc.insecure_channel(f"127.0.0.1:{self.site.server.port}", CHANNEL) as channel:
            for _ in range(count):
                texts = ["", "1", "2", "-1", "0.0", "1.1", "x" * 200, "9" * 19, "18446744073709551616", "1e3", "~!@ #"]
                fields: list[tuple[str, str | bytes]] = []
                for key in (NODE_KEY, POSITION_KEY, TOKEN_KEY, "fl-edge-other", "grpc-timeout", "junk-bin"):
                    for _ in range(source.choice([0, 1, 1, 2])):
                        junk = source.randbytes(source.choice([0, 1, 31, 32, 33, 500]))
                        fields.append((key, junk if key.endswith("-bin") else source.choice(texts)))
                fields = [field for field in fields if field[0] != "grpc-timeout"]
                method = source.choice([METHOD] * 9 + ["/fl_edge.Link/Go"])
                with Raw(channel, tuple(fields), method) as raw:
                    raw.send(b"junk")
                    frames, code, *_ = raw.outcome()
                assert frames == []
                assert code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.UNIMPLEMENTED)
                self.attempts += 1

    def requests(self, count: int) -> None:
        """Send hand-made HTTP/2, and what is none."""
        source = self.source
        for _ in range(count // 10):
            parts = [HELLO] if source.random() < 0.9 else []
            for number in range(10):
                block = b"".join(header(*field) for field in mutated_request(source, source.randbytes(32)))
                if source.random() < 0.1:
                    block = block[: source.randrange(len(block) + 1)] + source.randbytes(5)
                flags = source.choice([4, 4, 4, 5, 0])
                parts.append(http2_frame(1, flags, 2 * number + 1, block))
                if source.random() < 0.3:
                    parts.append(http2_frame(source.randrange(12), source.randrange(256), number, source.randbytes(30)))
            if source.random() < 0.1:
                parts = [source.randbytes(source.randrange(2000)) for _ in range(10)]
            self.attempts += 10
            assert not [frame for frame in answers(knock(self.address, parts)) if frame[0] == 0]  # no data


def test_ten_thousand_mutations_later_the_server_is_as_it_was(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    config = LinkConfig(frame_kib=1, max_message_mib=1, grace_s=600.0)
    process = psutil.Process()
    with Site(config) as site:
        site.server.admit(2)
        warm = Storm(site, 1)
        for attempt in (warm.frames, warm.calls, warm.requests):
            attempt(300)
        gc.collect()
        site.server.release(1, "warm")
        eventually(lambda: sum(thread.name.startswith("fl_edge") for thread in threading.enumerate()) == 0)
        threads, memory = threading.active_count(), process.memory_info().rss
        storm = Storm(site, 2)
        storm.frames(6_000)
        storm.calls(2_000)
        storm.requests(2_000)
        assert storm.attempts >= 10_000
        ended = len(site.ended)
        assert ended > 300
        assert {node for node, _ in site.ended} == {1}
        assert all(reason.isprintable() for _, reason in site.ended)
        site.server.release(1, "enough")
        site.messages.clear()
        with echo(site.client(1)):
            site.server.send(1, [bytes(100_000)])
            eventually(lambda: site.messages[1] == [bytes(100_000)])
            site.server.release(1, "thank you")
        eventually(lambda: threading.active_count() <= threads + 2)
        gc.collect()
        assert process.memory_info().rss < memory + 48 * MIB
        assert len(site.ended) == ended
        assert site.server.state(2) == "invited"
    assert [record.message for record in caplog.records if record.levelname in ("WARNING", "ERROR")] == []
    assert "Traceback" not in "".join(capfd.readouterr())
