"""Settings of resident clients: limits, time-outs, compression; and where the server listens, with what certificate."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fl_edge.config import setting
from fl_edge.errors import ConfigError

ENVIRONMENT = "FL_EDGE_LINK_"  # prefix of the variables that the operator of a SuperLink sets


@dataclass
class LinkConfig:
    """What bounds a server with resident clients."""

    grace_s: float = setting(15.0, "seconds that a session outlives its connection", low=0.0, high=86_400.0)
    heartbeat_s: float = setting(10.0, "seconds between signs of life on an idle connection", low=0.1, high=3_600.0)
    frame_kib: int = setting(2048, "KiB of a message that travel at once", low=1, high=65_536)
    max_message_mib: int = setting(2048, "MiB of the longest message", low=1, high=1_048_576)
    inbox_mib: int = setting(4096, "MiB of replies kept for pull_messages; beyond, devices must wait", low=1)
    max_nodes: int = setting(1000, "sessions at once", low=1, high=100_000)
    compression: str = setting(
        "none", "of float32 arrays: exact, bfloat16, or 8 bits a value with error feedback",
        choices=("none", "bf16", "int8"),
    )  # fmt: skip

    @property
    def frame_bytes(self) -> int:
        """Payload of a full frame."""
        return self.frame_kib * 1024

    @property
    def max_message_bytes(self) -> int:
        """Bytes of the longest message."""
        return self.max_message_mib * 1024**2


OPEN = LinkConfig(max_message_mib=256)  # where clients come by themselves nobody tells them: both ends take these


@dataclass(frozen=True)
class TLS:
    """The server's certificate, as PEM: those that Flower's SuperLink was given, if there is one.

    Attributes
    ----------
    certificate
        Of the server, with intermediate ones if any (Flower's `--ssl-certfile`).
    key
        Its private key (`--ssl-keyfile`); never shown.
    authority
        What clients shall trust (`--ssl-ca-certfile`). It travels to them through Flower.
    """

    certificate: bytes
    key: bytes = field(repr=False)
    authority: bytes

    @classmethod
    def from_files(cls, certificate: str | Path, key: str | Path, authority: str | Path) -> TLS:
        """Read the three PEM files.

        Raises
        ------
        ConfigError
            A file that cannot be read, or is no PEM.
        """
        read = []
        for file in (certificate, key, authority):
            try:
                read.append(Path(os.path.expanduser(file)).read_bytes())
            except OSError as error:
                raise ConfigError(f"{file} cannot be read: {error.strerror}") from None
            if b"-----BEGIN " not in read[-1]:
                raise ConfigError(f"{file} is not a PEM file")
        return cls(*read)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] | None = None) -> TLS | None:
        """Read the files that FL_EDGE_LINK_CERTIFICATE, _KEY and _CA name, or return None when none of them is set.

        Raises
        ------
        ConfigError
            Only some of them are set, or a file cannot be read.
        """
        environment = os.environ if environment is None else environment
        names = [ENVIRONMENT + name for name in ("CERTIFICATE", "KEY", "CA")]
        files = [environment.get(name, "") for name in names]
        if not any(files):
            return None
        if not all(files):
            missing = ", ".join(name for name, file in zip(names, files, strict=True) if not file)
            raise ConfigError(f"{missing} must be set as well: TLS needs certificate, key and authority")
        return cls.from_files(*files)
