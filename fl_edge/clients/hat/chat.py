"""A conversation from a terminal: the device's part of the model is here, the rest where the server is."""

from __future__ import annotations

import socket
import ssl
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import count
from typing import Any, TextIO

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fl_edge.clients.hat.client import HatClient, HatWorkload
from fl_edge.clients.hat.typed import Conversation, Unfolding
from fl_edge.errors import FlEdgeError
from fl_edge.hat.account import Account
from fl_edge.link.content import config_of
from fl_edge.link.flower import identify_process
from fl_edge.link.resident.client import LinkClient
from fl_edge.link.resident.clientapp import reply_to
from fl_edge.link.resident.config import OPEN, LinkConfig
from fl_edge.link.resident.invitation import own_invitation
from fl_edge.link.resident.staying import staying
from fl_edge.seeding import derive_seed

ANEW = "/new"  # typed, it begins a conversation anew
_RUN = 1
_KNOCK_S = 5.0  # for a server to take a connection
_AGAIN_S = 1.0  # between two attempts to come back


class NoServerError(FlEdgeError):
    """There is no server to chat with, or not one that lets this device in."""


@dataclass(frozen=True)
class Door:
    """Where the server is, and what it takes to come in.

    Attributes
    ----------
    host, port
        Of the server.
    token
        That it lets devices in with; never shown.
    authority
        PEM to trust; empty for a connection in the clear.
    """

    host: str
    port: int
    token: bytes
    authority: bytes

    @property
    def address(self) -> str:
        """``host:port``."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def __repr__(self) -> str:
        return f"Door({self.address})"

    def knock(self) -> None:
        """See that there is a server that can be trusted.

        gRPC would try for long, and say little.

        Raises
        ------
        NoServerError
            There is none.
        """
        try:
            trust = _trusting(self.authority)
        except (ValueError, ssl.SSLError):
            raise NoServerError("the certificate to trust (--ca) is damaged") from None
        try:
            with socket.create_connection((self.host, self.port), _KNOCK_S) as plain:
                secure = self._shake(trust, plain)
        except OSError as error:
            reason = "it does not answer" if isinstance(error, TimeoutError) else error.strerror or str(error)
            raise NoServerError(f"no server at {self.address}: {reason}") from None
        if secure and not self.authority:
            raise NoServerError(f"the server at {self.address} has a certificate; say whom to trust, with --ca")
        if not secure and self.authority:
            raise NoServerError(f"the server at {self.address} has no certificate; without --ca it can be reached")

    def _shake(self, trust: ssl.SSLContext, plain: socket.socket) -> bool:
        """Return whether the server speaks TLS."""
        try:
            with trust.wrap_socket(plain, server_hostname=self.host):
                return True
        except ssl.SSLCertVerificationError as error:
            reason = error.verify_message or str(error)
            raise NoServerError(f"the certificate of {self.address} is not trusted: {reason}") from None
        except (ssl.SSLError, ConnectionError):
            return False


def _trusting(authority: bytes) -> ssl.SSLContext:
    if authority:
        trust = ssl.create_default_context(cadata=authority.decode())
    else:  # to see whether there is a certificate; nothing is said
        trust = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        trust.check_hostname, trust.verify_mode = False, ssl.CERT_NONE
    trust.set_alpn_protocols(["h2"])
    return trust


class Chat:
    """Takes prompts from a person, and shows answers while they come.

    Parameters
    ----------
    door
        To the server.
    work
        Of the device; `prompt`, `hear` and `tell` are the chat's own.
    tokenizer
        Of the model.
    read
        Returns what is typed next; nothing when no more will come.
    shown, told
        Where answers go, and where all else is said.
    config
        Time-outs of the connection.
    patience_s
        For a server that is lost to come back.
    """

    def __init__(
        self,
        door: Door,
        work: HatWorkload,
        tokenizer: Any,
        read: Callable[[], str | None],
        shown: TextIO,
        told: TextIO,
        config: LinkConfig = OPEN,
        patience_s: float = 60.0,
    ) -> None:
        self._door, self._tokenizer, self._config, self._patience_s = door, tokenizer, config, patience_s
        self._read, self._shown, self._told = read, shown, told
        self._work = replace(work, prompt=self._prompt, hear=self._hear, tell=self._tell)
        self._conversation = Conversation(tokenizer)
        self._asked: str | None = None  # and not answered yet
        self._again = False  # it was asked before, of a server that was lost
        self._answer = Unfolding(tokenizer, self._show)
        self._over = False
        self._failed = ""  # why this device can not go on with this server
        self._lost_at: float | None = None

    def run(self) -> None:
        """Chat until there are no more prompts.

        Raises
        ------
        NoServerError
            There is no server, it does not let this device in, or it has gone and does not come back.
        """
        identify_process(_RUN)
        self._door.knock()
        for visit in count():
            reason = self._visit(replace(self._work, seed=derive_seed(self._work.seed, "chat", visit)))
            if self._failed and self._over:
                raise NoServerError(self._failed)
            if self._over:
                return
            self._lost(reason)
            self._come_back()

    def _visit(self, work: HatWorkload) -> str:
        """Stay with the server until either end has enough; return why the server was lost."""
        app, self._failed = ClientApp(), ""
        HatClient(lambda _: work).register(app)
        invitation = own_invitation(self._door.address, self._door.token, self._door.authority, self._config)
        context = Context(_RUN, invitation.node_id, {}, RecordDict(), {})
        client = LinkClient(invitation)
        try:
            with staying():
                for chunks in client.messages():
                    self._lost_at = None
                    client.send(reply_to(partial(self._handle, app), chunks, context, None, OPEN.max_message_bytes))
                    if self._over or self._failed:
                        client.close(self._failed or "its user has no more prompts")
        finally:
            client.close("its user has gone", patience_s=1.0)
        if client.refused:
            raise NoServerError(f"{client.reason}; is its token another one than that of --token-file?")
        return client.reason

    def _handle(self, app: ClientApp, message: Message, context: Context) -> Message:
        """Answer a message; note what goes wrong here, after which the server will send no more."""
        try:
            reply = app(message, context)
        except Exception as error:
            self._failed = f"{type(error).__name__}: {error}"
            raise
        said = config_of(reply)
        self._failed = str(said.get("refused", ""))
        if self._failed and message.metadata.message_type == "query.hat_describe":
            self._over = True  # it will not be another model the next time
        if (account := said.get("account")) is not None:
            self._answered(Account.from_text(account))
        return reply

    def _lost(self, reason: str) -> None:
        self._lost_at = self._lost_at or time.monotonic()
        self._end_line()
        if self._asked is not None and not self._answer.text and not self._again:
            self._again = True
            self._say(f"the server was lost ({reason}); it will be asked again")
        elif self._asked is not None:
            self._asked = None
            self._say(f"the answer ends here, the server was lost ({reason}); it can be asked again")
        else:
            self._say(f"the server was lost ({reason})")

    def _come_back(self) -> None:
        """Wait for a server to be there."""
        while True:
            time.sleep(_AGAIN_S)
            try:
                return self._door.knock()
            except NoServerError:
                if time.monotonic() - (self._lost_at or 0.0) > self._patience_s:
                    raise

    # --- what the device's workload asks for ---

    def _prompt(self, _number: int) -> Tensor | None:
        while self._asked is None:
            typed = self._read()
            if typed is None:
                self._over = True
                return None
            if typed.strip() == ANEW:
                self._conversation.forget()
            elif typed.strip():
                self._asked, self._again = typed, False
        self._answer = Unfolding(self._tokenizer, self._show)
        return self._conversation.prompt(self._asked)

    def _hear(self, _number: int, tokens: Sequence[int]) -> None:
        self._answer.add(tokens)

    def _tell(self, _number: int, reason: str) -> None:
        self._end_line()
        self._say(reason)
        self._asked = None

    def _answered(self, account: Account) -> None:
        assert self._asked is not None
        self._answer.end()
        self._end_line()
        self._say(account.figures().strip())
        self._conversation.answered(self._asked, self._answer.text)
        self._asked = None

    # --- the terminal ---

    def _show(self, text: str) -> None:
        try:
            self._shown.write(text)
            self._shown.flush()
        except BrokenPipeError:  # nobody reads on
            self._over = True

    def _end_line(self) -> None:
        if self._asked is not None and self._answer.text and not self._answer.text.endswith("\n"):
            self._show("\n")

    def _say(self, line: str) -> None:
        self._told.write(f"{line}\n")
        self._told.flush()
