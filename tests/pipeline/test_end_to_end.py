"""The whole pipeline with real `dvc` on the tiny model: runs repeat byte for byte, mistakes cost nothing."""

import importlib
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
from dvc.repo import Repo
from dvc.utils.serialize import modify_yaml

from reprotune import dvc_yaml
from reprotune.records import read_json, read_metrics, read_parquet, write_parquet
from tests import tiny
from tests.clones import DVC, ENVIRONMENT, call, make_clone, own_copy, with_params
from tests.pipeline.recorder import recorded


@pytest.fixture(scope="module")
def rerun(finished, tmp_path_factory) -> tuple[Path, str]:
    """A clean clone of a finished run, run again without its cache, and the `git status` after that."""
    folder = tmp_path_factory.mktemp("rerun") / "a_much_longer_name" / "deeper"
    call("git", "clone", "-q", str(finished), str(folder), cwd=finished)
    shutil.copytree(finished / "tiny", folder / "tiny", dirs_exist_ok=True)
    # git has the report, so without --force DVC would not run that stage
    assert "Running stage 'report'" in call(*DVC, "repro", "--force", cwd=folder).stdout
    return folder, call("git", "status", "--short", cwd=folder).stdout


@pytest.fixture(scope="module")
def clone(finished, tmp_path_factory) -> Path:
    folder = own_copy(finished, tmp_path_factory.mktemp("clone") / "a")
    shutil.copytree(finished / "measured", folder / "measured")
    return folder


@pytest.mark.slow
def test_a_clean_clone_that_is_run_again_stays_clean(finished, rerun):
    """Two equal runs leave the same files in git, in folders of different names and lengths."""
    folder, status = rerun
    assert status == ""
    assert (folder / "measured" / "sft_speed.csv").is_file() and (folder / "models" / "dpo").is_dir()
    first, second = ((folder / "dvc.lock").read_text() for folder in (finished, folder))
    assert first == second and "models/dpo" in first


@pytest.mark.slow
def test_cells_side_by_side_leave_what_one_after_the_other_does(finished, tmp_path):
    """`reprotune cells`, interrupted and run again, ends like `dvc repro`, and names failed cells."""
    serial, parallel = own_copy(finished, tmp_path / "serial"), own_copy(finished, tmp_path / "parallel")
    for folder in (serial, parallel):
        with_params(folder, benchmarks__arc_challenge__limit=5)
        # as in a clone where no cell of this benchmark has run
        with modify_yaml(str(folder / "dvc.lock")) as lock:
            for name in [name for name in lock["stages"] if re.match("evaluate@.*arc_challenge", name)]:
                del lock["stages"][name]
    call(*DVC, "repro", "--no-run-cache", "evaluate", cwd=serial)
    command = [sys.executable, "-m", "reprotune", "cells", "--processes", "2"]
    # processes in the background of a shell ignore SIGINT
    accept_interrupt = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(
        command,
        cwd=parallel,
        env=ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=accept_interrupt,
    )
    printed = ""
    while printed.count(": running (OMP_NUM_THREADS=") < 2 and (line := process.stdout.readline()):
        printed += line
    time.sleep(2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    printed += process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "ended on request" in printed and "Traceback" not in printed, printed
    assert not psutil.wait_procs(children, timeout=10)[1]
    # the interrupted run does not block the next one
    printed = call(*command, cwd=parallel).stdout
    assert "cells in" in printed
    assert (parallel / "dvc.lock").read_text() == (serial / "dvc.lock").read_text()
    assert "every cell of evaluate is up to date" in call(*command, cwd=parallel).stdout
    with_params(parallel, benchmarks__arc_challenge__limit=4, benchmarks__gsm8k__num_fewshot=100)
    result = call(*command, cwd=parallel, check=False)
    assert result.returncode == 1
    assert "error: 3 of 6 cells failed: evaluate@base-gsm8k, " in result.stdout
    assert "num_fewshot: found 100, expected at most" in result.stdout
    assert all(
        read_metrics(parallel / "metrics" / model / "arc_challenge.json")["n"] == 4
        for model in ("base", "sft", "dpo")
    )


def test_scores_are_set_beside_those_of_a_revision(clone, tmp_path):
    """The revision's samples come from the cache; what cannot be compared is named with the reason."""
    folder = own_copy(clone, tmp_path / "clone")
    command = [sys.executable, "-m", "reprotune", "compare", "--against"]
    printed = call(*command, "HEAD", cwd=folder).stdout
    assert printed.count("the mean score shows no difference (+0.0 p 1.000; what would have shown: ") == 3
    assert "| gsm8k | 6 |" in printed
    # other answers under the same protocol, and another protocol
    file = folder / "evals" / "dpo" / "gsm8k.parquet"
    rows = read_parquet(file).to_pylist()
    file.unlink()
    write_parquet(file, [row | {"correct": 1.0 - row["correct"]} for row in rows])
    metrics = folder / "metrics" / "sft" / "arc_challenge.json"
    metrics.write_text(metrics.read_text().replace("dtype: float32", "dtype: bfloat16"))
    printed = call(*command, "HEAD", cwd=folder, check=False).stdout
    assert "metrics/sft/arc_challenge.json: its content is not the one that dvc.lock records" in printed
    call(*DVC, "commit", "--force", "evaluate", cwd=folder)
    printed = call(*command, "HEAD", cwd=folder).stdout
    assert (
        "arc_challenge is left out: metrics/sft/arc_challenge.json and metrics/sft/arc_challenge.json of "
        "HEAD are scores of different protocols (dtype: bfloat16 and dtype: float32)" in printed
    )
    assert "| arc_challenge |" not in printed and "dpo: now − HEAD: the mean score" in printed
    changed = sum(1 - 2 * row["correct"] for row in rows) / len(rows)
    assert f"{100 * changed:+.1f} [" in printed
    printed = call(*command, "nonsense", cwd=folder, check=False).stdout
    assert "found 'nonsense', expected a git revision, or an experiment" in printed
    shutil.rmtree(folder / ".dvc" / "cache")
    result = call(*command, "HEAD", cwd=folder, check=False)
    assert result.returncode == 1, result.stdout
    reason = "gsm8k is left out: evals/base/gsm8k.parquet of HEAD is in no cache and on no remote"
    assert reason in result.stdout, result.stdout


def lists(stage: str, key: str) -> bool:
    """Whether dvc.yaml lists this key, or a section that holds it, among the params of the stage."""
    names = [name for file, name in dvc_yaml.declared(stage).params if file == dvc_yaml.PARAMS]
    return any(name is None or key == name or key.startswith(f"{name}.") for name in names)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_other_architectures_pass(architecture, tmp_path, monkeypatch):
    """The command of every stage runs in this process, which imports torch once.

    A stage reads no param that dvc.yaml does not list for it.
    """
    read: set[str] = set()
    folder = make_clone(tmp_path / architecture, architecture, ("arc_challenge",))
    monkeypatch.chdir(folder)
    with Repo(str(folder)) as repo:
        commands = {stage.addressing: shlex.split(stage.cmd) for stage in repo.index.stages}
    assert len(commands) == 5 + 1 + 3 + 3 + 3 + 3
    for stage, (python, option, module, *arguments) in commands.items():
        assert (python, option) == ("python", "-m")
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        with recorded(monkeypatch) as keys:
            importlib.import_module(module).main()
        undeclared = [key for key in keys if not lists(stage, key)]
        assert not undeclared, f"{stage} reads {undeclared}"
        read |= keys
    assert {
        "model.source.path",
        "seed",
        "sft.learning_rate",
        "dpo.beta",
        "benchmarks.arc_challenge.limit",
    } <= read
    assert architecture in read_json(folder / "models" / "base" / "config.json")["model_type"]
    assert all(
        read_metrics(folder / "metrics" / model / "arc_challenge.json")["n"] == 6
        for model in ("base", "sft", "dpo")
    )
    assert (folder / "report" / "report.md").is_file()


def test_the_adapter_is_loaded_as_the_readme_says(clone, monkeypatch, capsys):
    """The README's lines need only the libraries, and give the log-probs that `evaluate` recorded."""
    import torch

    (lines,) = re.findall(r"```python\n(.*?)```", (tiny.ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(clone)
    names: dict = {}
    exec(lines, names)
    assert capsys.readouterr().out.strip()
    model, tokenizer = names["model"].eval(), names["tokenizer"]
    samples = read_parquet(clone / "evals" / "dpo" / "arc_challenge.parquet").to_pylist()
    for sample in samples:
        prompt = tokenizer.encode(sample["prompt"])
        for choice, log_prob in zip(sample["choices"], sample["log_probs"], strict=True):
            ids = torch.tensor([tokenizer.encode(sample["prompt"] + choice)])
            with torch.no_grad():
                scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            assert float(scores[len(prompt) - 1 :].sum()) == pytest.approx(log_prob, abs=1e-3)


def test_the_lock_holds_no_path_of_the_machine(finished):
    for file in call("git", "ls-files", cwd=finished).stdout.split():
        if file.startswith(("metrics/", "plots/", "report/")) or file == "dvc.lock":
            assert str(finished).encode() not in (finished / file).read_bytes(), file
    assert not list((finished / "models").rglob("*.bin"))


def test_a_second_repro_does_nothing(clone):
    assert "Data and pipelines are up to date." in call(*DVC, "repro", cwd=clone).stdout


def test_outs_are_where_they_should_be(clone):
    for name in (
        "report/report.md",
        "report/report.html",
        "metrics/summary.json",
        "metrics/dpo/gsm8k.json",
        "evals/base/arc_challenge.parquet",
        "plots/sft.csv",
        "measured/dpo_speed.csv",
    ):
        assert (clone / name).is_file(), name
    ignored = call("git", "status", "--ignored", "--porcelain", cwd=clone).stdout
    assert all(f"!! {name}/" in ignored for name in ("data", "models", "evals", "measured"))


def test_metrics_fit_a_screen(clone):
    """`dvc metrics show` prints one line per file; with all benchmarks the names are longer."""
    header, *rows = call(*DVC, "metrics", "show", cwd=clone).stdout.strip().splitlines()
    assert header.split() == [
        "Path",
        "contaminated",
        "difference",
        "held_out_accuracy",
        "held_out_loss",
        "held_out_margin",
        "kl",
        "n",
        "p",
        "rows",
        "score",
    ]
    assert len(rows) == 6 + 6 + 2 + 3 + 1
    longest = len("metrics/sft/commonsense_qa.json") - max(len(row.split()[0]) for row in rows)
    assert max(map(len, [header, *rows])) + max(0, longest) <= 160
    (merged,) = (row for row in rows if row.startswith("metrics/merge.json"))
    assert len(merged.split()) == len(header.split())


def test_the_statistics_in_full_are_no_metric(clone):
    metrics = clone / "metrics"
    means = read_json(metrics / "summary.json")["all"]["mean"]
    assert read_json(metrics / "mean" / "dpo_vs_base.json") == {
        "difference": means["dpo_vs_base"]["difference"],
        "p": means["dpo_vs_base"]["holm"],
    }
    assert read_json(metrics / "mean" / "dpo.json")["score"] == means["dpo"]["score"]
    assert "summary.json" not in call(*DVC, "metrics", "show", cwd=clone).stdout


def test_plots_are_drawn_offline(clone, tmp_path):
    """Chromium draws them from the page alone, where it is installed."""
    call(sys.executable, "-m", "reprotune.report.plots_page", str(tmp_path / "page.html"), cwd=tiny.ROOT)
    options = ["--html-template", str(tmp_path / "page.html"), "--out", str(tmp_path / "html")]
    call(*DVC, "plots", "show", *options, cwd=clone)
    page = (tmp_path / "html" / "index.html").read_text()
    titles = (
        "SFT training loss",
        "DPO reward margin",
        "DPO reward accuracy",
        "Scores",
        "Learning rate",
        "Gradient norm",
        "Tokens a second",
        "SFT held-out loss",
        "DPO held-out reward margin",
        "Model FLOPs utilization",
        "Peak memory",
        "DPO log-probs of chosen",
    )
    assert all(title in page for title in titles) and "cdn." not in page
    if browser := shutil.which("chromium"):
        options = [
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--virtual-time-budget=20000",
            f"--user-data-dir={tmp_path}/profile",
            "--dump-dom",
        ]
        drawn = subprocess.run(
            [browser, *options, f"file://{tmp_path}/html/index.html"],
            text=True,
            capture_output=True,
            timeout=120,
        ).stdout
        assert drawn.count('class="marks"') == len(titles)


def modification_times(folder: Path) -> dict[Path, int]:
    return {
        file: file.stat().st_mtime_ns
        for name in ("data", "models", "evals", "metrics", "report")
        for file in (folder / name).rglob("*")
        if file.is_file()
    }


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sft.learning_rte=1", ["sft.learning_rte"]),
        ("+sft.learning_rte=1", ["sft.learning_rte: found 1 under an unknown key", "learning_rate"]),
        ("sft.learning_rate=-1", ["sft.learning_rate: found -1, expected greater than 0"]),
        ("model.chat_template=nope", ["model.chat_template: found 'nope', expected one of alpaca, chatml"]),
    ],
)
def test_a_wrong_override_fails_before_any_out_is_touched(override, expected, clone):
    before = modification_times(clone)
    result = call(*DVC, "exp", "run", "-S", override, cwd=clone, check=False)
    assert result.returncode != 0
    assert all(part in result.stdout for part in expected), result.stdout
    assert modification_times(clone) == before
    call("git", "checkout", "-q", "params.yaml", cwd=clone)
    assert "up to date" in call(*DVC, "repro", cwd=clone).stdout


def test_a_failed_stage_gives_one_message_and_its_outs_come_back(clone):
    weights = clone / "models" / "base" / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    command = (
        "python -m stages.reference --base models/base --adapter models/sft --data data/tokenized/dpo "
        "--templates templates --configs configs --checkpoints .dvc/tmp/checkpoints/reference "
        "--out data/reference"
    )
    result = call(*command.split(), cwd=clone, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert "error: models/base: the model could not be loaded" in result.stdout
    assert "`dvc checkout models/base` restores it" in result.stdout
    call(*DVC, "checkout", "models/base", cwd=clone)
    assert weights.read_bytes() == content


def test_the_full_recipe_plans_every_stage(clone):
    (clone / "params.yaml").write_bytes((tiny.ROOT / "recipes" / "qwen3-4b.yaml").read_bytes())
    plan = call(*DVC, "repro", "--dry", "--force", cwd=clone).stdout
    call("git", "checkout", "-q", "--", "params.yaml", cwd=clone)
    stages = [line for line in plan.splitlines() if line.startswith("Running stage")]
    assert len(stages) == 5 + 5 + 3 + 3 + 15 + 3
    assert "python -m stages.evaluate hellaswag --base models/base --adapter models/dpo" in plan


def test_the_reference_is_computed_anew_for_another_adapter_alone(clone):
    text = (clone / "params.yaml").read_text()
    before = text.split("\ndpo:\n")[1].split("\nevaluate:")[0]
    after = """\
  steps: 5
  global_batch_size: 2
  micro_batch_size: 1
  learning_rate: 1e-4
  lr_scheduler: linear
  warmup_ratio: 0.2
  weight_decay: 0.1
  max_grad_norm: 2.0
  gradient_checkpointing: true
  measurements: 0
  use_liger_kernel: false
  beta: 0.3
  loss: robust
  label_smoothing: 0.2
"""
    keys_before, keys_after = (
        {line.split(":")[0] for line in section.split("\n") if line} for section in (before, after)
    )
    assert keys_before == keys_after
    (clone / "params.yaml").write_text(text.replace(before, after))
    plan = call(*DVC, "repro", "--dry", "dpo", cwd=clone).stdout
    assert "Running stage 'dpo'" in plan
    assert "Stage 'reference' didn't change" in plan and "Running stage 'reference'" not in plan
    (clone / "params.yaml").write_text(text)
    adapter = clone / "models" / "sft" / "adapter_model.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    cached = read_parquet(clone / "data" / "reference" / "train.parquet").to_pydict()
    adapter.unlink()
    adapter.write_bytes(content)
    assert "Running stage 'reference'" in call(*DVC, "repro", "--single-item", "reference", cwd=clone).stdout
    computed = read_parquet(clone / "data" / "reference" / "train.parquet").to_pydict()
    assert all(computed[key] != values for key, values in cached.items())
    call("git", "checkout", "-q", "dvc.lock", cwd=clone)
    call(*DVC, "checkout", "--force", cwd=clone)
    assert "up to date" in call(*DVC, "repro", cwd=clone).stdout


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["sft", "reference", "dpo"])
def test_dvc_killed_ten_times_ends_with_the_same_bytes(stage, clone, tmp_path):
    """SIGKILL hits dvc alone at a random moment of the stage.

    Its child process ends with it, and the next run resumes and gives the same lock.
    """
    rng, folder = random.Random(stage), own_copy(clone, tmp_path / "clone")
    environment = ENVIRONMENT | {"REPROTUNE_CHECKPOINT_SECONDS": "0"}
    began = time.monotonic()
    call(*DVC, "repro", "--force", "--single-item", stage, cwd=folder)
    took = time.monotonic() - began
    for _ in range(10):
        process = subprocess.Popen(
            [*DVC, "repro", "--force", "--no-run-cache", "--single-item", stage],
            cwd=folder,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(took * rng.uniform(0.3, 0.95))
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, left = psutil.wait_procs(children, timeout=60)
        assert not left
        # DVC writes it in place, so a kill in that moment leaves half of it
        call("git", "checkout", "-q", "dvc.lock", cwd=folder)
    call(*DVC, "repro", "--force", "--no-run-cache", "--single-item", stage, cwd=folder)
    assert (folder / "dvc.lock").read_text() == (clone / "dvc.lock").read_text()
    assert not list((folder / ".dvc/tmp/checkpoints" / stage).glob("*/checkpoint-*"))
