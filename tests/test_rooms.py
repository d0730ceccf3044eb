"""Imports between the rooms of `reprotune/` go one way and make no cycle, and stages stay thin."""

from pathlib import Path

import pytest

from reprotune import fingerprints
from tests.tiny import ROOT

GROUND = "ground"
ALLOWED = {
    GROUND: set(),
    "compat": set(),
    "data": {GROUND, "compat"},
    "model": {GROUND, "compat", "data"},
    "training": {GROUND, "compat", "data", "model"},
    "evaluation": {GROUND, "compat", "data", "model", "training"},
    "comparison": {GROUND},
    "report": {GROUND, "comparison"},
    "planning": {GROUND, "compat", "data", "model", "training", "evaluation", "comparison"},
    "pipeline": {GROUND, "data", "training"},
    "cli": {GROUND, "evaluation", "comparison", "planning", "pipeline"},
}
"""The rooms that each room may import from. `ground`: the modules directly in `reprotune/`."""


def room(module: str) -> str:
    part = module.split(".")[1] if "." in module else GROUND
    return "cli" if part == "__main__" else part if part in ALLOWED else GROUND


def modules(package: str) -> dict[str, Path]:
    files = (ROOT / package).rglob("*.py")
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in files}
    return {name.removesuffix(".__init__"): file for name, file in names.items()}


LIBRARY = modules("reprotune")


def imported(module: str) -> set[str]:
    """The modules of the library that a module imports; `from reprotune.data import hub` imports hub."""
    names = {name for name in fingerprints.imports(ROOT, module) if name in LIBRARY and name != module}
    return {name for name in names if not any(longer.startswith(f"{name}.") for longer in names)}


def test_every_room_says_what_lives_in_it():
    rooms = {folder.name for folder in (ROOT / "reprotune").iterdir() if (folder / "__init__.py").exists()}
    assert rooms == ALLOWED.keys() - {GROUND, "cli"}
    for name in rooms:
        text = (ROOT / "reprotune" / name / "__init__.py").read_text()
        assert text.startswith('"""') and text.rstrip().endswith('"""') and len(text) > 60, name


@pytest.mark.parametrize("module", LIBRARY)
def test_imports_go_down(module):
    for name in imported(module):
        assert room(name) == room(module) or room(name) in ALLOWED[room(module)], f"{module} imports {name}"


def test_rooms_and_modules_make_no_circle():
    """A module on a cycle reaches itself."""
    for module in LIBRARY:
        waiting, seen = list(imported(module)), set()
        while waiting:
            name = waiting.pop()
            assert name != module, f"{module} imports itself through others"
            if name not in seen:
                seen.add(name)
                waiting += imported(name)
    order = list(ALLOWED)
    assert all(
        order.index(below) < order.index(name) for name, allowed in ALLOWED.items() for below in allowed
    )


def test_stages_take_their_guard_from_the_pipeline_room_and_nothing_else():
    """The room `pipeline` is in no fingerprint, so its code must change no result."""
    for module in modules("stages"):
        taken = {
            name for name in fingerprints.imports(ROOT, module) if name.startswith(fingerprints.UNCOUNTED)
        }
        assert taken <= {"reprotune.pipeline.guard", "reprotune.pipeline.guard.stage"}, module


def test_stages_are_short_and_import_no_stage():
    for module, file in modules("stages").items():
        assert len(file.read_text().splitlines()) <= 60, file
        assert not [name for name in fingerprints.imports(ROOT, module) if name.startswith("stages")], file


def test_what_stages_reach_is_imported_at_their_start():
    """A module imported later could differ from the one whose fingerprint was checked."""
    reached = fingerprints.reached(ROOT, (name for name in modules("stages") if "." in name))
    for name, file in reached.items():
        late = [
            line
            for line in file.read_text().splitlines()
            if line.startswith("  ") and "import reprotune" in line
        ]
        late += [line for line in file.read_text().splitlines() if line.startswith("        from reprotune")]
        assert not late, f"{name}: {late}"


def test_tests_mirror_the_rooms():
    for folder in (ROOT / "tests").iterdir():
        if folder.is_dir() and folder.name != "__pycache__":
            assert folder.name in {*ALLOWED, "docs"}, folder
