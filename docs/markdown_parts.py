"""Parts of a Markdown page."""

from collections.abc import Iterable


def code(text: object) -> str:
    return f"`{text}`"


def choices(texts: Iterable[str]) -> str:
    """`a`, `b` or `c`."""
    *first, last = map(code, texts)
    return f"{', '.join(first)} or {last}" if first else last


def table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "".join(f"| {' | '.join(map(escaped, line))} |\n" for line in lines)


def escaped(cell: str) -> str:
    return cell.replace("|", r"\|")
