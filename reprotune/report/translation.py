"""The texts of the report, its figures and the model card in the language of `report.language`.

The English text stands in the code and is the key of its translation in `templates/report/<language>.yaml`.
"""

from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from reprotune.errors import InputError

translations: dict[str, str] = {}
"""Into the language in use; empty for English."""


def use(language: str, folder: Path) -> None:
    """Set the language of all following `say`."""
    translations.clear()
    if language != "en":
        translations.update(YAML(typ="safe").load(folder / f"{language}.yaml"))


def say(text: str, **values: Any) -> str:
    """A text in the language in use, with its fields filled in as by `str.format`.

    Raises:
        InputError: it has no translation.
    """
    if translations and text not in translations:
        raise InputError(f"templates/report: found no translation of {text!r}; add it")
    return translations.get(text, text).format(**values)


def listed(words: list[str]) -> str:
    return say(", ").join(words)


def sentences(texts: list[str]) -> str:
    return say(" ").join(texts)
