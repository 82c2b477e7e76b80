"""Pruned base models of a client: in memory while the process stays, on disk where the next message may meet another.

Both are caches of something that can be made again from the unpruned base and the plan, to the same bits.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Context
from torch import nn

from fl_edge.data.once import content_key, made_once
from fl_edge.errors import DataError, RunFolderError
from fl_edge.files import default_folder
from fl_edge.link.resident.staying import stays
from fl_edge.pruning import PruningPlan, full_plan, load_pruned, prune, read_plan, save_pruned

STATE = "pruned_base"  # in Context.state: the hash under which the last base lies on disk
_KIND = "pruned"  # folder below the caches'

log = logging.getLogger("flwr.fl_edge")

Held = tuple[PruningPlan, nn.Module]


class PrunedBases:
    """The pruned base of each device that this process serves.

    Parameters
    ----------
    keep_live
        Models kept in memory; more than one only when one process serves several devices.
    keep_files
        Models kept on disk, those used last; devices with the same base and plan share one.
    """

    def __init__(self, keep_live: int = 32, keep_files: int = 4) -> None:
        self._keep_live, self._keep_files = keep_live, keep_files
        self._live: OrderedDict[tuple[int, int], Held] = OrderedDict()

    def get(
        self, context: Context, base: Callable[[], nn.Module], digest: str, plan: PruningPlan, accelerator: str
    ) -> nn.Module:
        """Return the base cut down to a plan, without gradients.

        Parameters
        ----------
        base
            Makes the unpruned model; called only when no model that holds all of the plan is nearer.
        digest
            Hash of its weights.
        accelerator
            Where the model is to be, for example "cuda".

        Raises
        ------
        ConfigError
            A plan of another model.
        """
        place = (context.run_id, context.node_id)
        held = self._live.pop(place, None)
        if held is None or not held[0].covers(plan):
            held = _from_disk(context, plan) or _whole(base)
            held[1].requires_grad_(False).to(accelerator)
        present, model = held
        prune(model, plan, present)
        self._live[place] = (plan, model)
        while len(self._live) > self._keep_live:
            self._live.popitem(last=False)
        if present != plan and not stays():
            self._to_disk(context, digest, plan, model)
        return model

    def _to_disk(self, context: Context, digest: str, plan: PruningPlan, model: nn.Module) -> None:
        key = content_key(digest, plan.digest())
        try:
            folder = made_once(_KIND, key, lambda folder: save_pruned(model, plan, folder), "a pruned base")
        except (DataError, RunFolderError) as error:
            log.warning("the pruned base is not kept on disk: %s", error)
            return
        context.state[STATE] = ConfigRecord({"key": key})
        others = sorted(folder.parent.glob("[!.]*"), key=_last_used, reverse=True)
        for old in others[self._keep_files :]:
            shutil.rmtree(old, ignore_errors=True)


def _whole(base: Callable[[], nn.Module]) -> Held:
    model = base()
    return full_plan(model), model


def _from_disk(context: Context, plan: PruningPlan) -> Held | None:
    """Return what this device left on disk, if it is there, whole, and holds all of a plan."""
    if STATE not in context.state:
        return None
    state: Any = context.state.config_records[STATE]
    folder = default_folder() / _KIND / str(state["key"])
    if not folder.is_dir():  # others have used theirs more lately
        return None
    try:
        present = read_plan(folder)
        if not present.covers(plan):
            return None
        model = load_pruned(folder)
    except DataError as error:
        log.warning("a pruned base on disk is made anew: %s", error)
        shutil.rmtree(folder, ignore_errors=True)
        return None
    with contextlib.suppress(OSError):  # read-only, or another process removed it
        os.utime(folder)
    return present, model


def _last_used(folder: Path) -> float:
    try:
        return folder.stat().st_mtime
    except OSError:  # another process removed it first
        return 0.0
