"""The fields of a raw row and of its turns. A field that a format has no place for makes the row invalid."""

import json
import math
from collections.abc import Collection, Mapping
from typing import Any

from reprotune.data.conversations import Tool, Turn
from reprotune.data.raw_rows import InvalidRow

ROLES = {
    "system": "system",
    "developer": "system",
    "human": "user",
    "user": "user",
    "prompter": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
"""Role names in published data, and the chat template's name for each."""
CALL = "function_call"
"""The role of a turn whose text is a call, and the key of the one call that an older format allows."""
REASONING = ("reasoning_content", "reasoning", "thinking")
"""Keys of what an assistant thought before its answer."""
TRAINED: dict[str, dict[Any, bool]] = {"weight": {0: False, 1: True}, "train": {False: False, True: True}}
"""Keys that say whether a turn is trained on, and what their values mean."""
NAMES = {
    "id", "idx", "index", "uuid", "hash", "source", "dataset", "split", "url", "license", "licence",
}  # fmt: skip
"""Keys that say where a row comes from. Like those that end in `_id`, they may always be left out."""

SHOWN_CHARACTERS = 60
"""Longest value that a message shows in full."""


class Fields:
    """The fields of a row, or of an object in it, which remembers what was read.

    Each function raises InvalidRow with what it found and what it expected.

    Args:
        ignore: keys that are left out, in the row and in its objects.
        name: of the object in its row, for messages.
    """

    def __init__(self, values: Mapping[str, Any], ignore: Collection[str], name: str = "") -> None:
        self.values = {key: value for key, value in values.items() if key not in ignore}
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
        inner = Fields(value, self.ignore, name)
        self.objects.append(inner)
        return inner

    def turn(self, value: Any, name: str, role_key: str, content_key: str) -> Turn:
        return as_turn(self.object(value, name, (role_key, content_key)), role_key, content_key)

    def turns(self, key: str, role_key: str, content_key: str) -> list[Turn]:
        return [
            self.turn(value, f"turn {number}", role_key, content_key)
            for number, value in enumerate(self.items(key))
        ]

    def with_system(self, turns: list[Turn], key: str = "system") -> list[Turn]:
        """The turns, behind one of the system where the row has its text under a key of its own."""
        if self.get(key) is None:
            return turns
        if turns[0]["role"] == "system":
            raise InvalidRow(f"{self.label(key)} stands beside a system turn, expected one of them")
        return [{"role": "system", "content": self.text(key)}, *turns]

    def tools(self) -> list[Tool]:
        """The tools of a row: objects, or JSON of them."""
        value = self.get("tools")
        found = [] if value is None else from_json(value, "`tools`")
        # null, as JSON has it
        found = [] if found is None else found
        if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
            raise InvalidRow(f"`tools` is {shown(found)}, expected a list of objects")
        return found

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
            if not (key in self.read or key in NAMES or key.endswith("_id") or is_blank(value))
        }
        for inner in self.objects:
            found = inner.lost() | found
        return found


def is_blank(value: Any) -> bool:
    return value is None or value in ([], {}) or (isinstance(value, str) and not value.strip())


def as_turn(fields: Fields, role_key: str, content_key: str) -> Turn:
    """A turn from an object with its role and its text, and what else a turn may have."""
    name = fields.text(role_key)
    if name not in ROLES:
        found = f"{fields.label(role_key)} is {shown(name)}"
        raise InvalidRow(f"{found}, expected one of {', '.join(ROLES)}")
    role = ROLES[name]
    if role != "assistant":
        turn: Turn = {"role": role, "content": fields.text(content_key)}
        if role == "tool":
            given = {key: fields.get(key) for key in ("name", "tool_call_id")}
            turn |= {key: str(value) for key, value in given.items() if value is not None}
    elif name == CALL:
        turn = {
            "role": role,
            "content": "",
            "tool_calls": calls(fields.text(content_key), fields, content_key),
        }
    else:
        turn = {"role": role} | thoughts(fields) | called(fields)
        turn["content"] = (
            "" if "tool_calls" in turn and fields.get(content_key) is None else fields.text(content_key)
        )
    return turn | trained(fields, role)


def thoughts(fields: Fields) -> Turn:
    """{reasoning_content}, or nothing."""
    given = [key for key in REASONING if fields.get(key) is not None]
    if len({fields.text(key) for key in given}) > 1:
        raise InvalidRow(
            f"{fields.label(given[0])} and {fields.label(given[1])} differ, expected one of them"
        )
    if given and "</think>" in str(fields.values.get("content")):
        raise InvalidRow(
            f"{fields.label(given[0])} stands beside thoughts in `content`, expected one of them"
        )
    return {"reasoning_content": fields.text(given[0])} if given else {}


def called(fields: Fields) -> Turn:
    """{tool_calls}, or nothing."""
    for key in ("tool_calls", CALL):
        if (value := fields.get(key)) is not None:
            return {"tool_calls": calls(value, fields, key)}
    return {}


def calls(value: Any, fields: Fields, key: str) -> list[dict[str, Any]]:
    """Calls in OpenAI's form, [{type, function: {name, arguments}, id}], with arguments as an object.

    Some data have the arguments under `parameters`, as Llama 3 writes them, and name and arguments without
    `function` around them.
    """
    found = from_json(value, fields.label(key))
    return [call(one, fields, key) for one in (found if isinstance(found, list) else [found])]


def call(value: Any, fields: Fields, key: str) -> dict[str, Any]:
    outer = fields.object(value, f"a call in {fields.label(key)}", ("name", "arguments"))
    inner = outer
    if (function := outer.get("function")) is not None:
        inner = outer.object(function, outer.name, ("name", "arguments"))
    given = [name for name in ("arguments", "parameters") if inner.get(name) not in (None, "")]
    if len(given) > 1:
        raise InvalidRow(f"{inner.name} has `arguments` and `parameters`, expected one of them")
    arguments = inner.item(given[0]) if given else {}
    if isinstance(arguments, str):
        arguments = from_json(arguments, inner.label(given[0]))
    if not isinstance(arguments, dict):
        raise InvalidRow(f"{inner.label(given[0])} is {shown(arguments)}, expected an object")
    if outer.get("type") not in (None, "function"):
        raise InvalidRow(f"{outer.label('type')} is {shown(outer.get('type'))}, expected function")
    identity = {} if outer.get("id") is None else {"id": str(outer.get("id"))}
    return {"type": "function", "function": {"name": inner.text("name"), "arguments": arguments}} | identity


def trained(fields: Fields, role: str) -> Turn:
    """{train: False} for a turn that says so, or nothing."""
    given = {}
    for key, meanings in TRAINED.items():
        if (value := fields.get(key)) is not None:
            if isinstance(value, list | dict) or value not in meanings:
                expected = " or ".join(map(str, meanings))
                raise InvalidRow(f"{fields.label(key)} is {shown(value)}, expected {expected}")
            given[key] = meanings[value]
    if len(set(given.values())) > 1:
        raise InvalidRow(f"{fields.label('weight')} and {fields.label('train')} contradict each other")
    if role != "assistant" and True in given.values():
        raise InvalidRow(
            f"{fields.label(next(iter(given)))} asks to train on the {role}'s turn, expected an assistant's"
        )
    return {"train": False} if False in given.values() and role == "assistant" else {}


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
