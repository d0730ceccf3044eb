"""What a base is called elsewhere, for the adapters on it: its repository on the Hub, if it has one."""

from pathlib import Path

from reprotune.params import HubSource, Source
from reprotune.records import read_json, write_json

FILE = "source.json"
"""In the base's folder; none for a base that has no name elsewhere."""


def write(source: Source, folder: Path) -> None:
    if isinstance(source, HubSource):
        write_json(folder / FILE, {"repo": source.repo, "revision": source.revision})


def in_adapter_config(base: Path) -> dict[str, str]:
    """The entries of adapter_config.json that name the base: its repository, or else its folder here."""
    if not (base / FILE).exists():
        return {"base_model_name_or_path": str(base)}
    source = read_json(base / FILE)
    return {"base_model_name_or_path": source["repo"], "revision": source["revision"]}
