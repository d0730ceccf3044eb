"""A report as parts, and as Markdown or as one HTML file that needs nothing beside it.

Whatever a model or a data set wrote is text here: HTML is escaped by Jinja, the samples are JSON that the script shows as text, and the page's policy lets no
other script run and nothing be loaded.
"""

import base64
import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape


@dataclass
class Heading:
    text: str
    level: int = 2


@dataclass
class Text:
    """A paragraph; `code` and **bold** as in Markdown."""

    text: str


@dataclass
class Note:
    """A paragraph that stands out."""

    text: str


@dataclass
class Code:
    text: str


@dataclass
class Table:
    header: list[str]
    rows: list[list[str]]


@dataclass
class Figure:
    file: str
    text: str


Part = Heading | Text | Note | Code | Table | Figure


def markdown(parts: list[Part]) -> str:
    return "\n\n".join(part_in_markdown(part) for part in parts) + "\n"


def part_in_markdown(part: Part) -> str:
    match part:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Text(text):
            return text
        case Note(text):
            return f"> {text}"
        case Code(text):
            return f"```\n{text}\n```"
        case Table(header, rows):
            lines = [header, ["---"] * len(header), *rows]
            return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
        case Figure(file, text):
            return f"![{text}]({file})"


def html(parts: list[Part], page: Path, folder: Path, samples: dict[str, Any], language: str = "en") -> str:
    """One file, made of what is in `page`, with the figures of `folder` and the samples inside."""
    style, script = ((page / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
    environment = Environment(loader=FileSystemLoader(page), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    environment.filters |= {"inline": inline, "kind": lambda part: type(part).__name__}
    return environment.get_template("page.html").render(
        parts=parts,
        language=language,
        style=Markup(style),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src '{fingerprint(style)}'; script-src '{fingerprint(script)}'; base-uri 'none'; form-action 'none'",
        images={part.file: image(folder / part.file) for part in parts if isinstance(part, Figure)},
        samples=Markup(json.dumps(samples, sort_keys=True).replace("<", "\\u003c")),
    )  # fmt: skip


def inline(text: str) -> Markup:
    """`code` and **bold**, and all else escaped."""
    found = str(escape(text))
    for pattern, tag in ((r"`([^`]+)`", "code"), (r"\*\*([^*]+)\*\*", "strong")):
        found = re.sub(pattern, rf"<{tag}>\1</{tag}>", found)
    return Markup(found)


def image(file: Path) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode()}"


def fingerprint(text: str) -> str:
    """As a content security policy names what it allows."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
