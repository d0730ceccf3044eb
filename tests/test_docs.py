"""Every command in docs/ is run in a finished clone of the tiny run, page by page, but for those that are marked as needing a GPU."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.clones import ENVIRONMENT, own_copy
from tests.tiny import ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^```(.*)\n((?:.*\n)*?)^```$", re.MULTILINE)
KINDS = {"sh", "sh long", "sh gpu", "yaml", "python", "text"}


def commands(page: Path, kinds: set[str]) -> str:
    blocks = [(kind, text) for kind, text in BLOCK.findall(page.read_text()) if kind in kinds]
    return "".join(f"python - <<'END OF BLOCK'\n{text}END OF BLOCK\n" if kind == "python" else text for kind, text in blocks)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_are_marked(page):
    """So that none is left out by mistake."""
    found = BLOCK.findall(page.read_text())
    assert {kind for kind, _ in found} <= KINDS, page
    assert not re.search(r"(?m)^    (python|dvc|git|make) ", BLOCK.sub("", page.read_text())), "a command outside of a block"
    assert page.read_text().count("\n```") == 2 * len(found)


QUICK, WHOLE = {"sh", "python"}, {"sh", "python", "sh long"}
RUNS = [pytest.param(page, QUICK, id=page.name) for page in PAGES if commands(page, QUICK)]
RUNS += [pytest.param(page, WHOLE, id=f"{page.name}, whole", marks=pytest.mark.soak) for page in PAGES if commands(page, {"sh long"})]


@pytest.mark.parametrize(("page", "kinds"), RUNS)
def test_commands_run(page, kinds, finished, tmp_path):
    folder = own_copy(finished, tmp_path / "clone")
    # which the commands of a user find there
    (folder / ".venv").mkdir()
    (folder / "script.sh").write_text("set -euo pipefail\nset -x\n" + commands(page, kinds))
    result = subprocess.run(["bash", "script.sh"], cwd=folder, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=1500)
    assert result.returncode == 0, result.stdout[-4000:]
    shutil.rmtree(folder)
