"""COMP from folder to folder: reads a checkpoint layer by layer, writes a pruned one, and goes on after a kill."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from fl_edge.comp.checkpoint import Checkpoint
from fl_edge.comp.config import CompConfig
from fl_edge.comp.course import LayerReport, Progress, prune_layers
from fl_edge.comp.memory import peak_bytes
from fl_edge.comp.outline import Outline, Sizes, Source, draw_outline
from fl_edge.comp.output import Output, apart, parameters, space_for
from fl_edge.comp.state import Clock, drop_state, keep_state, kept_state
from fl_edge.comp.workbench import Workbench
from fl_edge.config import check
from fl_edge.errors import DataError
from fl_edge.files import write_whole
from fl_edge.pruning import PruningPlan, read_plan

log = logging.getLogger("flwr.fl_edge")

RECORD = "comp.json"


@dataclass(frozen=True)
class Result:
    """What a run did; ``comp.json`` in the folder of the pruned model holds the same.

    Attributes
    ----------
    key
        Of the run.
    config
        Its settings.
    plan
        What the pruned model keeps.
    outline, reports
        What was settled before the first layer, and what was done to each.
    before, after
        Parameters of the whole model.
    bytes_read
        From the model's files, in all passes and, after an interruption, in all processes.
    seconds
        Spent in all processes.
    peak_memory
        Largest resident memory of this process so far, bytes; with a CUDA device its own largest beside it.
    """

    key: str
    config: CompConfig
    plan: PruningPlan
    outline: Outline
    reports: tuple[LayerReport, ...]
    before: int
    after: int
    bytes_read: int
    seconds: float
    peak_memory: Mapping[str, int]

    def to_record(self) -> dict[str, Any]:
        """Return plain JSON values, without the plan, which has a file of its own."""
        return {
            "key": self.key,
            "config": asdict(self.config),
            "outline": self.outline.to_record(),
            "layers": [asdict(report) for report in self.reports],
            "parameters": {"before": self.before, "after": self.after},
            "bytes_read": self.bytes_read,
            "seconds": self.seconds,
            "peak_memory_bytes": dict(self.peak_memory),
        }

    @classmethod
    def read(cls, folder: Path) -> Result:
        """Return what the run did that made a folder.

        Raises
        ------
        DataError
            No pruned model of COMP there, or a damaged one.
        """
        plan = read_plan(folder)
        try:
            record = json.loads((folder / RECORD).read_bytes())
            return cls(
                record["key"],
                CompConfig(**record["config"]),
                plan,
                Outline.from_record(record["outline"]),
                tuple(LayerReport(**report) for report in record["layers"]),
                record["parameters"]["before"],
                record["parameters"]["after"],
                record["bytes_read"],
                record["seconds"],
                record["peak_memory_bytes"],
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise DataError(f"{folder} holds no {RECORD}, or a damaged one") from None


def prune_checkpoint(
    model: Path,
    out: Path,
    config: CompConfig,
    source_of: Callable[[Workbench], Source],
    *,
    key: str,
    device: torch.device,
    on_layer: Callable[[LayerReport, int], None] | None = None,
) -> Result:
    """Prune a model from its folder into another one, with never more than about one layer in memory.

    After each layer it is kept in ``out`` where the run stands. A run that was killed goes on from there, and ends with
    the same weights to the bit; one that has ended is not done again.

    Parameters
    ----------
    model
        Folder of the model; it is never written to.
    out
        Folder to write into, made where needed; a pruned model that stands there is replaced.
    config
        Settings.
    source_of
        Makes the one that measures.
    key
        Names what the result depends on, see :func:`~fl_edge.comp.state.run_key`.
    device
        Where layers are computed.
    on_layer
        Called after each layer with its report and the number of layers.

    Raises
    ------
    ConfigError
        Settings that cannot be, an unknown architecture, ``out`` in the folder of the model.
    DataError
        Files of the model that are damaged or missing, a ratio that was missed; nothing is left of the run then.
    RunFolderError
        A disk that is full or read-only, a folder that holds another run or a model that is not a pruned one.
    """
    check(config)
    apart(model, out)
    if (done := finished(out, key)) is not None:
        drop_state(out)
        return done
    clock = Clock()
    bench = Workbench(Checkpoint(model, device))
    checkpoint, sizes, source = bench.checkpoint, Sizes(bench), source_of(bench)
    output, before = Output(checkpoint, out), parameters(checkpoint.skeleton)
    kept = kept_state(out, key)
    if kept is None:
        needed = (before - config.ratio * sizes.total) * checkpoint.dtype.itemsize
        space_for(out, needed)
        outline, progress = draw_outline(config, sizes, bench, source), Progress()
    else:
        outline, progress = Outline.from_record(kept[0]["outline"]), Progress.from_record(kept[0]["progress"])
        clock.go_on(kept[0])

    def keep(tensors: Mapping[str, torch.Tensor]) -> None:
        record = {
            "outline": outline.to_record(),
            "progress": progress.to_record(),
            **clock.spent(checkpoint.bytes_read),
        }
        keep_state(out, key, record, tensors)

    if progress.layers and kept is not None:
        log.info("%s: going on after %d of %d layers", out, len(progress.layers), checkpoint.num_layers)
        source.restore(kept[1], progress.scale)
    else:
        source.begin()
        keep({})
    del kept
    try:
        for layer, tensors in prune_layers(config, outline, sizes, bench, source, progress):
            if tensors:
                output.layer(sum(not each.removed for each in progress.layers[:layer]), tensors)
            tensors.clear()  # whoever yielded them holds them too
            keep(source.snapshot())
            if on_layer is not None:
                on_layer(progress.reports[-1], checkpoint.num_layers)
    except DataError:
        if len(progress.layers) == checkpoint.num_layers:  # the ratio was missed, and would be missed again
            output.discard()
            drop_state(out)
        raise
    result = Result(
        key=key,
        config=config,
        plan=replace(bench.full, layers=tuple(progress.layers)),
        outline=outline,
        reports=tuple(progress.reports),
        before=before,
        after=output.outside(),
        **clock.spent(checkpoint.bytes_read),
        peak_memory=peak_bytes(device),
    )
    finish(output, result)
    drop_state(out)
    return result


def finished(out: Path, key: str) -> Result | None:
    """Return the result of a run that has ended, or None where a folder holds none of this key."""
    try:
        found = Result.read(out)
    except DataError:
        return None
    return found if found.key == key else None


def finish(output: Output, result: Result) -> None:
    """Make a model of what was written, with the record of the run beside it."""
    write_whole(output.folder / RECORD, json.dumps(result.to_record(), indent=1) + "\n")
    output.finish(result.plan)
