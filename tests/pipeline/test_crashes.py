"""After SIGKILL or a full disk nothing is left behind, and the next `dvc repro` gives the right dvc.lock."""

import random
import shutil
import subprocess
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.clones import DVC, ENVIRONMENT, call, own_copy, small_disk

OUTS = ("data", "models", "evals")


def without_results(finished: Path, folder: Path) -> Path:
    """A clone of a finished run without outs, cache and dvc.lock."""
    call("git", "clone", "-q", str(finished), str(folder), cwd=finished)
    shutil.copytree(finished / "tiny", folder / "tiny", dirs_exist_ok=True)
    forget(folder)
    return folder


def forget(folder: Path) -> None:
    for name in (*OUTS, ".dvc/cache", ".dvc/tmp"):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / "dvc.lock").unlink(missing_ok=True)


def killed(folder: Path, after: float, stage: bool) -> tuple[int, str] | None:
    """Start `dvc repro` and kill it, or the stage that it runs, after `after` seconds.

    Returns None, or the exit status and the output if it ended before.
    """
    with (folder / ".dvc" / "printed").open("w") as log:
        process = subprocess.Popen(
            [*DVC, "repro"],
            cwd=folder,
            env=ENVIRONMENT | {"REPROTUNE_CHECKPOINT_SECONDS": "0"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        return process.wait(after), (folder / ".dvc" / "printed").read_text()
    except subprocess.TimeoutExpired:
        pass
    children = psutil.Process(process.pid).children(recursive=True)
    if stage and (victim := running(children)):
        victim.kill()
        try:
            assert process.wait(120) != 0, "dvc sees that its stage was killed"
        except subprocess.TimeoutExpired:
            # the stage had just ended, and dvc went on
            process.kill()
            process.wait()
    else:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(children, timeout=120)
    assert not left, [child.cmdline() for child in left]
    return None


def running(children: list[psutil.Process]) -> psutil.Process | None:
    """The stage among the child processes of dvc."""
    for child in children:
        with suppress(psutil.Error):
            if "-m" in child.cmdline():
                return child
    return None


def check_nothing_is_left(folder: Path) -> None:
    """No untracked file that `git add -A` would add, and no process that runs in the folder."""
    status = call("git", "status", "--porcelain", "--untracked-files=all", cwd=folder).stdout.splitlines()
    untracked = [line[3:] for line in status if line.startswith("??") and line[3:] != ".dvc/printed"]
    assert not untracked
    owned = [
        process.info
        for process in psutil.process_iter(["cwd", "cmdline"])
        if process.info["cwd"] == str(folder)
    ]
    assert not owned


@pytest.mark.slow
@pytest.mark.parametrize("kills", [2, pytest.param(100, marks=pytest.mark.soak)])
def test_kills_end_in_the_right_lock(kills, finished, tmp_path):
    """Kills hit random moments of the whole run; a run that ends before its kill starts over."""
    folder, rng = without_results(finished, tmp_path / "clone"), random.Random(kills)
    expected = (finished / "dvc.lock").read_text()
    count = ended = halves = 0
    while count < kills:
        result = killed(folder, rng.uniform(2, 20), rng.random() < 0.5)
        check_nothing_is_left(folder)
        if result is None:
            count += 1
            continue
        status, printed = result
        if status == 0:
            assert (folder / "dvc.lock").read_text() == expected
            ended += 1
            forget(folder)
        else:
            # half a lock that is not YAML: see the test below
            assert "dvc.lock" in printed and "Running stage" not in printed, printed[-3000:]
            halves += 1
            call("git", "checkout", "-q", "dvc.lock", cwd=folder)
    printed = call(*DVC, "repro", cwd=folder).stdout
    assert (folder / "dvc.lock").read_text() == expected, printed[-3000:]
    check_nothing_is_left(folder)
    assert not list((folder / ".dvc" / "tmp" / "checkpoints").rglob("checkpoint-*"))
    print(f"{count} kills, {ended} runs that ended before their kill, {halves} half-written locks")


@pytest.mark.parametrize("end", ["\n  dpo:", "\n      md5"])
def test_half_a_lock_is_told_or_made_whole(end, finished, tmp_path):
    """DVC writes dvc.lock in place, so a kill in that moment leaves half of it.

    If the half is YAML, the lost entries come from the run cache; if not, git has the last lock.
    """
    folder = own_copy(finished, tmp_path / "clone")
    content = (folder / "dvc.lock").read_text()
    (folder / "dvc.lock").write_text(content[: content.rindex(end) + len(end)])
    result = call(*DVC, "repro", cwd=folder, check=False)
    assert "Traceback" not in result.stdout
    if result.returncode:
        assert "dvc.lock" in result.stdout, result.stdout
        call("git", "checkout", "-q", "dvc.lock", cwd=folder)
        assert "up to date" in call(*DVC, "repro", cwd=folder).stdout
    assert (folder / "dvc.lock").read_text() == content


@pytest.fixture
def disk(tmp_path):
    with small_disk(tmp_path / "disk", 64):
        yield tmp_path / "disk"


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "moment"), [("sft", "'loss'"), ("evaluate@sft-gsm8k", "> python")])
def test_a_full_disk_ends_in_one_message_and_nothing_is_lost(stage, moment, finished, disk):
    """The disk is filled once the stage has printed `moment`."""
    folder = own_copy(finished, disk / "clone")
    lock, filler = (folder / "dvc.lock").read_text(), disk / "filler"
    command = [*DVC, "repro", "--force", "--no-run-cache", "--single-item", stage]
    environment = ENVIRONMENT | {"REPROTUNE_CHECKPOINT_SECONDS": "0"}
    process = subprocess.Popen(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    printed = ""
    while moment not in printed and (line := process.stdout.readline()):
        printed += line
    with suppress(OSError), filler.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**12))
    printed += process.communicate()[0]
    assert process.returncode != 0, printed[-3000:]
    assert "Traceback" not in printed and "the disk is full" in printed, printed[-3000:]
    filler.unlink()
    assert (folder / "dvc.lock").read_text() == lock
    call(*command, cwd=folder)
    assert (folder / "dvc.lock").read_text() == lock
    check_nothing_is_left(folder)
