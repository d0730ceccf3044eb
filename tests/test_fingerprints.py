"""A fingerprint follows the meaning of code: it is the same on every Python and in every formatting."""

import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from reprotune import fingerprints
from tests.tiny import ROOT

MODULE = ROOT / "reprotune" / "fingerprints.py"
CODE = """
@decorated(1, name=2)
def function(value, /, *more, key=f"{value!r:>{width}} a" "b" f"{value:}{{}}" 'c', text=u"u", **rest):
    return f"{value=}", f"{value:%Y-{key}}", f"", f"a" "b", rb"\\x00", 1_000, 0xFF, 1e-5, ...

async def waiting():
    async with first as one, second: await one
    match one:
        case {"a": 1, **others}: yield
        case [1, *_] | None if others: pass
try: pass
except* ValueError: pass
number: int = 1; soft_hyphen = "\\u00ad\\U0001fae8"
"""
TYPES = """
def identity[T](value: T) -> T: return value
type Pairs[K, V] = list[tuple[K, V]]
class Box[T: int]: pass
"""
SCRIPT = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location("fingerprints", {str(MODULE)!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.of_source(sys.stdin.buffer.read()))
"""


def of(code: str) -> str:
    return fingerprints.of_source(textwrap.dedent(code).encode())


def pythons() -> list[Path]:
    """The supported Pythons on this machine, from pyenv and on the path: one per minor version."""
    working = {}
    for minor in (11, 12, 13, 14):
        places = [
            *Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"),
            shutil.which(f"python3.{minor}"),
        ]
        for place in filter(None, places):
            if subprocess.run([place, "-c", ""], capture_output=True).returncode == 0:
                working[minor] = Path(place)
    return list(working.values())


def on(python: Path, code: str) -> str:
    return subprocess.run(
        [python, "-c", SCRIPT], input=code, text=True, capture_output=True, check=True
    ).stdout.strip()


def test_every_python_gives_the_same():
    others = [python for python in pythons() if python.resolve() != Path(sys.executable).resolve()]
    if not others:
        pytest.skip("no other Python here")
    for code in (CODE, *(file.read_text() for file in sorted((ROOT / "reprotune").rglob("*.py"))[::8])):
        assert {on(python, code) for python in others} == {of(code)}


def test_newer_pythons_agree_on_type_parameters():
    newer = [python for python in pythons() if on_or_none(python, TYPES)]
    if len(newer) < 2:
        pytest.skip("fewer than two Pythons from 3.12 on here")
    assert len({on(python, TYPES) for python in newer}) == 1
    assert on(newer[0], TYPES) != on(newer[0], TYPES.replace("T: int", "T: str"))


def on_or_none(python: Path, code: str) -> str | None:
    result = subprocess.run([python, "-c", SCRIPT], input=code, text=True, capture_output=True)
    return result.stdout if result.returncode == 0 else None


FUNCTION = """
def doubled(value: int) -> int:
    return 2 * value
"""


@pytest.mark.parametrize(
    "other",
    [
        '"""A module."""\n' + FUNCTION,
        FUNCTION + "# a comment\n",
        FUNCTION.replace("    return", '    """Twice as much."""\n    return'),
        FUNCTION.replace("    return", "    pass\n    return"),
        FUNCTION.replace("2 * value", "(2\n        * value)"),
        FUNCTION.replace("(value: int)", "(\n    value: int,\n)"),
    ],
    ids=["module docstring", "comment", "docstring", "pass", "line break", "trailing comma"],
)
def test_what_changes_nothing_changes_no_fingerprint(other):
    assert of(other) == of(FUNCTION)


@pytest.mark.parametrize(
    "other",
    [
        FUNCTION.replace("2", "3"),
        FUNCTION.replace("2", "2.0"),
        FUNCTION.replace("2", "True"),
        FUNCTION.replace("2 * value", "value * 2"),
        FUNCTION.replace("value: int)", "value: int = 1)"),
        FUNCTION.replace("value", "number"),
        "@cache" + FUNCTION,
        FUNCTION + FUNCTION,
    ],
)
def test_what_changes_something_changes_it(other):
    assert of(other) != of(FUNCTION)


def test_texts_are_compared_by_their_characters():
    assert of("a = 'x' 'y'") == of('a = "xy"') != of("a = b'xy'")
    assert of('a = f"{b}" "c"') == of("a = f'{b}c'") != of('a = f"{b}d"')
    assert of('a = f"{b:}"') == of('a = f"{b}"') != of('a = f"{b!r}"')


def test_a_stage_reaches_what_it_imports_and_nothing_else():
    reached = fingerprints.reached(ROOT, ["stages.report"])
    expected = {"stages", "reprotune", "reprotune.report.figures", "reprotune.comparison.wording"}
    assert expected <= reached.keys()
    assert not [name for name in reached if name.startswith(("reprotune.training", "reprotune.evaluation"))]
    assert not [name for name in fingerprints.reached(ROOT, ["stages.sft"]) if "evaluation" in name]
    assert "matplotlib" in fingerprints.versions(ROOT, "report")
    assert "trl" in fingerprints.versions(ROOT, "sft")
    assert not {"trl", "matplotlib"} & fingerprints.versions(ROOT, "evaluate").keys()


def test_the_libraries_are_those_that_are_installed():
    from importlib.metadata import version

    pinned = fingerprints.locked_versions(ROOT / "requirements.lock")
    for library in fingerprints.LIBRARIES:
        assert version(library).split("+")[0] == pinned[library], library


def test_loaded_code_has_the_hash_of_its_meaning():
    loaded = fingerprints.of_loaded()
    assert loaded["reprotune/fingerprints.py"] == fingerprints.of_source(MODULE.read_bytes())
    assert not [file for file in loaded if file.startswith("tests")]
