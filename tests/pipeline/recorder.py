"""Records the keys of params.yaml that code reads."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from reprotune import params_file
from reprotune.params import Section


def children(value: Any) -> dict[str, Any]:
    """What stands below a section, or below a table of sections; nothing below a value."""
    if isinstance(value, Section):
        return vars(value)
    tables = isinstance(value, dict) and any(isinstance(item, Section) for item in value.values())
    return value if tables else {}


@contextmanager
def recorded(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Yield the dotted keys that are read from the result of `params_file.load`, and from copies of it."""
    keys: set[str] = set()
    paths: dict[int, str] = {}
    # no section is freed, as another object could get its id
    kept: list[Any] = []
    get_attribute = Section.__getattribute__

    def remember(value: Any, path: str) -> None:
        if isinstance(value, Section):
            paths[id(value)] = path
            kept.append(value)
        for key, item in children(value).items():
            remember(item, f"{path}.{key}" if path else key)

    def leaves(value: Any, path: str) -> Iterator[str]:
        for key, item in children(value).items():
            yield from leaves(item, f"{path}.{key}" if path else key)
        if not children(value):
            yield path

    def read(self: Section, name: str) -> Any:
        value = get_attribute(self, name)
        if id(self) in paths and name in type(self).model_fields:
            path = ".".join(filter(None, [paths[id(self)], name]))
            if not children(value):
                keys.add(path)
        return value

    def dump(
        self: Section,
        *,
        include: Any = None,
        exclude: Any = None,
        original: Any = Section.model_dump,
        **options: Any,
    ) -> Any:
        for name, value in vars(self).items() if id(self) in paths else ():
            path = ".".join(filter(None, [paths[id(self)], name]))
            left_out = (exclude.get(name, ()) if isinstance(exclude, dict) else ()) or ()
            if (include is None or name in include) and (not isinstance(exclude, set) or name not in exclude):
                nested = tuple(f"{path}.{part}" for part in left_out)
                keys.update(key for key in leaves(value, path) if not key.startswith(nested or ("\n",)))
        return original(self, include=include, exclude=exclude, **options)

    def copy(self: Section, *, original: Any = Section.model_copy, **options: Any) -> Any:
        section = original(self, **options)
        if id(self) in paths:
            remember(section, paths[id(self)])
        return section

    def load(*arguments: Any, original: Any = params_file.load, **options: Any) -> Any:
        settings = original(*arguments, **options)
        remember(settings, "")
        keys.clear()
        return settings

    with monkeypatch.context() as patch:
        patch.setattr(Section, "__getattribute__", read)
        patch.setattr(Section, "model_dump", dump)
        patch.setattr(Section, "model_copy", copy)
        patch.setattr(params_file, "load", load)
        yield keys
