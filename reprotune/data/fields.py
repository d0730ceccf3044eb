"""The fields of a raw row; each function raises InvalidRow with what it found and what it expected."""

from collections.abc import Mapping
from typing import Any

from reprotune.data.conversations import Turn
from reprotune.data.raw_rows import InvalidRow, Row

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
"""Role names in published data, and the chat template's name for each."""

SHOWN_CHARACTERS = 60
"""Longest value that a message shows in full."""


def item(row: Row, key: str) -> Any:
    if row.get(key) is None:
        present = ", ".join(name for name, value in row.items() if value is not None)
        raise InvalidRow(f"`{key}` is missing; keys are {present or 'none'}")
    return row[key]


def text(row: Row, key: str) -> str:
    value = item(row, key)
    if not isinstance(value, str):
        raise InvalidRow(f"`{key}` is {shown(value)}, expected a text")
    if not value.strip():
        raise InvalidRow(f"`{key}` is empty")
    if "\0" in value:
        raise InvalidRow(f"`{key}` holds a NUL character, expected text")
    return value


def number(row: Row, key: str) -> float:
    value = item(row, key)
    is_nan = value != value
    if isinstance(value, bool) or not isinstance(value, int | float) or is_nan:
        raise InvalidRow(f"`{key}` is {shown(value)}, expected a number")
    return float(value)


def items(row: Row, key: str) -> list[Any]:
    value = item(row, key)
    if not isinstance(value, list):
        raise InvalidRow(f"`{key}` is {shown(value)}, expected a list")
    if not value:
        raise InvalidRow(f"`{key}` is empty")
    return value


def blank(row: Row, key: str) -> bool:
    value = row.get(key)
    return value is None or (isinstance(value, str) and not value.strip())


def without(row: Row, *keys: str) -> None:
    """Refuse a row with content under these keys: the format has no place for it, so it would be lost."""
    for key in keys:
        if not blank(row, key) and row[key] != []:
            raise InvalidRow(
                f"`{key}` is {shown(row[key])}, which this format has no place for; "
                "make it turns of `messages`"
            )


def turn(value: Any, role_key: str, content_key: str) -> Turn:
    if not isinstance(value, Mapping):
        raise InvalidRow(
            f"a turn is {shown(value)}, expected an object with `{role_key}` and `{content_key}`"
        )
    role = text(value, role_key)
    if role not in ROLES:
        raise InvalidRow(f"`{role_key}` is {shown(role)}, expected one of {', '.join(ROLES)}")
    return {"role": ROLES[role], "content": text(value, content_key)}


def assistant(row: Row, key: str) -> Turn:
    return {"role": "assistant", "content": text(row, key)}


def scored_completion(value: Any) -> tuple[float, Turn]:
    if not isinstance(value, Mapping):
        raise InvalidRow(
            f"a completion is {shown(value)}, expected an object with `response` and `overall_score`"
        )
    return number(value, "overall_score"), assistant(value, "response")


def shown(value: Any) -> str:
    """A value in a message, cut to a readable length."""
    written = repr(value)
    return written if len(written) <= SHOWN_CHARACTERS else f"{written[: SHOWN_CHARACTERS - 3]}..."
