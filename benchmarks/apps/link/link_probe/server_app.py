"""The ServerApp: times exchanges with all nodes, and writes what it measured to a file."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp

from benchmarks.link_bare import BareLoop

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run one probe."""
    config = context.run_config
    while len(nodes := list(grid.get_node_ids())) < int(config["nodes"]):
        time.sleep(0.1)
    probes = {"echo": time_echoes, "model": time_models}
    outcome = probes[str(config["probe"])](grid, nodes, config)
    Path(str(config["out"])).write_text(json.dumps(outcome))


def time_echoes(grid: Grid, nodes: Sequence[int], config: Mapping[str, Any]) -> dict[str, Any]:
    """Time exchanges of one array a node, there and back, in turn with a bare loop of the same bytes.

    Making the messages counts, looking at what came back does not.
    """
    data = os.urandom(config["bytes"])
    array = Array(dtype="uint8", shape=(len(data),), stype="bytes", data=data)

    def exchange() -> list[Any]:
        contents = [RecordDict({"payload": ArrayRecord({"data": array})}) for _ in nodes]
        messages = [Message(content, node, "query.echo") for content, node in zip(contents, nodes, strict=True)]
        return list(grid.send_and_receive(messages))

    def timed(name: str, count: int) -> list[float]:
        times = []
        for _ in range(count):
            started = time.perf_counter()
            found = loops[name]()
            times.append(1000 * (time.perf_counter() - started))
            if name == "grid_ms":
                found = [reply.content["payload"]["data"].data for reply in found]  # raises for an error reply
            if found != [data] * len(nodes):
                raise RuntimeError("what came back is not what was sent")
            tell()
        return times

    loops: dict[str, Callable[[], list[Any]]] = {"grid_ms": exchange}
    with ExitStack() as stack:
        if config["bare"]:
            tls = [os.environ[f"FL_EDGE_LINK_{name}"] for name in ("CERTIFICATE", "KEY", "CA")]
            bare = stack.enter_context(BareLoop(len(nodes), tls))
            loops["bare_ms"] = lambda: bare.exchange([data] * len(nodes))
        tell = Teller("exchange", len(loops) * (config["exchanges"] + config["warm-up"]))
        outcome: dict[str, list[float]] = {name: [] for name in loops}
        outcome["warm_up_ms"] = [time_ms for name in loops for time_ms in timed(name, config["warm-up"])]
        while left := config["exchanges"] - len(outcome["grid_ms"]):
            for name in loops:
                outcome[name] += timed(name, min(left, config["block"]))
    return outcome


def time_models(grid: Grid, nodes: Sequence[int], config: Mapping[str, Any]) -> dict[str, Any]:
    """Return, for each round, what each client says of its handler's times, and when its message was sent."""
    rounds = []
    tell = Teller("round", config["exchanges"])
    for _ in range(config["exchanges"]):
        content = RecordDict({"config": ConfigRecord({"nothing": 0})})
        messages = [Message(content, node, "query.model") for node in nodes]
        sent_at = time.time()
        replies = list(grid.send_and_receive(messages))
        if len(replies) != len(nodes):
            raise RuntimeError(f"{len(replies)} of {len(nodes)} nodes have replied")
        rounds.append([{"sent_at": sent_at, **dict(reply.content.metric_records["stamps"])} for reply in replies])
        tell()
        time.sleep(config["pause-s"])
    return {"rounds": rounds}


class Teller:
    """Prints how far it is, at most every five seconds."""

    def __init__(self, what: str, total: int) -> None:
        self._what, self._total, self._done, self._said_at = what, total, 0, time.monotonic()

    def __call__(self) -> None:
        """Count one more."""
        self._done += 1
        if time.monotonic() - self._said_at > 5:
            self._said_at = time.monotonic()
            print(f"link-probe: {self._what} {self._done} of {self._total}", flush=True)
