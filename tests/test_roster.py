"""Who is connected, and who may take part."""

from __future__ import annotations

import logging
from typing import Any, cast

import pytest
from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fl_edge.errors import ReplyError, TrainingError
from fl_edge.link import LocalGrid
from fl_edge.link.content import config_of, make_content
from fl_edge.strategies.roster import Roster

QUESTION = "query.who"


class Party:
    """Nodes 1, 2, ... under the names given; counts who was asked, in which round."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.asked: list[tuple[int, int]] = []
        self.heard: list[str] = []
        self.grid = LocalGrid(cast("ClientApp", self._answer), len(names))

    def _answer(self, message: Message, context: Context) -> Message:
        self.asked.append((int(config_of(message)["round"]), context.node_id))
        name = self.names[context.node_id - 1]
        return Message(make_content({"device": name} if name else {"refused": "it has no name"}), reply_to=message)

    def accept(self, device: str, config: dict[str, Any]) -> None:
        if device == "rude":
            raise ReplyError("it is rude")
        self.heard.append(device)


def test_new_nodes_are_asked_once_and_everyone_on_request() -> None:
    party, roster = Party(["device-10", "device-2"]), Roster(QUESTION)
    for server_round in (1, 2):
        roster.meet(party.grid, server_round, party.accept, None)
    roster.meet(party.grid, 3, party.accept, None, everyone=True)
    assert party.asked == [(1, 1), (1, 2), (3, 1), (3, 2)]
    assert roster.nodes == {"device-10": 1, "device-2": 2}
    assert roster.names == ["device-2", "device-10"]


def test_who_left_is_forgotten_and_may_come_back_as_another_node(monkeypatch: pytest.MonkeyPatch) -> None:
    party, roster = Party(["a", "b", "a"]), Roster(QUESTION)
    for server_round, connected in enumerate(([1, 2], [2], [2, 3]), 1):
        monkeypatch.setattr(party.grid, "get_node_ids", lambda connected=connected: connected)
        roster.meet(party.grid, server_round, party.accept, None)
        assert sorted(roster.nodes.values()) == connected
    assert roster.nodes == {"a": 3, "b": 2}


def test_only_the_first_of_a_name_is_accepted() -> None:
    party, roster = Party(["a", "a", "b"]), Roster(QUESTION)
    roster.meet(party.grid, 1, party.accept, None)
    assert roster.nodes == {"a": 1, "b": 3}
    assert party.heard == ["a", "b"]


def test_a_complaint_is_logged_once(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    party, roster = Party(["a", "rude", "", "rude"]), Roster(QUESTION)
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    with caplog.at_level(logging.WARNING, "flwr"):
        for server_round in (1, 2):
            roster.meet(party.grid, server_round, party.accept, None)
    assert [record.getMessage() for record in caplog.records] == [
        "2 of 4 devices take no part: it is rude",
        "1 of 4 devices take no part: it has no name",
    ]
    assert party.asked[4:] == [(2, 2), (2, 3), (2, 4)]  # they are asked again, and may have changed their minds


def test_nobody_left_is_one_line() -> None:
    party = Party(["rude"])
    with pytest.raises(TrainingError, match=r"^round 7: no device can take part: it is rude$"):
        Roster(QUESTION).meet(party.grid, 7, party.accept, None)
