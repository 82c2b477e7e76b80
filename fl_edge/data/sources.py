"""Documented functions and classes of installed libraries, read from their source files without importing them."""

from __future__ import annotations

import ast
import hashlib
import importlib.metadata
import importlib.util
import sys
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from fl_edge.errors import DataError

STANDARD_LIBRARY = "python"
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
_DISTRIBUTIONS = {"sklearn": "scikit-learn", "PIL": "pillow", "flwr_datasets": "flwr-datasets"}
_SKIPPED = {  # tests, and others' code
    *("tests", "test", "testing", "conftest", "idlelib", "lib2to3", "turtledemo", "pydoc_data"),
    *("site-packages", "dist-packages", "externals", "_vendor", "vendored", "thirdparty_files"),
}


@dataclass(frozen=True)
class Documented:
    """One function or class with a docstring.

    Attributes
    ----------
    module
        Dotted, starting with the library's name (for the standard library with the top module's).
    name
        Of the function or class.
    signature
        ``name(arguments)``, with defaults, without annotations; empty for a class.
    text
        The docstring, dedented.
    """

    module: str
    name: str
    signature: str
    text: str


def documented(library: str) -> Iterator[Documented]:
    """Yield what is documented in a library, file by file in an order that is mixed but always the same.

    Parameters
    ----------
    library
        The name to import it by, or ``python`` for the standard library.

    Raises
    ------
    DataError
        A library that is not installed, or has no source files.
    """
    root = _folder(library)
    for file in source_files(library):
        place = file.relative_to(root).with_suffix("").parts
        parts = [part for part in place if part != "__init__"]
        module = ".".join(parts if library == STANDARD_LIBRARY else [library, *parts])
        for node in _definitions(_parsed(file)):
            if text := ast.get_docstring(node):
                yield Documented(module, node.name, _signature(node), text)


def source_files(library: str) -> list[Path]:
    """Return a library's own source files, tests left out, in the order of their paths' hashes."""
    root = _folder(library)
    files = [f for f in root.rglob("*.py") if not _SKIPPED & set(f.relative_to(root).with_suffix("").parts)]
    if not files:
        raise DataError(f"library={library} has no source files in {root}")
    return sorted(files, key=lambda file: hashlib.blake2b(file.relative_to(root).as_posix().encode()).digest())


def version(library: str) -> str:
    """Return what tells one state of a library from another: its version, else the sizes of its files."""
    if library == STANDARD_LIBRARY:
        return ".".join(map(str, sys.version_info[:3]))
    try:
        return importlib.metadata.version(_DISTRIBUTIONS.get(library, library))
    except importlib.metadata.PackageNotFoundError:
        sizes = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in source_files(library)]
        return hashlib.blake2b(repr(sizes).encode(), digest_size=8).hexdigest()


def installed(library: str) -> bool:
    """Return whether a library is there to be read."""
    try:
        return _folder(library).is_dir()
    except DataError:
        return False


def _folder(library: str) -> Path:
    if library == STANDARD_LIBRARY:
        return Path(sysconfig.get_path("stdlib"))
    try:
        spec = importlib.util.find_spec(library) if library.isidentifier() else None
    except (ImportError, ValueError):
        spec = None
    if not spec or not spec.submodule_search_locations:
        raise DataError(f"library={library} is not an installed package; install it or choose another")
    return Path(next(iter(spec.submodule_search_locations)))


def _definitions(node: ast.AST | None) -> Iterator[Definition]:
    """Walk statements only; expressions, most of a tree, define nothing."""
    for child in (*getattr(node, "body", ()), *getattr(node, "orelse", ())):
        if isinstance(child, Definition):
            yield child
        if isinstance(child, ast.stmt):
            yield from _definitions(child)


def _parsed(file: Path) -> ast.Module | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # escapes that a newer Python no longer likes
        try:
            return ast.parse(file.read_bytes())
        except (SyntaxError, ValueError, OSError, RecursionError):
            return None  # templates, and files for another Python


def _signature(node: Definition) -> str:
    if isinstance(node, ast.ClassDef):
        return ""
    for argument in ast.walk(node.args):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    return f"{node.name}({ast.unparse(node.args)})"
