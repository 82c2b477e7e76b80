"""``python -m benchmarks [NAME] [--quick] [--seeds 0 1 2] [--device cuda]``: list the benchmarks, or run one."""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def catalogue(folder: Path = FOLDER) -> dict[str, str]:
    """Return all benchmarks and what they measure, without importing any: modules that define ``BENCHMARK``."""
    found = {}
    for path in sorted(folder.glob("*.py")):
        tree = ast.parse(path.read_text())
        names = {
            target.id
            for node in tree.body
            if isinstance(node, ast.Assign | ast.AnnAssign)
            for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
            if isinstance(target, ast.Name)
        }
        if "BENCHMARK" in names:
            found[path.stem] = (ast.get_docstring(tree) or "").split("\n", 1)[0]
    return found


def sources(name: str, folder: Path = FOLDER) -> list[Path]:
    """Return the files that a benchmark's numbers depend on: its own, the harness's, and the library's."""
    own = [*folder.glob(f"{name}*.py"), *folder.glob("harness*.py")]
    return sorted({*own, *(folder.parent / "fl_edge").rglob("*.py")})


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status: 0 ran, 1 failed, 2 no such benchmark, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Side-by-side runs against baselines.")
    parser.add_argument("name", nargs="?", help="the benchmark; without one, all are listed")
    parser.add_argument("--quick", action="store_true", help="a small variant that ends in a minute or so")
    parser.add_argument("--seeds", nargs="+", type=int, metavar="SEED", help="instead of the benchmark's own")
    parser.add_argument("--device", default="cpu", help="cpu or cuda, for benchmarks of tensors; cuda has own results")
    options = parser.parse_args(arguments)
    known = catalogue()
    if options.name is None:
        for name, line in known.items():
            print(f"{name:16} {line}")
        return 0
    if options.name not in known:
        print(f"no benchmark {options.name!r}: there are {', '.join(known) or 'none'}", file=sys.stderr)
        return 2
    from benchmarks.harness_run import run_benchmark

    os.environ["FL_EDGE_DEVICE"] = options.device  # read where a benchmark has tensors, also in its child processes
    module = importlib.import_module(f"benchmarks.{options.name}")
    try:
        return run_benchmark(
            module.BENCHMARK,
            options.name,
            FOLDER / "results" / ("" if options.device == "cpu" else options.device),
            quick=options.quick,
            seeds=options.seeds,
            sources=sources(options.name),
        )
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
