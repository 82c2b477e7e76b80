"""The ClientApp: echoes, and a handler with a model."""

import os
import time
from functools import lru_cache
from typing import Any

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

LAYERS, WIDTH = 5, 2000  # 20.01 million parameters

app = ClientApp()


@app.query("echo")
def echo(message: Message, context: Context) -> Message:  # noqa: ARG001
    """Send the content back."""
    return Message(message.content, reply_to=message)


@app.query("model")
def model(message: Message, context: Context) -> Message:
    """Say when the handler was entered, and when it had torch and its model at hand."""
    entered_at = time.time()
    import torch  # noqa: F401 - here, so that its import is a time of its own

    imported_at = time.time()
    network = load_model(str(context.run_config["weights"]))
    ready_at = time.time()
    stamps: dict[str, Any] = {
        "started_at": process_started_at(),
        "entered_at": entered_at,
        "imported_at": imported_at,
        "ready_at": ready_at,
        "parameters": sum(weight.numel() for weight in network.parameters()),
        "process": os.getpid(),
    }
    return Message(RecordDict({"stamps": MetricRecord(stamps)}), reply_to=message)


@lru_cache(maxsize=1)
def load_model(weights: str) -> Any:
    """Return the model, which a process loads once."""
    from safetensors.torch import load_file
    from torch import nn

    network = nn.Sequential(*[nn.Linear(WIDTH, WIDTH) for _ in range(LAYERS)])
    network.load_state_dict(load_file(weights))
    return network


def process_started_at() -> float:
    """Return when this process was started, to a hundredth of a second; psutil rounds it to a whole one."""
    with open("/proc/self/stat", encoding="ascii") as file:
        ticks = int(file.read().rpartition(")")[2].split()[19])
    age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age_s
