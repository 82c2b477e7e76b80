"""HAT's command line: make keys, serve a model, chat with one that is served.

::

    python -m fl_edge.clients.hat keys FOLDER --host NAME
    python -m fl_edge.clients.hat serve MODEL_DIR --listen 0.0.0.0:9095 --keys FOLDER
    python -m fl_edge.clients.hat chat --server NAME --model MODEL_DIR --keys FOLDER
"""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from fl_edge.clients.hat.chat import ANEW, Chat, Door
from fl_edge.clients.hat.client import HatWorkload
from fl_edge.clients.hat.typed import load_tokenizer, stop_tokens
from fl_edge.config import resolve
from fl_edge.errors import ConfigError, DataError, FlEdgeError
from fl_edge.hat.adapter import load_adapter
from fl_edge.hat.config import CloudConfig, HatConfig
from fl_edge.hat.split import load_device
from fl_edge.link.certificates import LOOPBACK, make_certificates, write_secret
from fl_edge.link.resident.config import TLS
from fl_edge.models.accelerator import find_accelerator

PORT = 9095
AUTHORITY, CERTIFICATE, KEY, TOKEN = KEYS = ("ca.pem", "server.pem", "server.key", "token")
_INTERRUPTED = 130  # what a shell gives for Ctrl-C
_LAST_S = 5.0  # from Ctrl-C to the end of a chat, at most
_TOKEN_BYTES = 16  # at least; shorter ones can be guessed
_TEMPLATE, _NO_TEMPLATE = f"a conversation, {ANEW} begins anew", "the model goes on from each line"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = _parser().parse_args(arguments)
    log = logging.getLogger("flwr.fl_edge")
    log.propagate = False  # Flower's own handler shows more than a person wants to know
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    handler.setLevel(args.level)
    log.addHandler(handler)
    try:
        args.run(args)
    except FlEdgeError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("\n")
        return _INTERRUPTED
    finally:
        log.removeHandler(handler)
        log.propagate = True
    return 0


def _keys(args: argparse.Namespace) -> None:
    folder: Path = args.folder
    authority, certificate, key, token = files = [folder / name for name in KEYS]
    for file in files:
        if file.exists():
            raise ConfigError(f"{file} is there already; give another folder, or remove what is in this one")
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        hosts = [*args.host, *(host for host in LOOPBACK if host not in args.host)]
        make_certificates(authority, certificate, key, hosts, args.days)
        write_secret(token, f"{secrets.token_hex(32)}\n".encode())
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to: {error.strerror}") from None
    except (ValueError, OverflowError) as error:
        asked = f"--host {', '.join(args.host)} --days {args.days}"
        raise ConfigError(f"no certificate can have {asked}: {error}") from None
    sys.stderr.write(f"{folder}: good for {args.days} days; devices need {AUTHORITY} and {TOKEN}, and nothing else\n")


def _serve(args: argparse.Namespace) -> None:
    from fl_edge.strategies.serving import Place, serve  # noqa: PLC0415 - the server's half; no device has a use for it

    config = _settings(CloudConfig, args, "batch_tokens", "capacity", "cache_tokens", "lease_s")
    certificate, key = _file(args, "certificate", CERTIFICATE), _file(args, "key", KEY)
    if (certificate is None) != (key is None):
        raise ConfigError("--certificate and --key are needed both, or neither")
    # what clients are to trust reaches them otherwise
    tls = TLS.from_files(certificate, key, certificate) if certificate and key else None
    stop = threading.Event()

    def interrupt(*_: object) -> None:
        if stop.is_set():  # it was asked before, and did not come to it
            raise KeyboardInterrupt
        stop.set()

    def begin() -> Callable[[], bool]:
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, interrupt)
        return stop.is_set

    place = Place(_free(_address(args.listen)), tls, _token(args))
    accelerator = find_accelerator(args.accelerator)
    serve(_folder(args.model), args.shallow, config, place, begin, accelerator=accelerator, threads=args.threads)


def _chat(args: argparse.Namespace) -> None:
    config = _settings(HatConfig, args, "new_tokens", "temperature", "top_p", "shallow")
    authority = _file(args, "ca", AUTHORITY)
    host, _, port = _address(args.server).rpartition(":")
    door = Door(host.strip("[]"), int(port), _token(args), _read(authority) if authority else b"")
    door.knock()  # before the model is read, which may take long
    folder = _folder(args.model)
    tokenizer = load_tokenizer(folder)
    model = load_device(folder, config.shallow, torch.device(find_accelerator(args.accelerator)))
    work = HatWorkload(
        device=args.name,
        model=model,
        adapter=load_adapter(args.adapter, model) if args.adapter else None,
        prompt=lambda _: None,  # this and the next are the chat's
        hear=lambda *_: None,
        config=config,
        seed=secrets.randbits(31) if args.seed is None else args.seed,
        stops=stop_tokens(folder, tokenizer),
        threads=args.threads,
    )
    if sys.stdin.isatty():
        sys.stderr.write(f"{_TEMPLATE if tokenizer.chat_template else _NO_TEMPLATE}; Ctrl-D ends\n")
    with ending_for_certain():
        Chat(door, work, tokenizer, _reader(), sys.stdout, sys.stderr).run()


@contextmanager
def ending_for_certain(seconds: float = _LAST_S) -> Iterator[None]:
    """Let Ctrl-C end this process also where its exception is lost, or leaves a lock behind that others wait for."""

    def interrupt(*_: object) -> None:
        last = threading.Timer(seconds, os._exit, [_INTERRUPTED])
        last.daemon = True
        last.start()
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():  # which alone has signals
        yield
        return
    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _reader() -> Callable[[], str | None]:
    """Return what reads a line: from a person at a terminal, or from a pipe."""
    if not sys.stdin.isatty():
        lines = iter(sys.stdin)
        return lambda: next((line.removesuffix("\n") for line in lines), None)
    with suppress(ImportError):
        import readline  # noqa: F401, PLC0415 - lines can be edited with it

    def read() -> str | None:
        try:
            return input("> ")
        except EOFError:
            return None

    return read


def _settings(schema: Any, args: argparse.Namespace, *names: str) -> Any:
    """Return a configuration of the options that were given, and of --set."""
    given = {name: getattr(args, name, None) for name in names}
    overrides: dict[str, Any] = {name: value for name, value in given.items() if value is not None}
    for each in args.set:
        name, equals, value = each.partition("=")
        if not equals:
            raise ConfigError(f"--set {each} is not allowed; it must be key=value")
        overrides[name.strip()] = value.strip()
    return resolve(schema, None, overrides)


def _file(args: argparse.Namespace, option: str, name: str) -> Path | None:
    """Return the file that an option names, else the one in the folder of --keys, if there is such a folder."""
    given: Path | None = getattr(args, option)
    return given or (args.keys / name if args.keys else None)


def _token(args: argparse.Namespace) -> bytes:
    file = _file(args, "token_file", TOKEN)
    if file is None:
        return b""
    token = _read(file).strip()
    if len(token) < _TOKEN_BYTES:
        raise ConfigError(f"{file} has a token of {len(token)} bytes; it must be at least {_TOKEN_BYTES}")
    return token


def _read(file: Path) -> bytes:
    try:
        return file.expanduser().read_bytes()
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}") from None


def _folder(folder: Path) -> Path:
    if not folder.is_dir():
        raise DataError(f"{folder} is not the folder of a model")
    return folder


def _address(text: str) -> str:
    """Return ``host:port``, with the port that is usual where none is given."""
    host, colon, port = text.rpartition(":")
    if not colon or text.endswith("]"):
        return f"{text}:{PORT}"
    if not host or not port.isdecimal() or not int(port) < 2**16:
        raise ConfigError(f"{text} is not allowed; it must be host or host:port")
    return text


def _free(address: str) -> str:
    """Return an address that can be listened on; gRPC would not only raise, but also write lines of its own."""
    host, _, port = address.rpartition(":")
    try:
        family, *_, place = socket.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)[0]
        socket.create_server(place[:2], family=family).close()
    except OSError as error:
        raise ConfigError(f"cannot listen on {address}: {error.strerror}") from None
    return address


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m fl_edge.clients.hat", description="An LLM between device and cloud.")
    commands = parser.add_subparsers(required=True, metavar="{keys,serve,chat}")

    keys = commands.add_parser(
        "keys", help="make a token and a certificate", description="Make a token and a certificate."
    )
    keys.add_argument("folder", type=Path, help="to write them into")
    keys.add_argument("--host", action="append", default=[], help="name or IP address of the server; may be repeated")
    keys.add_argument("--days", type=_some, default=365, help="that the certificate is good for (365)")
    keys.set_defaults(run=_keys, level=logging.WARNING)

    serve = commands.add_parser("serve", help="serve a model", description="Serve the middle layers of a model.")
    serve.add_argument("model", type=Path, help="folder of the model")
    serve.add_argument("--listen", default="127.0.0.1", help=f"host or host:port (127.0.0.1:{PORT})")
    serve.add_argument("--certificate", type=Path, help="PEM file of the server's certificate")
    serve.add_argument("--key", type=Path, help="PEM file of its private key")
    serve.add_argument("--batch-tokens", help="rows of a batch, at most (512)")
    serve.add_argument("--capacity", help="tokens of a request, prompt and answer, at most (2048)")
    serve.add_argument("--cache-tokens", help="tokens of keys and values of all requests together (65536)")
    serve.add_argument("--lease-s", help="seconds after which a silent device's request is forgotten (60)")
    serve.set_defaults(run=_serve, level=logging.INFO)

    chat = commands.add_parser("chat", help="chat with a served model", description="Chat with a model that is served.")
    chat.add_argument("--server", required=True, help=f"host or host:port ({PORT})")
    chat.add_argument("--model", type=Path, required=True, help="folder of the model and its tokenizer")
    chat.add_argument("--adapter", type=Path, help="file of an adapter; without one nothing is drafted")
    chat.add_argument("--ca", type=Path, help="PEM file of the authority to trust")
    chat.add_argument("--new-tokens", help="tokens of an answer, at most (128)")
    chat.add_argument("--temperature", help="0: greedy; else tokens are drawn (0)")
    chat.add_argument("--top-p", help="only the likeliest tokens that reach this probability together are drawn (1)")
    chat.add_argument("--seed", type=_count, help="of what is drawn; another one each time if not given")
    chat.add_argument(
        "--name", default=socket.gethostname(), help="of this device, which the server shows (%(default)s)"
    )
    chat.set_defaults(run=_chat, level=logging.CRITICAL)

    for command in (serve, chat):
        command.add_argument("--keys", type=Path, metavar="FOLDER", help="that the command `keys` has filled")
        command.add_argument("--token-file", type=Path, help="file of the token that lets devices in")
        command.add_argument("--shallow", type=_count, default=0, help="layers on the device (a sixteenth, rounded up)")
        command.add_argument("--accelerator", default="auto", help="auto, cpu, cuda, cuda:1 ... (auto)")
        command.add_argument("--threads", type=_some, default=torch.get_num_threads(), help="of torch (%(default)s)")
        command.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting")
    return parser


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def _some(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 1")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
