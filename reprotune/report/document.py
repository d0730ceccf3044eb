"""A report as a list of parts, written as Markdown or as one HTML file that works offline.

Text from models and data sets stays text: Jinja escapes HTML, samples are JSON that the script shows as text,
and the page's policy allows no other script and loads nothing.
"""

import base64
import hashlib
import json
import re
from collections.abc import Sequence
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


def markdown(parts: Sequence[Part]) -> str:
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
            escaped = ([cell.replace("|", "\\|") for cell in line] for line in lines)
            return "\n".join(f"| {' | '.join(line)} |" for line in escaped)
        case Figure(file, text):
            return f"![{text}]({file})"


def html(parts: Sequence[Part], templates: Path, folder: Path, samples: dict[str, Any], language: str) -> str:
    """One HTML file with everything inside.

    Args:
        templates: folder with the page's HTML, style and script.
        folder: where the figures are.
        samples: what the sample browser shows.
    """
    style = (templates / "page.css").read_text(encoding="utf-8")
    script = (templates / "page.js").read_text(encoding="utf-8")
    environment = Environment(
        loader=FileSystemLoader(templates),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"inline": inline, "kind": lambda part: type(part).__name__}
    return environment.get_template("page.html").render(
        parts=parts,
        language=language,
        style=Markup(style),
        script=Markup(script),
        policy=policy(style, script),
        images={part.file: image(folder / part.file) for part in parts if isinstance(part, Figure)},
        samples=Markup(json.dumps(samples, sort_keys=True).replace("<", "\\u003c")),
    )


def policy(style: str, script: str) -> str:
    """A content security policy that allows this style, this script and images inside the page."""
    return (
        f"default-src 'none'; img-src data:; style-src '{source_hash(style)}'; "
        f"script-src '{source_hash(script)}'; base-uri 'none'; form-action 'none'"
    )


def source_hash(text: str) -> str:
    """The hash by which a content security policy names an inline style or script."""
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def inline(text: str) -> Markup:
    """HTML with `code` and **bold**, and everything else escaped."""
    escaped = str(escape(text))
    for pattern, tag in ((r"`([^`]+)`", "code"), (r"\*\*([^*]+)\*\*", "strong")):
        escaped = re.sub(pattern, rf"<{tag}>\1</{tag}>", escaped)
    return Markup(escaped)


def image(file: Path) -> str:
    """A figure as a `data:` address."""
    return f"data:image/svg+xml;base64,{base64.b64encode(file.read_bytes()).decode()}"
