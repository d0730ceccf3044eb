"""Hashes of what code means: of its syntax trees, without comments, docstrings and formatting.

They are the same on Python 3.11 to 3.14, and this module imports nothing but the standard library.
"""

import ast
import hashlib
import os
import sys
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

PACKAGES = ("reprotune", "stages")
UNCOUNTED = "reprotune.pipeline"
"""The room that holds stages against DVC. It makes no result, so a change in it makes no stage stale."""
LIBRARIES = (
    "bitsandbytes",
    "datasets",
    "lm_eval",
    "matplotlib",
    "peft",
    "scipy",
    "torch",
    "transformers",
    "trl",
)
"""Import names of the libraries whose version can change a result."""
LOCK = "requirements.lock"


def of_stages(root: Path) -> dict[str, str]:
    """The fingerprint of every stage but `code`, by the stage's name."""
    names = sorted(file.stem for file in (root / "stages").glob("*.py"))
    return {name: of_stage(root, name) for name in names if name not in ("__init__", "code")}


def of_stage(root: Path, name: str) -> str:
    """32 hex digits for the modules that a stage reaches by import, and the versions of its libraries."""
    modules = reached(root, [f"stages.{name}"])
    found = hashlib.sha256()
    for module in sorted(modules):
        found.update(f"{module} {of_source(modules[module].read_bytes())}\n".encode())
    for library, version in sorted(versions(root, name).items()):
        found.update(f"{library}=={version}\n".encode())
    return found.hexdigest()[:32]


def versions(root: Path, name: str) -> dict[str, str]:
    """The LIBRARIES that a stage imports, with the versions that requirements.lock pins."""
    modules = reached(root, [f"stages.{name}"])
    used = {imported.split(".")[0] for module in modules for imported in imports(root, module)}
    pinned = locked_versions(root / LOCK)
    return {library: pinned[library] for library in LIBRARIES if library in used}


def locked_versions(lock: Path) -> dict[str, str]:
    """The version of each package in a requirements file, by its name with underscores."""
    lines = lock.read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if "==" in line and not line.startswith("#"))
    return {name.strip().replace("-", "_").lower(): version.strip() for name, version in pairs}


def reached(root: Path, modules: Iterable[str]) -> dict[str, Path]:
    """The modules of PACKAGES that these import, directly or through others, with their files."""
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        if name in found or name.startswith(UNCOUNTED) or (file := file_of(root, name)) is None:
            continue
        found[name] = file
        # importing a.b.c runs a and a.b first
        waiting += [name.rpartition(".")[0]] if "." in name else []
        waiting += imports(root, name)
    return found


def file_of(root: Path, module: str) -> Path | None:
    """The file of a module of PACKAGES; None for a name in a module, or of another package."""
    if module.split(".")[0] not in PACKAGES:
        return None
    path = root.joinpath(*module.split("."))
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


def imports(root: Path, module: str) -> list[str]:
    """The names that a module imports, anywhere in it; `from a import b` gives both a and a.b."""
    file = file_of(root, module)
    return [] if file is None else list(imported_names(file.read_bytes()))


@cache
def imported_names(source: bytes) -> tuple[str, ...]:
    found: dict[str, None] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= dict.fromkeys(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"a relative import, {ast.unparse(node)!r}: write it in full"
            found |= dict.fromkeys(
                [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            )
    return tuple(found)


def of_loaded() -> dict[str, str]:
    """The hash of each module of PACKAGES that this process has imported, by its path."""
    # as text: paths of thousands of modules would take a quarter of a second
    root = os.path.dirname(os.path.dirname(__file__)) + os.sep
    folders = tuple(f"{root}{package}{os.sep}" for package in PACKAGES)
    uncounted = f"{root}{UNCOUNTED.replace('.', os.sep)}"
    files = {getattr(module, "__file__", None) or "" for module in list(sys.modules.values())}
    return {
        file.removeprefix(root): of_source(Path(file).read_bytes())
        for file in sorted(files)
        if file.startswith(folders) and not file.startswith(uncounted)
    }


@cache
def of_source(source: bytes) -> str:
    """The hash of one module's meaning."""
    return hashlib.sha256("\n".join(canonical(ast.parse(source))).encode()).hexdigest()


def canonical(node: object) -> Iterator[str]:
    """A syntax tree as tokens: the name of each node, then its fields by name, without those that are empty.

    Fields that a newer Python added are empty in older code. `ctx`, `kind` and `type_comment` mean nothing.
    """
    if isinstance(node, ast.JoinedStr):
        node = ast.JoinedStr(list(joined(node.values)))
    if isinstance(node, ast.AST):
        yield f"({type(node).__name__}"
        for name in sorted(node._fields):
            value = getattr(node, name, None)
            if isinstance(value, list):
                value = [item for item in value if not is_inert(item)]
            if value is None or value == [] or name in ("ctx", "kind", "type_comment"):
                continue
            yield f".{name}"
            yield from canonical(value)
        yield ")"
    elif isinstance(node, list):
        yield "["
        for item in node:
            yield from canonical(item)
        yield "]"
    else:
        # ascii: which characters repr escapes depends on Python's version of Unicode
        yield f"{type(node).__name__}:{node!a}"


def is_inert(node: object) -> bool:
    """Whether a statement does nothing: `pass`, or a text by itself, as a docstring is."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return isinstance(node.value.value, str)
    return isinstance(node, ast.Pass)


def joined(parts: Iterable[ast.expr]) -> Iterator[ast.expr]:
    """The parts of an f-string with neighbouring texts as one: how they are cut differs between Pythons."""
    text = ""
    for part in parts:
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            text += part.value
            continue
        if text:
            yield ast.Constant(text)
        text = ""
        if isinstance(part, ast.FormattedValue) and is_empty(part.format_spec):
            part = ast.FormattedValue(part.value, part.conversion, None)
        yield part
    if text:
        yield ast.Constant(text)


def is_empty(format_spec: ast.expr | None) -> bool:
    """Whether nothing stands behind the colon in `{value:}`."""
    return isinstance(format_spec, ast.JoinedStr) and not list(joined(format_spec.values))
