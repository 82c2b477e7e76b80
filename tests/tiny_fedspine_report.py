"""Reports of FedSpine runs that never took place, for tests."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np

from fl_edge.fedspine.report import Absent, DeviceRound, RoundReport
from fl_edge.fedspine.reward import waiting_time

RANKS = (4, 8, 12, 16, 24, 32)


def run(
    devices: int = 4,
    rounds: int = 3,
    *,
    first: int = 1,
    tested: bool = True,
    virtual: bool = True,
    missing: float = 0.0,
    never: Collection[int] = (),
    ranks: Sequence[int] = RANKS,
) -> list[RoundReport]:
    """Devices of unequal speed that prune to one half; some miss a round now and then, some always."""
    rng = np.random.default_rng(0)
    speed = np.exp(rng.uniform(0, 3, devices))
    sparsity, clock, reports = np.zeros(devices), 0.0, []
    for server_round in range(first, first + rounds):
        here: list[DeviceRound] = []
        absent: list[Absent] = []
        for index in range(devices):
            if index in never or rng.random() < missing:
                absent.append(Absent(f"device-{index}", "no answer in time"))
                continue
            ratio = min(float(rng.uniform(0, 0.1)) if server_round > 2 else 0.0, 0.5 - sparsity[index])
            sparsity[index] += ratio
            rank = int(rng.choice(ranks))
            busy = speed[index] * (1 - sparsity[index]) * (1 + rank / 64) * float(np.exp(rng.normal(0, 0.1)))
            loss = 2.0 * 0.97**server_round + float(rng.normal(0, 0.02))
            here.append(
                DeviceRound(
                    device=f"device-{index}",
                    ratio=ratio,
                    rank=rank,
                    why="highest of 4 bounds",
                    sparsity=float(sparsity[index]),
                    loss_before=loss + 0.1,
                    loss_after=loss,
                    compute_s=0.8 * busy,
                    transfer_s=0.2 * busy,
                    reward=float(rng.beta(4, 4)),
                    cells=int(min(4 + server_round // 2, 16)) + index % 3,
                )
            )
        clock += max((device.busy_s for device in here), default=0.0)
        reports.append(
            RoundReport(
                server_round=server_round,
                learning_rate=1e-3,
                devices=here,
                absent=absent,
                test_accuracy=0.85 - 0.7 * 0.93**server_round if tested else None,
                test_loss=2.1 * 0.96**server_round if tested else None,
                test_sparsity=float(sparsity.mean()) if tested and devices else None,
                waiting_s=float(waiting_time([device.busy_s for device in here])) if here else 0.0,
                virtual_s=clock if virtual else None,
                real_s=0.5,
                up_bytes=1000,
                down_bytes=2000,
            )
        )
    return reports
