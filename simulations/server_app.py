"""The ServerApp: reads the scenario, runs it, and leaves a run folder behind."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_edge.errors import FlEdgeError
from simulations.mergesfl import run_mergesfl
from simulations.scenario import read_scenario

app = ServerApp()


class RunFailed(Exception):  # noqa: N818 - reads as the sentence that the terminal shows
    """Ends the run as failed. Flower prints the exception with its traceback, so this one shows none."""

    @property
    def __traceback__(self) -> None:  # type: ignore[override]
        """Show nothing: the message says what, where and what is allowed."""
        return


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the scenario that the run configuration names."""
    try:
        run_mergesfl(grid, read_scenario(context.run_config))
    except FlEdgeError as error:
        raise RunFailed(str(error)) from None
