"""The command line of COMP: ``python -m fl_edge.comp MODEL_DIR --ratio 0.2 --calibration TEXT --out DIR``."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from fl_edge.comp.classes import class_name
from fl_edge.comp.config import CompConfig, faithful
from fl_edge.comp.course import LayerReport
from fl_edge.comp.local import TextSource
from fl_edge.comp.measures import measure
from fl_edge.comp.nested import prune_nested
from fl_edge.comp.run import Result, prune_checkpoint
from fl_edge.comp.state import run_key
from fl_edge.comp.table import show
from fl_edge.comp.workbench import Workbench
from fl_edge.config import resolve
from fl_edge.data.calibration import read_texts, sequences
from fl_edge.errors import ConfigError, DataError, FlEdgeError
from fl_edge.models.accelerator import find_accelerator
from fl_edge.models.quiet import quiet
from fl_edge.seeding import torch_rng

_HELD_OUT = 0.1
_INTERRUPTED = 130  # what a shell gives for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return its exit code."""
    args = _parser().parse_args(arguments)
    console, errors = Console(), Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    handler, log = logging.StreamHandler(), logging.getLogger("flwr.fl_edge")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        _run(args, console)
    except FlEdgeError as error:
        errors.print(str(error))
        return 1
    except KeyboardInterrupt:
        errors.print(f"interrupted; the same command goes on in {args.out}")
        return _INTERRUPTED
    finally:
        log.removeHandler(handler)
        log.setLevel(level)
    return 0


def _run(args: argparse.Namespace, console: Console) -> None:
    config, ratios = _config(args), _ratios(args.nested)
    device = torch.device(find_accelerator(args.device))
    if not args.model.is_dir():
        raise DataError(f"{args.model} is not the folder of a model")
    calibration, test = _tokens(args, console)
    key = run_key(args.model, config, calibration, str(ratios))
    with _bar(console) as (measured, pruned):
        results = _prune(args, config, ratios, calibration, key, device, measured, pruned)
    folders = [args.out / class_name(ratio) for ratio in sorted(ratios)] or [args.out]
    before = measure(args.model, test, device)
    show(console, results, before, [measure(folder, test, device) for folder in folders], folders)


def _prune(
    args: argparse.Namespace,
    config: CompConfig,
    ratios: Sequence[float],
    tokens: Tensor,
    key: str,
    device: torch.device,
    measured: Callable[[int, int], None],
    pruned: Callable[[LayerReport, int], None],
) -> list[Result]:
    def source(bench: Workbench) -> TextSource:
        bench.checkpoint.on_release = lambda layer: measured(layer, bench.checkpoint.num_layers)
        return TextSource(bench, tokens, config.target)

    if ratios:
        return prune_nested(args.model, args.out, config, ratios, source, key=key, device=device, on_layer=pruned)
    return [prune_checkpoint(args.model, args.out, config, source, key=key, device=device, on_layer=pruned)]


def _config(args: argparse.Namespace) -> CompConfig:
    overrides: dict[str, Any] = {} if args.ratio is None else {"ratio": args.ratio}
    for each in args.set:
        name, equals, value = each.partition("=")
        if not equals:
            raise ConfigError(f"--set {each} is not allowed; it must be key=value")
        overrides[name.strip()] = value.strip()
    config = resolve(CompConfig, None, overrides)
    return faithful(config) if args.faithful else config


def _ratios(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError:
        raise ConfigError(f"--nested {text} is not allowed; it must be numbers with commas, as 0.2,0.4") from None


def _tokens(args: argparse.Namespace, console: Console) -> tuple[Tensor, Tensor]:
    """Return calibration and test sequences."""
    from transformers import AutoTokenizer  # noqa: PLC0415 - heavy

    try:
        with quiet():
            tokenizer: Any = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    except Exception as error:  # tokenizers raises a bare one
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(f"{args.model} has no tokenizer that can be read: {reason}") from None
    found = sequences(tokenizer, read_texts(args.calibration), args.length, 0, torch_rng(args.seed, "calibration"))
    if args.test is not None:
        test = sequences(tokenizer, read_texts(args.test), args.length, 0, torch_rng(args.seed, "test"))
    else:
        held = max(1, round(_HELD_OUT * len(found)))
        if held == len(found):
            raise DataError(f"{args.calibration} has one sequence of {args.length} tokens; give more, or --test TEXT")
        test, found = found[:held], found[held:]
        console.print(f"no --test: {held} of the text's {held + len(found)} sequences are held out to test on")
    return found[: args.sequences or len(found)], test[: args.sequences or len(test)]


@contextmanager
def _bar(console: Console) -> Iterator[tuple[Callable[[int, int], None], Callable[[LayerReport, int], None]]]:
    """Yield what is to be called with each layer that was measured, until one was pruned, and what with those."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=not console.is_terminal) as progress:
        task, pruning = progress.add_task("measuring layers", total=None), False

        def measured(layer: int, layers: int) -> None:
            if not pruning:
                progress.update(task, completed=layer + 1, total=layers)

        def pruned(report: LayerReport, layers: int) -> None:
            nonlocal pruning
            pruning = True
            progress.update(task, description="pruning layers", completed=report.layer + 1, total=layers)

        yield measured, pruned


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("python -m fl_edge.comp", description="Prune a causal language model with COMP.")
    parser.add_argument("model", type=Path, help="folder of the model, with its tokenizer")
    parser.add_argument("--calibration", type=Path, required=True, help="text file, or folder of text files")
    parser.add_argument("--out", type=Path, required=True, help="folder to write into")
    parser.add_argument("--ratio", help="part of the decoder layers' parameters to remove (0.2)")
    parser.add_argument("--nested", default="", help="several ratios, such as 0.2,0.4: one folder each, in one run")
    parser.add_argument("--test", type=Path, help="text for perplexity; else a tenth of the calibration text")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (auto)")
    parser.add_argument("--length", type=_length, default=128, help="tokens of a sequence (128)")
    parser.add_argument("--sequences", type=_count, default=128, help="most sequences; 0: all (128)")
    parser.add_argument("--seed", type=int, default=0, help="which sequences are drawn (0)")
    parser.add_argument("--faithful", action="store_true", help="only what is known of the paper's method")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any setting of CompConfig")
    return parser


def _count(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 0")
    return int(text)


def _length(text: str) -> int:
    if _count(text) < 2:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number of at least 2")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
