"""What our grids and clients share with Flower's own, and Flower has no public name for."""

from __future__ import annotations

from flwr.app import Error, Message, Metadata

# Flower's ErrorCode is not among its public names; these are its values in 1.26 to 1.42.
CLIENT_APP_RAISED_EXCEPTION = 2
MESSAGE_UNAVAILABLE = 3
NODE_UNAVAILABLE = 5

# The server's address. Flower uses 1, which would also be the first node of a LocalGrid.
SERVER_NODE_ID = 0


def check_outgoing(message: Message) -> None:
    """Refuse a message that Flower's grids refuse.

    Raises
    ------
    ValueError
        It is a reply, carries no content, or has no time to live.
    """
    meta = message.metadata
    if meta.reply_to_message_id or meta.ttl <= 0 or not message.has_content():
        raise ValueError(f"Invalid message: {message}")


def unavailable(message_id: str, run_id: int) -> Message:
    """Return Flower's error 3, the answer to pulling an id that is unknown or whose reply has been pulled."""
    meta = Metadata(
        run_id=run_id,
        message_id=f"{message_id}-reply",
        src_node_id=SERVER_NODE_ID,
        dst_node_id=SERVER_NODE_ID,
        reply_to_message_id=message_id,
        group_id="",
        created_at=0.0,
        ttl=0.0,
        message_type="system",
    )
    error = Error(MESSAGE_UNAVAILABLE, f"message {message_id!r} is unknown, or its reply has been pulled")
    # The constructor takes metadata, but its type hints keep that to Flower's own code.
    return Message(error=error, metadata=meta)  # type: ignore[call-overload, no-any-return]


def identify_process(run_id: int) -> None:
    """Give this process the identity without which ``Message(...)`` raises outside Flower (since 1.38).

    Whatever is set already stays: it was set by Flower itself, or by a caller who knows better.
    """
    try:
        # Not one of Flower's public modules, but there is no public way to build a Message in a plain process.
        from flwr.supercore.task_identity import TaskIdentity  # noqa: PLC0415
    except ImportError:  # an older Flower, where messages need no identity
        return
    for name, value in (("task_id", 0), ("run_id", run_id), ("node_id", SERVER_NODE_ID)):
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:
            setattr(TaskIdentity, name, value)
