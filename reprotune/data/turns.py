"""The turns of a raw row, with their calls, their thoughts and whether they are trained on."""

from typing import Any

from reprotune.data.conversations import Tool, Turn
from reprotune.data.fields import Fields, from_json, shown
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


def all_turns(row: Fields, key: str, role_key: str, content_key: str) -> list[Turn]:
    """The turns of a list in the row."""
    return [
        turn(row, value, f"turn {number}", role_key, content_key)
        for number, value in enumerate(row.items(key))
    ]


def with_system(row: Fields, turns: list[Turn], key: str = "system") -> list[Turn]:
    """The turns, behind one of the system where the row has its text under a key of its own."""
    if row.get(key) is None:
        return turns
    if turns and turns[0]["role"] == "system":
        raise InvalidRow(f"{row.label(key)} stands beside a system turn, expected one of them")
    return [{"role": "system", "content": row.text(key)}, *turns]


def tools(row: Fields) -> list[Tool]:
    """The tools of a row: objects, or JSON of them."""
    value = row.get("tools")
    found = [] if value is None else from_json(value, "`tools`")
    # null, as JSON has it
    found = [] if found is None else found
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise InvalidRow(f"`tools` is {shown(found)}, expected a list of objects")
    return found


def turn(row: Fields, value: Any, where: str, role_key: str, content_key: str) -> Turn:
    """A turn from an object with its role and its text, and what else a turn may have.

    Args:
        where: the object in its row, for messages.
    """
    fields = row.object(value, where, (role_key, content_key))
    name = fields.text(role_key)
    if name not in ROLES:
        found = f"{fields.label(role_key)} is {shown(name)}"
        raise InvalidRow(f"{found}, expected one of {', '.join(ROLES)}")
    role = ROLES[name]
    if role != "assistant":
        made: Turn = {"role": role, "content": fields.text(content_key)}
        if role == "tool":
            given = {key: fields.get(key) for key in ("name", "tool_call_id")}
            made |= {key: str(value) for key, value in given.items() if value is not None}
    elif name == CALL:
        made = {
            "role": role,
            "content": "",
            "tool_calls": calls(fields.text(content_key), fields, content_key),
        }
    else:
        made = {"role": role} | thoughts(fields, content_key) | called(fields)
        made["content"] = (
            "" if "tool_calls" in made and fields.get(content_key) is None else fields.text(content_key)
        )
    return made | trained(fields, role)


def thoughts(fields: Fields, content_key: str) -> Turn:
    """{reasoning_content}, or nothing."""
    given = [key for key in REASONING if fields.get(key) is not None]
    if len({fields.text(key) for key in given}) > 1:
        raise InvalidRow(
            f"{fields.label(given[0])} and {fields.label(given[1])} differ, expected one of them"
        )
    if given and "</think>" in str(fields.values.get(content_key)):
        raise InvalidRow(
            f"{fields.label(given[0])} stands beside thoughts in `{content_key}`, expected one of them"
        )
    return {"reasoning_content": fields.text(given[0])} if given else {}


def called(fields: Fields) -> Turn:
    """{tool_calls}, or nothing."""
    for key in ("tool_calls", CALL):
        if (value := fields.get(key)) is not None and (found := calls(value, fields, key)):
            return {"tool_calls": found}
    return {}


def calls(value: Any, fields: Fields, key: str) -> list[dict[str, Any]]:
    """Calls in OpenAI's form, [{type, function: {name, arguments}, id}], with arguments as an object.

    Some data have the arguments under `parameters`, as Llama 3 writes them, and name and arguments without
    `function` around them.
    """
    found = from_json(value, fields.label(key))
    # null, as JSON has it
    found = [] if found is None else found
    return [call(one, fields, key) for one in (found if isinstance(found, list) else [found])]


def call(value: Any, fields: Fields, key: str) -> dict[str, Any]:
    outer = fields.object(value, f"a call in {fields.label(key)}", ("name", "arguments"))
    inner = outer
    if (function := outer.get("function")) is not None:
        inner = outer.object(function, outer.name, ("name", "arguments"))
    inner.read |= {"arguments", "parameters"}
    # arguments that are all null are some
    given = [name for name in ("arguments", "parameters") if inner.values.get(name) not in (None, "", {})]
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
