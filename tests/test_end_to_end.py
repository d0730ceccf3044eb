"""The whole pipeline with real `dvc`, on the tiny model, in clones: same bytes twice, and mistakes that cost nothing."""

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

from stages.records import read_json, read_parquet, write_parquet
from tests import tiny
from tests.clones import DVC, ENVIRONMENT, call, make_clone, own_copy, with_params


@pytest.fixture(scope="module")
def clones(finished, tmp_path_factory) -> list[Path]:
    """Two finished runs, in folders of different names and lengths."""
    root = tmp_path_factory.mktemp("clones")
    other = make_clone(root / "a_much_longer_name" / "deeper")
    assert "Running stage 'report'" in call(*DVC, "repro", cwd=other).stdout
    call("git", "add", "-A", cwd=other)
    call("git", "commit", "-qm", "run", cwd=other)
    return [own_copy(finished, root / "a"), other]


def test_cells_side_by_side_leave_what_one_after_the_other_does(clones, tmp_path):
    """Ended in between, gone on with, and with cells that fail."""
    serial, parallel = own_copy(clones[0], tmp_path / "serial"), own_copy(clones[0], tmp_path / "parallel")
    for folder in (serial, parallel):
        with_params(folder, benchmarks__arc_challenge__limit=5)
        # as on a clone where no cell has been run
        with modify_yaml(str(folder / "dvc.lock")) as lock:
            for name in [name for name in lock["stages"] if name.startswith("evaluate@")]:
                del lock["stages"][name]
    call(*DVC, "repro", "--no-run-cache", "evaluate", cwd=serial)
    command = [sys.executable, "-m", "stages.parallel", "--processes", "2"]
    # a shell has what it starts in the background ignore Ctrl-C
    heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=parallel, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=heeds)
    printed = ""
    while printed.count(": running (OMP_NUM_THREADS=") < 2 and (line := process.stdout.readline()):
        printed += line
    time.sleep(2)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    printed += process.communicate(timeout=120)[0]
    assert process.returncode != 0 and "ended on request" in printed and "Traceback" not in printed, printed
    assert not psutil.wait_procs(children, timeout=10)[1]
    # what was asked to end is not in the way of what follows
    printed = call(*command, cwd=parallel).stdout
    assert "cells in" in printed
    assert (parallel / "dvc.lock").read_text() == (serial / "dvc.lock").read_text()
    assert "every cell of evaluate is up to date" in call(*command, cwd=parallel).stdout
    with_params(parallel, benchmarks__arc_challenge__limit=4, benchmarks__gsm8k__num_fewshot=100)
    result = call(*command, cwd=parallel, check=False)
    assert result.returncode == 1
    assert "error: 3 of 6 cells failed: evaluate@base-gsm8k, " in result.stdout and "num_fewshot: found 100, expected at most" in result.stdout
    assert all(read_json(parallel / "metrics" / model / "arc_challenge.json")["n"] == 4 for model in ("base", "sft", "dpo"))


def test_scores_are_set_beside_those_of_a_revision(clones, tmp_path):
    """Whose samples come from the cache; what cannot be compared is named with the reason."""
    folder = own_copy(clones[0], tmp_path / "clone")
    command = [sys.executable, "-m", "stages.compare", "--against"]
    printed = call(*command, "HEAD", cwd=folder).stdout
    assert printed.count("the mean score shows no difference (+0.0 p 1.000; what would have shown: ") == 3 and "| gsm8k | 6 |" in printed
    # other answers under the same protocol, and another protocol
    file = folder / "evals" / "dpo" / "gsm8k.parquet"
    rows = read_parquet(file).to_pylist()
    file.unlink()
    write_parquet(file, [row | {"correct": 1.0 - row["correct"]} for row in rows])
    metrics = folder / "metrics" / "sft" / "arc_challenge.json"
    metrics.write_text(metrics.read_text().replace("dtype: float32", "dtype: bfloat16"))
    assert "metrics/sft/arc_challenge.json: it is not what dvc.lock says that this run made" in call(*command, "HEAD", cwd=folder, check=False).stdout
    call(*DVC, "commit", "--force", "evaluate", cwd=folder)
    printed = call(*command, "HEAD", cwd=folder).stdout
    assert "arc_challenge is left out: metrics/sft/arc_challenge.json and metrics/sft/arc_challenge.json of HEAD are scores of different protocols (dtype: bfloat16 and dtype: float32)" in printed
    assert "| arc_challenge |" not in printed and "dpo: now − HEAD: the mean score" in printed
    changed = sum(1 - 2 * row["correct"] for row in rows) / len(rows)
    assert f"{100 * changed:+.1f} [" in printed
    assert "found 'nonsense', expected a git revision, or an experiment" in call(*command, "nonsense", cwd=folder, check=False).stdout
    shutil.rmtree(folder / ".dvc" / "cache")
    result = call(*command, "HEAD", cwd=folder, check=False)
    assert result.returncode == 1 and "gsm8k is left out: evals/base/gsm8k.parquet of HEAD is in no cache and on no remote" in result.stdout, result.stdout


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_other_architectures_pass(architecture, tmp_path, monkeypatch):
    """Every stage's command of dvc.yaml, one after the other in this process, which spares each the loading of torch."""
    folder = make_clone(tmp_path / architecture, architecture, ("arc_challenge",))
    monkeypatch.chdir(folder)
    with Repo(str(folder)) as repo:
        commands = [shlex.split(stage.cmd) for stage in repo.index.stages]
    assert len(commands) == 4 + 1 + 3 + 3 + 3 + 3
    for python, option, module, *arguments in commands:
        assert (python, option) == ("python", "-m")
        monkeypatch.setattr(sys, "argv", [module, *arguments])
        importlib.import_module(module).main()
    assert architecture in read_json(folder / "models" / "base" / "config.json")["model_type"]
    assert all(read_json(folder / "metrics" / model / "arc_challenge.json")["n"] == 6 for model in ("base", "sft", "dpo"))
    assert (folder / "report" / "report.md").is_file()


def test_the_adapter_is_loaded_as_the_readme_says(clones, monkeypatch, capsys):
    """In the README's own lines, with the libraries alone; and it gives the log-probs that `evaluate` saw."""
    import torch

    folder = clones[0]
    (lines,) = re.findall(r"```python\n(.*?)```", (tiny.ROOT / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    names: dict = {}
    exec(lines, names)
    assert capsys.readouterr().out.strip()
    model, tokenizer = names["model"].eval(), names["tokenizer"]
    samples = read_parquet(folder / "evals" / "dpo" / "arc_challenge.parquet").to_pylist()
    for sample in samples:
        prompt = tokenizer.encode(sample["prompt"])
        for choice, log_prob in zip(sample["choices"], sample["log_probs"], strict=True):
            ids = torch.tensor([tokenizer.encode(sample["prompt"] + choice)])
            with torch.no_grad():
                scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            assert float(scores[len(prompt) - 1 :].sum()) == pytest.approx(log_prob, abs=1e-3)


def test_two_clones_give_the_same_lock(clones):
    one, two = ((folder / "dvc.lock").read_text() for folder in clones)
    assert one == two and "models/dpo" in one


def test_the_lock_holds_no_path_of_the_machine(clones):
    for folder in clones:
        for file in call("git", "ls-files", cwd=folder).stdout.split():
            if file.startswith(("metrics/", "plots/", "report/")) or file == "dvc.lock":
                assert str(folder).encode() not in (folder / file).read_bytes(), file
        assert not list((folder / "models").rglob("*.bin"))


def test_a_second_repro_does_nothing(clones):
    assert "Data and pipelines are up to date." in call(*DVC, "repro", cwd=clones[0]).stdout


def test_outs_are_where_they_should_be(clones):
    folder = clones[0]
    for name in ("report/report.md", "report/report.html", "metrics/summary.json", "metrics/dpo/gsm8k.json", "evals/base/arc_challenge.parquet", "plots/sft.csv", "plots/dpo_speed.csv"):
        assert (folder / name).is_file(), name
    ignored = call("git", "status", "--ignored", "--porcelain", cwd=folder).stdout
    assert all(f"!! {name}/" in ignored for name in ("data", "models", "evals"))


def test_metrics_and_plots_read_well(clones):
    """A row a file and few columns: what is a table in a metrics file is a list there, which DVC leaves out, but for the summary's."""
    folders = [f"metrics/{name}" for name in ("data", "train", "base", "sft", "dpo")]
    header, _, *rows = call(*DVC, "metrics", "show", "--md", *folders, cwd=clones[0]).stdout.strip().splitlines()
    columns = [cell.strip() for cell in header.strip("|").split("|")]
    assert set(columns) == {
        "Path", "score", "stderr", "n", "protocol", "rows", "dropped", "contaminated", "steps", "tokens", "held_out_loss", "held_out_margin", "held_out_accuracy",
    }  # fmt: skip
    assert len(header) < 220 and len(rows) == 6 + 3 + 2
    lines = call(*DVC, "metrics", "diff", "--md", "--all", "--targets", "metrics/summary.json", "--", "HEAD", cwd=clones[0]).stdout.splitlines()
    assert any(line.startswith("| metrics/summary.json | all.mean.dpo_vs_base.holm ") for line in lines), lines


def test_plots_are_drawn_offline(clones, tmp_path):
    """In a real browser that reaches no network, where there is one."""
    call(sys.executable, "-m", "stages.plots_page", str(tmp_path / "page.html"), cwd=tiny.ROOT)
    call(*DVC, "plots", "show", "--html-template", str(tmp_path / "page.html"), "--out", str(tmp_path / "html"), cwd=clones[0])
    page = (tmp_path / "html" / "index.html").read_text()
    titles = ("SFT training loss", "DPO reward margin", "DPO reward accuracy", "Scores", "Learning rate", "Gradient norm", "Tokens a second", "SFT held-out loss", "DPO held-out reward margin", "Model FLOPs utilization", "Peak memory", "DPO log-probs of chosen")
    assert all(title in page for title in titles) and "cdn." not in page
    if browser := shutil.which("chromium"):
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=20000", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
        drawn = subprocess.run([browser, *options, f"file://{tmp_path}/html/index.html"], text=True, capture_output=True, timeout=120).stdout
        assert drawn.count('class="marks"') == len(titles)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("sft.learning_rte=1", ["sft.learning_rte"]),
        ("+sft.learning_rte=1", ["sft.learning_rte: found 1 under an unknown key", "learning_rate"]),
        ("sft.learning_rate=-1", ["sft.learning_rate: found -1, expected greater than 0"]),
    ],
)
def test_a_wrong_override_fails_before_any_out_is_touched(override, expected, clones):
    folder = clones[0]
    before = {file: file.stat().st_mtime_ns for name in ("data", "models", "evals", "metrics", "report") for file in (folder / name).rglob("*") if file.is_file()}
    result = call(*DVC, "exp", "run", "-S", override, cwd=folder, check=False)
    assert result.returncode != 0
    assert all(part in result.stdout for part in expected), result.stdout
    after = {file: file.stat().st_mtime_ns for name in ("data", "models", "evals", "metrics", "report") for file in (folder / name).rglob("*") if file.is_file()}
    assert before == after
    call("git", "checkout", "-q", "params.yaml", cwd=folder)
    assert "up to date" in call(*DVC, "repro", cwd=folder).stdout


def test_a_failed_stage_gives_one_message_and_its_outs_come_back(clones):
    folder = clones[0]
    weights = folder / "models" / "base" / "model.safetensors"
    content = weights.read_bytes()
    weights.unlink()
    command = "python -m stages.reference --base models/base --adapter models/sft --data data/tokenized/dpo --templates templates --configs configs --checkpoints .dvc/tmp/checkpoints/reference --out data/reference"
    result = call(*command.split(), cwd=folder, check=False)
    assert result.returncode == 1 and "Traceback" not in result.stdout
    assert "error: models/base: the model could not be loaded" in result.stdout and "`dvc checkout models/base` restores it" in result.stdout
    call(*DVC, "checkout", "models/base", cwd=folder)
    assert weights.read_bytes() == content


def test_the_full_recipe_plans_every_stage(clones):
    folder = clones[1]
    (folder / "params.yaml").write_bytes((tiny.ROOT / "recipes" / "qwen3-4b.yaml").read_bytes())
    plan = call(*DVC, "repro", "--dry", "--force", cwd=folder).stdout
    stages = [line for line in plan.splitlines() if line.startswith("Running stage")]
    assert len(stages) == 4 + 5 + 3 + 3 + 15 + 3
    assert "python -m stages.evaluate hellaswag --base models/base --adapter models/dpo" in plan


def test_the_reference_is_computed_anew_for_another_adapter_alone(clones):
    folder = clones[0]
    text = (folder / "params.yaml").read_text()
    before, after = text.split("\ndpo:\n")[1].split("\nevaluate:")[0], "\n".join(
        "  steps: 5|  global_batch_size: 2|  micro_batch_size: 1|  learning_rate: 1e-4|  lr_scheduler: linear|  warmup_ratio: 0.2|  weight_decay: 0.1|"
        "  max_grad_norm: 2.0|  gradient_checkpointing: true|  measurements: 0|  use_liger_kernel: false|  beta: 0.3|  loss: robust|  label_smoothing: 0.2".split("|")
    )
    assert {line.split(":")[0] for line in before.split("\n") if line} == {line.split(":")[0] for line in after.split("\n")}
    (folder / "params.yaml").write_text(text.replace(before, after + "\n"))
    plan = call(*DVC, "repro", "--dry", "dpo", cwd=folder).stdout
    assert "Running stage 'dpo'" in plan and "Stage 'reference' didn't change" in plan and "Running stage 'reference'" not in plan
    (folder / "params.yaml").write_text(text)
    adapter = folder / "models" / "sft" / "adapter_model.safetensors"
    content = bytearray(adapter.read_bytes())
    content[-1] ^= 1
    cached = read_parquet(folder / "data" / "reference" / "train.parquet").to_pydict()
    adapter.unlink()
    adapter.write_bytes(content)
    assert "Running stage 'reference'" in call(*DVC, "repro", "--single-item", "reference", cwd=folder).stdout
    found = read_parquet(folder / "data" / "reference" / "train.parquet").to_pydict()
    assert all(found[key] != values for key, values in cached.items())
    call("git", "checkout", "-q", "dvc.lock", cwd=folder)
    call(*DVC, "checkout", "--force", cwd=folder)
    assert "up to date" in call(*DVC, "repro", cwd=folder).stdout


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["sft", "reference", "dpo"])
def test_dvc_killed_ten_times_ends_with_the_same_bytes(stage, clones, tmp_path):
    """SIGKILL to dvc alone, at a random moment of the stage: its child ends with it, and the next run goes on to the same lock."""
    rng, folder = random.Random(stage), own_copy(clones[0], tmp_path / "clone")
    environment = ENVIRONMENT | {"REPROTUNE_CHECKPOINT_SECONDS": "0"}
    began = time.monotonic()
    call(*DVC, "repro", "--force", "--single-item", stage, cwd=folder)
    took = time.monotonic() - began
    for _ in range(10):
        process = subprocess.Popen([*DVC, "repro", "--force", "--no-run-cache", "--single-item", stage], cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(took * rng.uniform(0.3, 0.95))
        children = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        _, left = psutil.wait_procs(children, timeout=60)
        assert not left
        # DVC writes it in place: killed in that moment, it leaves half of it
        call("git", "checkout", "-q", "dvc.lock", cwd=folder)
    call(*DVC, "repro", "--force", "--no-run-cache", "--single-item", stage, cwd=folder)
    assert (folder / "dvc.lock").read_text() == (clones[0] / "dvc.lock").read_text()
    assert not list((folder / ".dvc/tmp/checkpoints" / stage).glob("*/checkpoint-*"))
