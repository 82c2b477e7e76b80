"""A device's process for tests: a Flower message comes by standard input, and the reply goes to standard output."""

from __future__ import annotations

import os
import sys
import time

from flwr.app import ConfigRecord, Context, Message, RecordDict

from fl_edge.link.flower import identify_process
from fl_edge.link.resident import ClientApp
from fl_edge.link.resident.codec import decode, encode

app = ClientApp()


@app.query()
def count(message: Message, context: Context) -> Message:
    """Tell how often this was called, and by which process."""
    seen = context.state.config_records.setdefault("seen", ConfigRecord({"count": 0}))
    seen["count"] = int(seen["count"]) + 1  # type: ignore[arg-type]
    told = ConfigRecord({"count": seen["count"], "pid": os.getpid()})
    return Message(RecordDict({"told": told}), reply_to=message)


@app.train()
def train(message: Message, _: Context) -> Message:
    """Take as many seconds as asked, and send the content back."""
    time.sleep(float(message.content.config_records["order"]["seconds"]))  # type: ignore[arg-type]
    return Message(message.content, reply_to=message)


@app.evaluate()
def evaluate(message: Message, _: Context) -> Message:
    """Fail."""
    raise ZeroDivisionError("on request")


def main() -> None:
    identify_process(1)
    message = decode([sys.stdin.buffer.read()])
    context = Context(1, message.metadata.dst_node_id, {}, RecordDict(), {})
    reply = app(message, context)
    reply.content["state"] = context.state.config_records.get("seen", ConfigRecord({"count": 0}))
    sys.stdout.buffer.write(b"".join(encode(reply)))


if __name__ == "__main__":
    main()
