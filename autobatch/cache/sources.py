"""Which files a TARGET is made of, found without running any of them."""

from __future__ import annotations

import ast
import hashlib
import importlib.machinery
import importlib.metadata
import sys
from collections.abc import Iterator
from pathlib import Path

_DISTRIBUTIONS = {"timm": "timm", "torchvision": "torchvision", "hf": "transformers"}


def sources(target: str) -> dict[str, str]:
    """Return what ``target`` is made of: each file's path with the SHA-256 of its contents, or a library with its version.

    The files are the target's own and, of what they import, those that lie beside it or in the working directory. Installed packages
    and files that are only read (data, settings) are not among them.

    Raises:
        OSError: the target's file, or the module's, is not there or cannot be read.
        SyntaxError: one of the files is not Python.
    """
    prefix, _, _ = target.partition(":")
    if prefix in ("example", *_DISTRIBUTIONS):
        return {prefix: _version(_DISTRIBUTIONS.get(prefix, "torch-autobatch"))}
    place = target.rpartition(":")[0]
    if place.endswith(".py"):
        path = Path(place).resolve()
        found = _with_imports([path], [path.parent, Path.cwd()])
    else:
        files, root = _module_files(place)
        installed = {"site-packages", "dist-packages"} & set(root.parts)
        found = set(files) if installed else _with_imports(files, [root, Path.cwd()])
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(found)}


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _module_files(name: str) -> tuple[list[Path], Path]:
    """Return the files that importing the module ``name`` runs, packages first, and the folder that its first part lies in."""
    search, files = [str(Path.cwd()), *sys.path], []
    root = Path.cwd()
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:count]), search)
        if spec is None:
            raise FileNotFoundError(2, "No such module", name)
        search = list(spec.submodule_search_locations or ())
        if spec.has_location and spec.origin is not None:
            files.append(Path(spec.origin).resolve())
            if count == 1:
                root = files[0].parents[1] if search else files[0].parent
    return files, root


def _with_imports(files: list[Path], roots: list[Path]) -> set[Path]:
    """Return ``files`` and all that they import, directly or not, from the folders ``roots``."""
    found, waiting = set[Path](), list(files)
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        if path.suffix == ".py":
            waiting += [file for folders, parts in _imports(path, roots) for folder in folders for file in _files(folder, parts)]
    return found


def _imports(path: Path, roots: list[Path]) -> Iterator[tuple[list[Path], list[str]]]:
    """Yield what ``path`` imports: the folders it may lie in, and its dotted name in parts."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            yield from ((roots, alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            folders = [path.parents[node.level - 1]] if 0 < node.level <= len(path.parents) else roots
            yield from ((folders, [*(node.module or "").split("."), alias.name]) for alias in node.names)


def _files(folder: Path, parts: list[str]) -> Iterator[Path]:
    """Yield the files that importing the dotted name runs, if it lies in ``folder``."""
    for part in filter(None, parts):
        yield from (file for file in (folder / f"{part}.py", folder / part / "__init__.py") if file.is_file())
        folder /= part
