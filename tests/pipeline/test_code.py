"""Which stages a change of code makes stale, with real DVC: its meaning counts, not its form."""

import re

import pytest
from dvc.repo import Repo

from tests.clones import DVC, call, own_copy

CELLS = {
    f"evaluate@{model}-{benchmark}"
    for model in ("base", "sft", "dpo")
    for benchmark in ("arc_challenge", "gsm8k")
}
TRAINING = {"sft", "reference", "dpo"}


@pytest.fixture(scope="module")
def clone(finished, tmp_path_factory):
    return own_copy(finished, tmp_path_factory.mktemp("code") / "clone")


@pytest.fixture
def folder(clone, monkeypatch):
    monkeypatch.chdir(clone)
    yield clone
    call("git", "checkout", "-q", "--", ".", cwd=clone)
    call("git", "clean", "-qfd", cwd=clone)


def ran(printed: str) -> list[str]:
    return re.findall(r"^Running stage '(\S+)':", printed, re.MULTILINE)


def test_what_means_the_same_reruns_nothing_but_its_fingerprint(folder):
    """A comment, a docstring, other formatting and a module that no stage imports, all at once."""
    room = folder / "reprotune" / "data"
    file = room / "selection.py"
    text = file.read_text()
    assert "def draw(" in text
    file.write_text("# a comment\n" + text.replace("def draw(", "def draw(\n", 1) + "\n\n\n# the end\n")
    (room / "duplicates.py").write_text('"""Another docstring."""\n' + (room / "duplicates.py").read_text())
    (room / "unused.py").write_text("NOTHING = 1\n")
    printed = call(*DVC, "repro", cwd=folder).stdout
    assert ran(printed) == ["code"]
    assert call("git", "status", "--porcelain", "--", "code.yaml", cwd=folder).stdout == ""
    assert "up to date" in call(*DVC, "repro", cwd=folder).stdout


def stale(folder, file: str, old: str, new: str) -> set[str]:
    """The stages that DVC finds stale after a change of `file`, once the stage `code` has run."""
    path = folder / file
    text = path.read_text()
    assert re.search(old, text), old
    path.write_text(re.sub(old, new, text, count=1))
    assert ran(call(*DVC, "repro", "code", cwd=folder).stdout) == ["code"]
    with Repo(str(folder)) as repo:
        return set(repo.status())


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        ("reprotune/data/selection.py", {"tokenize_sft", "tokenize_dpo"}),
        ("reprotune/data/packing.py", {"tokenize_sft"}),
        ("reprotune/training/dpo.py", {"dpo"}),
        ("reprotune/training/pairs.py", {"reference", "dpo"}),
        ("reprotune/evaluation/batching.py", CELLS),
        ("reprotune/evaluation/sandbox.py", {"check_params", *CELLS}),
        ("reprotune/comparison/compare.py", {"compare"}),
        ("reprotune/report/figures.py", {"report"}),
        ("stages/merge.py", {"merge"}),
        ("reprotune/planning/needs.py", set()),
        ("reprotune/pipeline/guard.py", set()),
        ("reprotune/cli.py", set()),
    ],
)
def test_a_changed_function_makes_the_stages_stale_that_reach_it(file, expected, folder):
    assert stale(folder, file, r"\Z", "\n\ndef added() -> None:\n    print()\n") == expected


def test_a_changed_version_of_a_library_makes_the_stages_stale_that_import_it(folder):
    """The report prints versions, so requirements.lock is one of its deps."""
    stages = stale(folder, "requirements.lock", r"(?m)^trl==.*$", "trl==9.9.9")
    assert stages == {"fetch_model", "tokenize_sft", *TRAINING, "report"}
    assert not stages & CELLS


def test_a_version_that_no_result_depends_on_makes_nothing_stale_but_the_report(folder):
    assert stale(folder, "requirements.lock", r"(?m)^tqdm==.*$", "tqdm==9.9.9") == {"report"}


@pytest.mark.slow
def test_a_changed_function_reruns_its_stage_and_nothing_else(folder):
    """If its outs keep their bytes, no later stage runs; the same holds for experiments and single stages."""
    file = folder / "reprotune" / "report" / "translation.py"
    file.write_text(file.read_text() + "\n\ndef added() -> None:\n    print()\n")
    assert ran(call(*DVC, "repro", cwd=folder).stdout) == ["code", "report"]
    file.write_text(file.read_text() + "\n\ndef added_too() -> None:\n    print()\n")
    printed = call(*DVC, "exp", "run", "--temp", "--name", "temporary", cwd=folder).stdout
    assert ran(printed) == ["code", "report"], printed
    file = folder / "reprotune" / "comparison" / "wording.py"
    file.write_text(file.read_text() + "\n\ndef added() -> None:\n    print()\n")
    call(*DVC, "repro", "--single-item", "code", cwd=folder)
    assert ran(call(*DVC, "repro", "--single-item", "compare", cwd=folder).stdout) == ["compare"]
