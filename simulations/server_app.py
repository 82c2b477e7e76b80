"""The ServerApp: reads the scenario, runs it, and leaves a run folder behind.

Only the system that runs is imported: the others would cost a start of the process its seconds.
"""

from __future__ import annotations

from contextlib import nullcontext
from types import TracebackType

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl_edge.errors import FlEdgeError
from fl_edge.link.resident.serverapp import resident_where_possible
from simulations.scenario import (
    CompScenario,
    FedSpineScenario,
    HatScenario,
    ImbNasScenario,
    MergeSFLScenario,
    read_scenario,
)

app = ServerApp()


class RunFailed(Exception):  # noqa: N818 - reads as the sentence that the terminal shows
    """Ends the run as failed. Flower prints the exception with its traceback, so this one hides it.

    Every way to print an exception asks for `__traceback__`; the interpreter itself keeps its own.
    """

    @property
    def __traceback__(self) -> None:
        return

    @__traceback__.setter
    def __traceback__(self, value: TracebackType | None) -> None:
        return


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the scenario that the run configuration names."""
    try:
        scenario = read_scenario(context.run_config)
        chosen = resident_where_possible(grid, config=scenario.link) if scenario.resident else nullcontext(grid)
        with chosen as grid_to_use:
            if isinstance(scenario, FedSpineScenario):
                from simulations.fedspine import run_fedspine  # noqa: PLC0415 - heavy

                run_fedspine(grid_to_use, scenario)
            elif isinstance(scenario, MergeSFLScenario):
                from simulations.mergesfl import run_mergesfl  # noqa: PLC0415 - heavy

                run_mergesfl(grid_to_use, scenario)
            elif isinstance(scenario, CompScenario):
                from simulations.comp import run_comp  # noqa: PLC0415 - heavy

                run_comp(grid_to_use, scenario)
            elif isinstance(scenario, HatScenario):
                from simulations.hat import run_hat  # noqa: PLC0415 - heavy

                run_hat(grid_to_use, scenario)
            elif isinstance(scenario, ImbNasScenario):
                from simulations.imbnas import run_imbnas  # noqa: PLC0415 - heavy

                run_imbnas(grid_to_use, scenario)
    except FlEdgeError as error:
        raise RunFailed(str(error)) from None
