"""Every size class from one run of COMP, from folder to folders: one pass over the model, resumed after a kill."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fl_edge.comp.checkpoint import Checkpoint
from fl_edge.comp.classes import SizeClass, class_configs, class_name, draw_outlines, prune_classes
from fl_edge.comp.config import CompConfig
from fl_edge.comp.course import LayerReport, Progress, check_met
from fl_edge.comp.memory import peak_bytes
from fl_edge.comp.outline import Outline, Sizes, Source
from fl_edge.comp.output import Output, apart, parameters, space_for
from fl_edge.comp.run import Result, finish, finished
from fl_edge.comp.state import Clock, drop_state, keep_state, kept_state
from fl_edge.comp.workbench import Workbench
from fl_edge.errors import DataError

log = logging.getLogger("flwr.fl_edge")


def prune_nested(
    model: Path,
    out: Path,
    config: CompConfig,
    ratios: Sequence[float],
    source_of: Callable[[Workbench], Source],
    *,
    key: str,
    device: torch.device,
    on_layer: Callable[[LayerReport, int], None] | None = None,
) -> list[Result]:
    """Prune a model to several sizes; each keeps a subset of what a larger one keeps.

    Parameters
    ----------
    model
        Folder of the model; it is never written to.
    out
        Folder for the classes' folders, which have their ratios as names: ``out/0.2``, ``out/0.4``.
    config
        Settings; ``target`` is ``own`` whatever it says, and each class has its own ``ratio``.
    ratios
        Of the classes, all different.
    source_of, key, device
        As for :func:`~fl_edge.comp.run.prune_checkpoint`; the key depends on the ratios too.
    on_layer
        Called after each layer with its report in the smallest class and the number of layers.

    Returns
    -------
    list
        A result for each class, by rising ratio; bytes and seconds are those of the whole run.

    Raises
    ------
    ConfigError, DataError, RunFolderError
        As :func:`~fl_edge.comp.run.prune_checkpoint` does; a class that missed its ratio leaves nothing of any.
    """
    configs = class_configs(config, ratios)
    folders = {class_name(each.ratio): out / class_name(each.ratio) for each in configs}
    apart(model, out)
    ended = [finished(folder, key) for folder in folders.values()]
    if None not in ended:
        drop_state(out)
        return [each for each in ended if each is not None]
    clock = Clock()
    bench = Workbench(Checkpoint(model, device))
    checkpoint, sizes, source = bench.checkpoint, Sizes(bench), source_of(bench)
    before, kept = parameters(checkpoint.skeleton), kept_state(out, key)
    if kept is None:
        remaining = sum(before - each.ratio * sizes.total for each in configs)
        space_for(out, remaining * checkpoint.dtype.itemsize)
        outlines, courses = draw_outlines(configs, sizes, bench, source), [Progress() for _ in configs]
    else:
        outlines = [Outline.from_record(each) for each in kept[0]["outlines"]]
        courses = [Progress.from_record(each) for each in kept[0]["progress"]]
        clock.go_on(kept[0])
    classes = [SizeClass(*each) for each in zip(configs, outlines, courses, strict=True)]
    done = len(courses[0].layers)

    def keep(tensors: Mapping[str, Tensor]) -> None:
        record = {
            "outlines": [each.outline.to_record() for each in classes],
            "progress": [each.progress.to_record() for each in classes],
            **clock.spent(checkpoint.bytes_read),
        }
        keep_state(out, key, record, tensors)

    if done and kept is not None:
        log.info("%s: going on after %d of %d layers", out, done, checkpoint.num_layers)
        source.restore(kept[1], 1.0)
    else:
        source.begin()
        keep({})
    del kept
    open_ = [each for each, found in zip(classes, ended, strict=True) if found is None]
    outputs = {each.name: Output(checkpoint, folders[each.name]) for each in open_}

    def write(each: SizeClass, tensors: dict[str, Tensor]) -> None:
        outputs[each.name].layer(sum(not layer.removed for layer in each.progress.layers), tensors)

    for _ in range(done, checkpoint.num_layers):
        prune_classes(classes, sizes, bench, source, write)
        keep(source.snapshot())
        if on_layer is not None:
            on_layer(courses[-1].reports[-1], checkpoint.num_layers)
    _check_all(classes, sizes, outputs.values(), out)
    after = {name: output.outside() for name, output in outputs.items()}
    for each in open_:
        result = Result(
            key=key,
            config=each.config,
            plan=replace(bench.full, layers=tuple(each.progress.layers)),
            outline=each.outline,
            reports=tuple(each.progress.reports),
            before=before,
            after=after[each.name],
            **clock.spent(checkpoint.bytes_read),
            peak_memory=peak_bytes(device),
        )
        finish(outputs[each.name], result)
    drop_state(out)
    return [Result.read(folder) for folder in folders.values()]


def _check_all(classes: Sequence[SizeClass], sizes: Sizes, outputs: Collection[Output], out: Path) -> None:
    """Leave nothing of the run where a class missed its ratio: it would miss it again."""
    try:
        for each in classes:
            check_met(each.config, sizes, each.progress)
    except DataError:
        for output in outputs:
            output.discard()
        drop_state(out)
        raise
