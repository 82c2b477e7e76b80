"""Who may come, with what certificate, and that neither shows in print."""

from __future__ import annotations

import dataclasses
import hmac
import logging
from pathlib import Path
from typing import Any

import pytest

from fl_edge.config import allowed, check
from fl_edge.errors import ConfigError, ReplyError
from fl_edge.link.certificates import make_certificates
from fl_edge.link.flower import identify_process
from fl_edge.link.resident.client import Invitation
from fl_edge.link.resident.config import TLS, LinkConfig
from fl_edge.link.resident.frames import TOKEN_BYTES
from fl_edge.link.resident.invitation import STAY, make_invitation, read_invitation
from fl_edge.link.resident.server import Session
from fl_edge.link.resident.tokens import Tokens

identify_process(1)


# --- tokens ---


def test_no_token_is_good_before_one_was_issued() -> None:
    tokens = Tokens()
    assert not tokens.accept(b"")
    assert not tokens.accept(bytes(TOKEN_BYTES))


def test_a_token_is_good_until_its_successor_is_confirmed() -> None:
    tokens = Tokens()
    first = tokens.issue()
    assert tokens.accept(first)
    second = tokens.issue(used=first)
    assert tokens.accept(first)  # the second may be lost on its way
    assert tokens.accept(second)
    tokens.confirm()
    assert not tokens.accept(first)
    assert tokens.accept(second)
    tokens.confirm()
    assert tokens.accept(second)


def test_a_successor_that_was_lost_is_void_when_the_next_is_issued() -> None:
    tokens = Tokens()
    first = tokens.issue()
    lost = tokens.issue(used=first)
    third = tokens.issue(used=first)
    assert [tokens.accept(token) for token in (first, lost, third)] == [True, False, True]
    fourth = tokens.issue(used=third)
    assert [tokens.accept(token) for token in (first, lost, third, fourth)] == [False, False, True, True]


def test_a_new_invitation_voids_all_before() -> None:
    tokens = Tokens()
    first = tokens.issue()
    second = tokens.issue(used=first)
    third = tokens.issue()
    assert [tokens.accept(token) for token in (first, second, third)] == [False, False, True]


def test_void_accepts_nothing() -> None:
    tokens = Tokens()
    first = tokens.issue()
    second = tokens.issue(used=first)
    tokens.void()
    assert not tokens.accept(first)
    assert not tokens.accept(second)
    tokens.confirm()
    assert not tokens.accept(second)


def test_tokens_are_long_random_and_all_of_each_counts() -> None:
    tokens = Tokens()
    issued = {tokens.issue() for _ in range(50)}
    assert len(issued) == 50
    assert {len(token) for token in issued} == {TOKEN_BYTES} == {32}
    good = tokens.issue()
    assert tokens.accept(good)
    assert not tokens.accept(good[:-1])
    assert not tokens.accept(good + b"\0")
    for position in range(TOKEN_BYTES):
        wrong = bytearray(good)
        wrong[position] ^= 1
        assert not tokens.accept(bytes(wrong))


def test_every_candidate_is_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, compared = Tokens(), []
    first = tokens.issue()
    second = tokens.issue(used=first)
    compare = hmac.compare_digest

    def counted(left: bytes, right: bytes) -> bool:
        compared.append((len(left), len(right)))
        return compare(left, right)

    monkeypatch.setattr(hmac, "compare_digest", counted)
    for token in (first, second, b"", bytes(TOKEN_BYTES), b"x" * 5000):
        compared.clear()
        tokens.accept(token)
        assert compared == [(32, 32), (32, 32)]  # digests of equal length, both of them, whether the first was right


# --- nothing of it in print ---


def showings(value: Any) -> str:
    return f"{value!r} {value!s} {[value]} {vars(value) if isinstance(value, Tokens) else ''}"


def forms(secret: bytes) -> list[str]:
    return [repr(secret)[2:-1], secret.hex(), secret.decode("latin1")]


def test_tokens_sessions_and_invitations_do_not_show_a_token(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    session = Session(1, LinkConfig())
    first = session.tokens.issue()
    second = session.tokens.issue(used=first)
    session.tokens.accept(second)
    session.tokens.confirm()
    message = make_invitation(1, second, "localhost:1", b"authority", LinkConfig())
    invitation, _ = read_invitation(message)
    assert invitation.token == second
    shown = "".join(map(showings, (session.tokens, session, session.stream, invitation))) + caplog.text
    for token in (first, second):
        assert not [form for form in forms(token) if form in shown]


def test_an_invitation_arrives_as_it_was_sent() -> None:
    config = LinkConfig(grace_s=3.5, heartbeat_s=0.5, frame_kib=2, max_message_mib=3, compression="int8")
    message = make_invitation(7, b"t" * 32, "localhost:1", b"authority", config)
    assert (message.metadata.message_type, message.metadata.dst_node_id) == (STAY, 7)
    invitation, compression = read_invitation(message)
    assert compression == "int8"
    assert invitation == Invitation(
        address="localhost:1", node_id=7, authority=b"authority", token=b"t" * 32,
        grace_s=3.5, heartbeat_s=0.5, frame_bytes=2048, max_message_bytes=3 * 1024**2,
    )  # fmt: skip


@pytest.mark.parametrize("version", [None, 0, 2, "1"])
def test_an_invitation_of_another_version_is_refused(version: Any) -> None:
    message = make_invitation(7, b"t" * 32, "localhost:1", b"", LinkConfig())
    record = message.content.config_records["fl_edge.link"]
    if version is None:
        del message.content["fl_edge.link"]
    else:
        record["version"] = version
    with pytest.raises(ReplyError, match="another version of fl_edge than this device; install the same on both"):
        read_invitation(message)


# --- certificates ---

NAMES = ("FL_EDGE_LINK_CERTIFICATE", "FL_EDGE_LINK_KEY", "FL_EDGE_LINK_CA")


@pytest.fixture
def pem(tmp_path: Path) -> dict[str, str]:
    files = {name: tmp_path / f"{name}.pem" for name in NAMES}
    make_certificates(files[NAMES[2]], files[NAMES[0]], files[NAMES[1]])
    return {name: str(file) for name, file in files.items()}


def one_line(caught: pytest.ExceptionInfo[ConfigError]) -> str:
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


def test_tls_holds_the_files_and_does_not_show_the_key(pem: dict[str, str]) -> None:
    tls = TLS.from_environment({**pem, "OTHER": "x"})
    assert tls == TLS.from_files(*pem.values())
    assert tls is not None
    assert tls.key == Path(pem[NAMES[1]]).read_bytes()
    assert tls.certificate == Path(pem[NAMES[0]]).read_bytes()
    assert tls.authority == Path(pem[NAMES[2]]).read_bytes()
    assert tls.key.splitlines()[1].decode() not in showings(tls)
    assert "PRIVATE" not in showings(tls)


def test_no_variable_is_no_tls(monkeypatch: pytest.MonkeyPatch, pem: dict[str, str]) -> None:
    assert TLS.from_environment({}) is None
    assert TLS.from_environment(dict.fromkeys(NAMES, "")) is None
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert TLS.from_environment() is None
    for name, file in pem.items():
        monkeypatch.setenv(name, file)
    assert TLS.from_environment() == TLS.from_files(*pem.values())


@pytest.mark.parametrize("given", [NAMES[:1], NAMES[1:2], NAMES[2:], NAMES[:2], NAMES[1:], NAMES[::2]])
def test_a_missing_variable_is_named(pem: dict[str, str], given: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="must be set as well: TLS needs certificate, key and authority") as caught:
        TLS.from_environment({name: pem[name] for name in given})
    missing = one_line(caught).partition(" must")[0].split(", ")
    assert missing == [name for name in NAMES if name not in given]


@pytest.mark.parametrize("name", NAMES)
def test_a_file_that_is_not_there_is_named(pem: dict[str, str], tmp_path: Path, name: str) -> None:
    for file, why in [
        (str(tmp_path / "absent.pem"), "No such file or directory"),
        (str(tmp_path), "Is a directory"),
        ("~nobody-of-this-name/x.pem", "No such file or directory"),
    ]:
        with pytest.raises(ConfigError) as caught:
            TLS.from_environment({**pem, name: file})
        assert one_line(caught) == f"{file} cannot be read: {why}"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("content", [b"", b"secret-text", b"\x30\x82\x01\x0a" + bytes(range(200))])
def test_a_file_that_is_no_pem_is_named_and_not_quoted(pem: dict[str, str], name: str, content: bytes) -> None:
    Path(pem[name]).write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        TLS.from_environment(pem)
    assert one_line(caught) == f"{pem[name]} is not a PEM file"


def test_a_path_may_begin_at_home(pem: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(Path(pem[NAMES[0]]).parent))
    assert TLS.from_environment({name: f"~/{Path(file).name}" for name, file in pem.items()}) is not None


# --- settings ---


def test_the_defaults_are_allowed() -> None:
    check(LinkConfig())
    config = LinkConfig(frame_kib=3, max_message_mib=5)
    assert (config.frame_bytes, config.max_message_bytes) == (3 * 1024, 5 * 1024**2)


@pytest.mark.parametrize(
    ("name", "good", "bad"),
    [
        ("grace_s", [0.0, 86_400.0], [-0.1, 86_401.0, float("nan"), float("inf"), "long"]),
        ("heartbeat_s", [0.1, 3_600.0], [0.0, 0.09, 3_601.0]),
        ("frame_kib", [1, 65_536], [0, 65_537, -1]),
        ("max_message_mib", [1, 1_048_576], [0, 1_048_577]),
        ("inbox_mib", [1, 10**9], [0, -1]),
        ("max_nodes", [1, 100_000], [0, 100_001]),
        ("compression", ["none", "bf16", "int8"], ["", "zip", "INT8", None]),
    ],
)
def test_every_setting_has_its_range(name: str, good: list[Any], bad: list[Any]) -> None:
    (field,) = [each for each in dataclasses.fields(LinkConfig) if each.name == name]
    for value in good:
        check(LinkConfig(**{name: value}))
    for value in bad:
        with pytest.raises(ConfigError, match="is not allowed; it must be") as caught:
            check(LinkConfig(**{name: value}), "link.")
        assert one_line(caught).startswith(f"link.{name}=")
        assert allowed(field) in str(caught.value)


def test_every_setting_is_in_the_test_above() -> None:
    (mark,) = test_every_setting_has_its_range.pytestmark
    assert [case[0] for case in mark.args[1]] == [field.name for field in dataclasses.fields(LinkConfig)]
