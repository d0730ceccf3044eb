"""The fields of a raw row and of its turns. A field that a format has no place for makes the row invalid."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from reprotune.data.raw_rows import InvalidRow

NAMES = {
    "conversation_id", "dialog_id", "dialogue_id", "doc_id", "example_id", "hash", "id", "idx", "index",
    "instruction_id", "licence", "license", "message_id", "message_tree_id", "parent_id", "prompt_id",
    "question_id", "response_id", "row_id", "sample_id", "thread_id", "tool_call_id", "uuid",
}  # fmt: skip
"""Keys that tell rows apart. They may always be left out."""

SHOWN_CHARACTERS = 60
"""Longest value that a message shows in full."""


class Fields:
    """The fields of a row, or of an object in it, which remembers what was read.

    Each function raises InvalidRow with what it found and what it expected.

    Args:
        ignore: keys that are left out, in the row and in its objects.
        name: of the object in its row, for messages.
        needed: keys that are not left out, for the object is nothing without them.
    """

    def __init__(
        self, values: Mapping[str, Any], ignore: Collection[str], name: str = "", needed: Collection[str] = ()
    ) -> None:
        self.values = {key: value for key, value in values.items() if key not in ignore or key in needed}
        self.ignore, self.name = ignore, name
        self.read: set[str] = set()
        self.objects: list[Fields] = []

    def get(self, key: str) -> Any:
        """The value; None where it is missing or blank."""
        self.read.add(key)
        value = self.values.get(key)
        return None if is_blank(value) else value

    def item(self, key: str) -> Any:
        self.read.add(key)
        if self.values.get(key) is None:
            present = ", ".join(name for name, value in self.values.items() if value is not None)
            raise InvalidRow(f"{self.label(key)} is missing; keys are {present or 'none'}")
        return self.values[key]

    def text(self, key: str) -> str:
        value = self.item(key)
        if not isinstance(value, str):
            raise InvalidRow(f"{self.label(key)} is {shown(value)}, expected a text")
        if not value.strip():
            raise InvalidRow(f"{self.label(key)} is empty")
        if "\0" in value:
            raise InvalidRow(f"{self.label(key)} holds a NUL character, expected text")
        return value

    def number(self, key: str) -> float:
        value = self.item(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise InvalidRow(f"{self.label(key)} is {shown(value)}, expected a number")
        return float(value)

    def items(self, key: str) -> list[Any]:
        value = self.item(key)
        if not isinstance(value, list):
            raise InvalidRow(f"{self.label(key)} is {shown(value)}, expected a list")
        if not value:
            raise InvalidRow(f"{self.label(key)} is empty")
        return value

    def object(self, value: Any, name: str, keys: tuple[str, str]) -> "Fields":
        """The fields of an object in the row, such as a turn; `keys` are those that it must have."""
        if not isinstance(value, Mapping):
            expected = f"expected an object with `{keys[0]}` and `{keys[1]}`"
            raise InvalidRow(f"{name} is {shown(value)}, {expected}")
        inner = Fields(value, self.ignore, name, keys)
        self.objects.append(inner)
        return inner

    def label(self, key: str) -> str:
        return f"`{key}` of {self.name}" if self.name else f"`{key}`"

    def close(self) -> None:
        """Raise InvalidRow for a value that nothing has read, and that may change what the row means."""
        if lost := self.lost():
            key, fields = next(iter(lost.items()))
            raise InvalidRow(
                f"{fields.label(key)} is {shown(fields.values[key])}, which this format has no place for; if "
                f"the row means the same without, `ignore: [{', '.join(lost)}]` in its source leaves it out"
            )

    def lost(self) -> dict[str, "Fields"]:
        """The keys that nothing has read, here and in the row's objects, each with the first that has it."""
        found = {
            key: self
            for key, value in self.values.items()
            if not (key in self.read or key in NAMES or key in self.ignore or is_blank(value))
        }
        for inner in self.objects:
            found = inner.lost() | found
        return found


def is_blank(value: Any) -> bool:
    """Whether a value says nothing. A column of a table gives a row without an object one of nulls."""
    if isinstance(value, Mapping):
        return all(map(is_blank, value.values()))
    if isinstance(value, list):
        return all(map(is_blank, value))
    return value is None or (isinstance(value, str) and not value.strip())


def from_json(value: Any, label: str) -> Any:
    """The value, read where it is JSON in a text, else without the keys that a table adds to its objects."""
    if not isinstance(value, str):
        return without_nulls(value)
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise InvalidRow(f"{label} is {shown(value)}, expected JSON ({error})") from error


def without_nulls(value: Any) -> Any:
    """Nested objects without null: a column of a table gives each of its objects the keys of all."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def shown(value: Any) -> str:
    """A value in a message, cut to a readable length."""
    written = repr(value)
    return written if len(written) <= SHOWN_CHARACTERS else f"{written[: SHOWN_CHARACTERS - 3]}..."
