"""Who may speak for a node: random tokens, each good for one connection."""

from __future__ import annotations

import hashlib
import hmac
import secrets

from fl_edge.link.resident.frames import TOKEN_BYTES


class Tokens:
    """The tokens that a session accepts.

    A token is good for one connection, on which its successor is sent. It is void as soon as the client shows that the
    successor has arrived; until then it stays good, since a connection may break in between. Only digests are kept.
    """

    def __init__(self) -> None:
        self._accepted: list[bytes] = []  # digests: of the token last used, and of its successor

    def issue(self, used: bytes | None = None) -> bytes:
        """Return a new token, and void all others but the one just used."""
        token = secrets.token_bytes(TOKEN_BYTES)
        self._accepted = [_digest(each) for each in (used, token) if each is not None]
        return token

    def confirm(self) -> None:
        """Void all but the newest: it has arrived."""
        del self._accepted[:-1]

    def void(self) -> None:
        """Accept nothing from now on."""
        self._accepted = []

    def accept(self, token: bytes) -> bool:
        """Return whether a token is good, in a time that does not depend on how much of it is right."""
        digest, good = _digest(token), False
        for accepted in self._accepted:
            good |= hmac.compare_digest(digest, accepted)
        return good


def _digest(token: bytes) -> bytes:
    return hashlib.sha256(token).digest()
