"""Fixtures that several test files share; what they need is imported when one is used."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from fl_edge.link.resident.config import TLS

IN_TIME_S = 180  # a safety net only

# Several tests share the cores, and threads that wait for each other make small steps many times slower. Set before
# NumPy and torch are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait for processes of Flower come first: left for the end, they would leave a core idle."""
    items.sort(key=lambda item: not {"deployment", "launcher"} & set(getattr(item, "fixturenames", ())))


@pytest.fixture
def in_time() -> Iterator[None]:
    """What blocks for ever fails."""

    def late(*_: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(IN_TIME_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(autouse=True)
def short_timings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where models are timed, few calls are enough."""
    if (measures := sys.modules.get("fl_edge.comp.measures")) is not None:
        monkeypatch.setattr(measures, "_SECONDS", 0.0)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients of a LinkServer try again at once."""
    from fl_edge.link.resident import client

    monkeypatch.setattr(client, "_RETRY_S", 0.01)


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    from tests.link_site import eventually

    before = set(threading.enumerate())
    gc.freeze()  # to search all that was there before takes a second a test
    yield
    gc.collect()
    gc.unfreeze()
    eventually(lambda: not {thread for thread in threading.enumerate() if thread not in before})


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> TLS:
    from tests.link_site import make_tls

    return make_tls(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(params=["clear", "tls"])
def security(request: pytest.FixtureRequest, certificates: TLS) -> TLS | None:
    return certificates if request.param == "tls" else None
