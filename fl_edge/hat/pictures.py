"""Pictures of a run of HAT: how the adapter came near the whole model, and what devices waited for tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fl_edge.hat.account import Account
from fl_edge.hat.federation import AdapterRound
from fl_edge.plotting import BLUE, GREY, ORANGE, count_rounds, marks, new_figure, png, set_title, shortened


def draw(rounds: Sequence[AdapterRound], accounts: Mapping[str, Sequence[Account]]) -> dict[str, bytes]:
    """Return PNG pictures by file name: ``adapter.png`` where there were rounds, ``requests.png`` where requests."""
    pictures = {}
    if rounds:
        pictures["adapter.png"] = _adapter(rounds)
    if any(accounts.values()):
        pictures["requests.png"] = _requests(accounts)
    return pictures


def _adapter(rounds: Sequence[AdapterRound]) -> bytes:
    figure = new_figure(7.2, 6.0)
    above, below = figure.subplots(2, 1, sharex=True)
    numbers = [each.server_round for each in rounds]
    before = [number - 1 for number in numbers]  # what was measured before a round is the round before's
    above.plot(before, [100 * each.agreement for each in rounds], color=BLUE, label="same token", **marks(rounds))
    above.plot(before, [100 * each.overlap for each in rounds], color=ORANGE, label="overlap", **marks(rounds))
    set_title(above, "Adapter and whole model, held-out text, %")
    below.plot(numbers, [each.loss for each in rounds], color=GREY, **marks(rounds))
    set_title(below, "Loss of the devices' steps")
    for axis in (above, below):
        axis.grid(alpha=0.3)
    count_rounds(below)
    return png(figure)


def _requests(accounts: Mapping[str, Sequence[Account]]) -> bytes:
    devices = sorted((device for device, done in accounts.items() if done), key=lambda name: (len(name), name))
    figure = new_figure(max(6.4, 0.9 * len(devices) + 2), 8.4)
    panels = figure.subplots(3, 1, sharex=True)
    kinds = (
        ("Time to the first token (TTFT), real ms", "first_s", 1e3, ORANGE),
        ("Time between tokens (TBT), real ms", "between_s", 1e3, BLUE),
        ("Tokens a verification", "accept_length", 1.0, GREY),
    )
    for axis, (title, name, scale, colour) in zip(panels, kinds, strict=True):
        for place, device in enumerate(devices):
            values = [scale * getattr(account, name) for account in accounts[device]]
            axis.bar([place], [sum(values) / len(values)], 0.6, color=colour, alpha=0.5)
            axis.plot([place] * len(values), values, "o", color=colour, markersize=4)
        axis.grid(alpha=0.3, axis="y")
        axis.set_ylim(bottom=0)
        set_title(axis, title)
    panels[-1].set_xticks(range(len(devices)), [shortened(device) for device in devices], fontsize=8)
    panels[-1].set_xlabel("device; a point is a request, a bar their mean")
    return png(figure)
