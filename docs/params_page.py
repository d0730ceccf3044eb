"""docs/reference/params.md, from the source of reprotune/params.py."""

import ast
import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from markdown_parts import choices, code, table

from reprotune import params

HEAD = """# Parameters

Every key of `params.yaml`. There are no defaults: a missing key is an error, and so is an unknown one.
`<name>` stands for a name of your own. `null` is written as nothing after the colon.

Keys that must fit together, such as `evaluate.benchmarks` and the entries under `benchmarks`, are checked by
the stage `check_params` before any other stage runs. [invalidation.md](invalidation.md) lists what each key
makes stale.
"""
COLUMNS = ("key", "value", "meaning")
BASIC: Mapping[str, str] = {"int": "integer", "float": "number", "str": "text", "Name": "name"}
PINNED: Mapping[str, str] = {"pinned": "commit, 40 hex digits", "sha256": "sha256, 64 hex digits"}
"""What the validators of pinned values expect."""
BOUNDS: Mapping[str, str] = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


def page() -> str:
    source = Source(ast.parse(Path(params.__file__).read_text(encoding="utf-8")))
    parts = [HEAD]
    for name, annotation, doc in source.fields("Params"):
        parts.append(f"## `{name}`\n\n{table(COLUMNS, source.rows(name, annotation, doc))}")
    parts.append("## Sources\n\nA `source` is one of four kinds. Each pins the bytes that it stands for.\n")
    for kind in source.kinds():
        parts.append(table(COLUMNS, [row for field in source.fields(kind) for row in source.rows(*field)]))
    return "\n".join(parts)


class Source:
    """The sections and aliases that reprotune/params.py declares."""

    def __init__(self, tree: ast.Module) -> None:
        self.sections = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
        self.aliases = {
            ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)
        }

    def kinds(self) -> list[str]:
        """The sections that a source can be."""
        names = re.findall(r"\w+", ast.unparse(self.aliases["Source"]))
        return [name for name in names if name in self.sections]

    def fields(self, section: str) -> Iterator[tuple[str, ast.expr, str]]:
        """Name, annotation and docstring of each field, inherited ones first."""
        node = self.sections[section]
        for base in map(ast.unparse, node.bases):
            if base in self.sections:
                yield from self.fields(base)
        for statement, following in zip(node.body, [*node.body[1:], None], strict=True):
            if isinstance(statement, ast.AnnAssign):
                yield ast.unparse(statement.target), statement.annotation, docstring(following)

    def rows(self, key: str, annotation: ast.expr, doc: str) -> Iterator[tuple[str, str, str]]:
        """A row for a value; for a section, a row for its docstring, and the rows of its fields."""
        text = ast.unparse(annotation)
        entries = re.search(r"dict\[Name, (\w+)\]", text)
        section = entries[1] if entries else text.removesuffix(" | None")
        if section not in self.sections:
            yield code(key), self.value(annotation), doc
            return
        if doc:
            yield code(key), "section or `null`" if text.endswith("| None") else "section", doc
        for name, inner, inner_doc in self.fields(section):
            yield from self.rows(f"{key}{'.<name>' if entries else ''}.{name}", inner, inner_doc)

    def value(self, node: ast.expr) -> str:
        """An annotation in words."""
        match node:
            case ast.BinOp(left=left, right=right):
                return f"{self.value(left)} or {self.value(right)}"
            case ast.Constant(value=None):
                return "`null`"
            case ast.Name(id="bool"):
                return choices(["true", "false"])
            case ast.Name(id="Source"):
                return "[source](#sources)"
            case ast.Name(id="PypiSource"):
                return "[source](#sources) of kind `pypi`"
            case ast.Name(id=name):
                return BASIC.get(name) or self.value(self.aliases[name])
            case ast.Subscript(value=ast.Name(id=generic), slice=content):
                arguments = content.elts if isinstance(content, ast.Tuple) else [content]
                return self.generic(generic, arguments)
        raise NotImplementedError(ast.unparse(node))

    def generic(self, name: str, arguments: list[ast.expr]) -> str:
        if name == "Literal":
            return choices(ast.literal_eval(choice) for choice in arguments)
        inner = self.value(arguments[0])
        if name == "list":
            return f"list: {inner}"
        if name == "dict":
            return f"by {inner}: {self.value(arguments[1])}"
        pinned, constraints = constrained(arguments[1:])
        return pinned or f"{inner} {', '.join(constraints)}".strip()


def constrained(metadata: list[ast.expr]) -> tuple[str, list[str]]:
    """What a validator expects, and the limits of a Field. That a text is not empty needs no words."""
    pinned, limits = "", []
    for call in metadata:
        assert isinstance(call, ast.Call), ast.unparse(call)
        if ast.unparse(call.func) == "AfterValidator":
            pinned = PINNED[ast.unparse(call.args[0])]
        for keyword in call.keywords:
            if sign := BOUNDS.get(keyword.arg or ""):
                limits.append(f"{sign} {ast.unparse(keyword.value).replace(' ** ', '^')}")
            elif keyword.arg == "pattern":
                limits.append(f"that matches {code(ast.literal_eval(keyword.value))}")
    return pinned, limits


def docstring(node: ast.stmt | None) -> str:
    """The text of a string that stands as a statement, in one line."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).split())
    return ""
