"""Keys of SuperNodes for a deployment on one machine: what an administrator would make with ssh-keygen."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat

from fl_edge.link.certificates import write_secret


def make_node_key(file: Path) -> Path:
    """Write a SuperNode's private key, and its public key beside it, both in the format of ssh-keygen.

    Returns
    -------
    Path
        File of the public key, which the SuperLink is told.
    """
    key = ec.generate_private_key(ec.SECP384R1())
    write_secret(file, key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()))
    public = file.with_suffix(".pub")
    public.write_bytes(key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH))
    return public
