"""The commands in docs/ run in a finished clone of the tiny run, except those that need a GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clones import ENVIRONMENT, own_copy
from tests.tiny import ROOT

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
KINDS = {"sh", "sh long", "sh gpu", "yaml", "python", "text"}
QUICK, WHOLE = {"sh", "python"}, {"sh", "python", "sh long"}
# with the code of the current folder, wherever the command is installed from
REPROTUNE = 'reprotune() { python -m reprotune "$@"; }\n'


def name_of(page: Path) -> str:
    return page.relative_to(DOCS).as_posix()


def commands(page: Path, kinds: set[str]) -> str:
    blocks = [(kind, text) for kind, text in BLOCK.findall(page.read_text()) if kind in kinds]
    return "".join(
        f"python - <<'END OF BLOCK'\n{text}END OF BLOCK\n" if kind == "python" else text
        for kind, text in blocks
    )


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_blocks_are_marked(page):
    """So that none is left out by mistake."""
    text = page.read_text()
    blocks = BLOCK.findall(text)
    assert {kind for kind, _ in blocks} <= KINDS, page
    assert not re.search(r"(?m)^    (python|dvc|git|make|reprotune) ", BLOCK.sub("", text)), (
        "a command outside of a block"
    )
    assert text.count("\n```") == 2 * len(blocks)


RUNS = [
    pytest.param(page, QUICK, id=name_of(page), marks=pytest.mark.slow)
    for page in PAGES
    if commands(page, QUICK)
]
RUNS += [
    pytest.param(page, WHOLE, id=f"{name_of(page)}, whole", marks=pytest.mark.soak)
    for page in PAGES
    if commands(page, {"sh long"})
]


@pytest.mark.parametrize(("page", "kinds"), RUNS)
def test_commands_run(page, kinds, finished, tmp_path):
    folder = own_copy(finished, tmp_path / "clone")
    (folder / ".venv" / "bin").mkdir(parents=True)
    # the environment is active already
    (folder / ".venv" / "bin" / "activate").touch()
    script = f"set -euo pipefail\nset -x\n{REPROTUNE}{commands(page, kinds)}"
    (folder / "script.sh").write_text(script)
    result = subprocess.run(
        ["bash", "script.sh"],
        cwd=folder,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=1500,
    )
    assert result.returncode == 0, result.stdout[-4000:]
    shutil.rmtree(folder)
