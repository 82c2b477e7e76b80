"""A report of a round, for tests."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fl_edge.mergesfl.report import RoundReport


def report(server_round: int = 1, **changes: Any) -> RoundReport:
    standard = RoundReport(
        server_round=server_round,
        learning_rate=0.1,
        train_loss=1.5,
        train_accuracy=0.4,
        test_accuracy=0.5,
        test_loss=1.25,
        kl=0.04,
        kl_reached=True,
        label_mix=[0.5, 0.25, 0.25],
        reference=[1 / 3] * 3,
        devices=["device-0", "device-10"],
        batch_sizes=[4, 32],
        iteration_s=[0.5, 0.25],
        waiting_s=0.75,
        virtual_s=10.0 * server_round,
        real_s=0.5,
        up_bytes=3_000_000,
        down_bytes=1_000_000,
        lost=[],
    )
    return replace(standard, **changes)
