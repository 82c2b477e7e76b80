"""The look that all pictures of runs share: colours, marks, titles above the curves, PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

BLUE, ORANGE, GREY = "#2b6cb0", "#dd6b20", "#718096"


def new_figure(width: float, height: float) -> Any:
    """Return an empty figure, sizes in inches."""
    from matplotlib.figure import Figure  # noqa: PLC0415 - slow to import, and only wanted at the end of a run

    return Figure(figsize=(width, height), layout="constrained")


def png(figure: Any) -> bytes:
    """Return a figure as a PNG picture."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def marks(points: Sequence[Any]) -> dict[str, Any]:
    """Draw a point a round, as long as they can be told apart."""
    return {"marker": "o", "markersize": 3} if len(points) <= 60 else {}


def count_rounds(axis: Any) -> None:
    """Make the axis below one of rounds."""
    from matplotlib.ticker import MaxNLocator  # noqa: PLC0415 - see new_figure

    axis.set_xlabel("round")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))


def set_title(axis: Any, title: str) -> None:
    """Title on the left, legend on its right: above the curves, never over them."""
    axis.set_title(title, loc="left", fontsize=11)
    if axis.get_legend_handles_labels()[0]:
        axis.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, borderaxespad=0.2, fontsize=9)


def shortened(name: str) -> str:
    """Return the end of a long name."""
    return name if len(name) <= 18 else f"…{name[-17:]}"
