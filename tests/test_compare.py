"""Comparison on known samples."""

import math
import os
import shutil
import subprocess
import sys

import pytest

from stages import InputError, compare, params
from stages.contamination import MATCH
from stages.records import read_json, write_json, write_parquet
from tests.tiny import ROOT

SAMPLE = {"prompt": "The cat", "gold": "0", "choices": [" sleeps", " barks"], "log_probs": [-1.0, -2.5], "generation": None}


def write_scores(folder, name: str, correct: dict[str, list[float]], contaminated: tuple[int, ...] = (), protocols: dict[str, dict[str, str]] | None = None) -> None:
    match = {"data": "sft", "source": "rows", "row": 0, "coverage": 1.0, "longest": 20}
    write_parquet(folder / "contamination" / f"{name}.parquet", [match | {"doc_id": doc_id} for doc_id in contaminated], MATCH)
    for model, values in correct.items():
        mean = sum(values) / len(values)
        stderr = math.sqrt(mean * (1 - mean) / (len(values) - 1))
        parts = [f"{part}: {value}" for part, value in (protocols or {}).get(model, {"task": "a 1"}).items()]
        write_json(folder / "metrics" / model / f"{name}.json", {"score": mean, "stderr": stderr, "n": len(values), "protocol_parts": parts})
        rows = [SAMPLE | {"doc_id": 3 * index, "correct": value, "predicted": str(int(1 - value))} for index, value in enumerate(values)]
        write_parquet(folder / "evals" / model / f"{name}.parquet", rows)


def run(folder, names):
    settings = params.load(ROOT / "params.yaml")
    settings = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"benchmarks": names})})
    compare.run(settings, folder / "metrics", folder / "evals", folder / "contamination", folder / "summary.json", folder / "summary.md", folder / "scores.json")
    return read_json(folder / "summary.json")


def test_known_samples_give_known_differences(tmp_path):
    write_scores(tmp_path, "a", {"base": [1, 0, 0, 0], "sft": [1, 1, 0, 0], "dpo": [1, 1, 1, 0]})
    write_scores(tmp_path, "b", {"base": [1, 0], "sft": [1, 0], "dpo": [1, 1]})
    summary = run(tmp_path, ["a", "b"])
    a, b, mean = summary["all"].values()
    assert (a["n"], b["n"], mean["n"]) == (4, 2, 6)
    # Wilson's interval of 2 in 4
    assert a["sft"] == {"score": 0.5, "low": pytest.approx(0.1500, abs=1e-4), "high": pytest.approx(0.8500, abs=1e-4)}
    assert (a["sft_vs_base"]["difference"], a["sft_vs_base"]["better"], a["sft_vs_base"]["worse"], a["sft_vs_base"]["p"]) == (0.25, 1, 0, 1.0)
    assert b["sft_vs_base"] == {"difference": 0.0, "low": 0.0, "high": 0.0, "p": 1.0, "holm": 1.0, "better": 0, "worse": 0, "detectable": 4.0}
    assert [mean[model]["score"] for model in ("base", "sft", "dpo")] == [0.375, 0.5, 0.875]
    assert [mean[label]["difference"] for label in compare.COMPARISONS] == [0.125, 0.375, 0.5]
    assert "share_of_gain" not in summary, "of six rows, no gain is shown"
    rows = read_json(tmp_path / "scores.json")
    assert len(rows) == 9 and {row["model"] for row in rows} == {"base", "sft", "dpo"}
    lines = (tmp_path / "summary.md").read_text().splitlines()
    assert len(lines) == 5 and lines[2].startswith("| a | 4 | 25.0 | 50.0 | 75.0 | +25.0 [")


def test_all_of_the_summary_is_numbers(tmp_path):
    """Which `dvc metrics diff` shows; it leaves out lists, texts and nulls."""
    write_scores(tmp_path, "a", {"base": [1, 0, 0, 0], "sft": [1, 1, 0, 0], "dpo": [1, 1, 1, 0]}, contaminated=(0,))

    def leaves(value):
        return [leaf for one in value.values() for leaf in leaves(one)] if isinstance(value, dict) else [value]

    assert {type(leaf) for leaf in leaves(run(tmp_path, ["a"]))} <= {int, float}


def test_the_comparisons_of_the_benchmarks_are_one_family(tmp_path):
    """Of 40 rows, 9 better and 1 worse give p = 22/1024, which six comparisons take above 5%."""
    base = [1, *[0] * 39]
    write_scores(tmp_path, "a", {"base": base, "sft": [0, *[1] * 9, *[0] * 30], "dpo": base})
    write_scores(tmp_path, "b", {"base": base, "sft": base, "dpo": base})
    summary = run(tmp_path, ["a", "b"])
    assert summary["all"]["a"]["sft_vs_base"]["p"] == pytest.approx(22 / 1024)
    assert summary["all"]["a"]["sft_vs_base"]["holm"] == summary["all"]["a"]["dpo_vs_sft"]["holm"] == pytest.approx(6 * 22 / 1024)
    assert summary["all"]["b"]["dpo_vs_base"]["holm"] == 1.0
    assert summary["all"]["mean"]["sft_vs_base"]["holm"] == pytest.approx(3 * summary["all"]["mean"]["sft_vs_base"]["p"])


def test_a_gain_that_is_shown_is_shared_out(tmp_path):
    """Of 30 points in the mean, SFT brought 10 and DPO 20; one benchmark of two, the other does not change."""
    write_scores(tmp_path, "a", {"base": [0] * 100, "sft": [1] * 20 + [0] * 80, "dpo": [1] * 60 + [0] * 40})
    write_scores(tmp_path, "b", {model: [1, 0] * 30 for model in compare.MODELS})
    shares = run(tmp_path, ["a", "b"])["share_of_gain"]
    assert shares["sft"]["share"] == pytest.approx(1 / 3) and shares["dpo"]["share"] == pytest.approx(2 / 3)
    # of the 60 rows that changed, 20 did with SFT: a binomial share
    assert shares["sft"]["low"] == pytest.approx(1 / 3 - 0.12, abs=0.02) and shares["sft"]["high"] == pytest.approx(1 / 3 + 0.12, abs=0.02)


@pytest.mark.parametrize("dpo", [[1, 1], [0, 0], [1, 0]])
def test_what_is_not_shown_is_not_shared_out(dpo, tmp_path):
    write_scores(tmp_path, "a", {"base": [1, 0] * 20, "sft": [1, 0] * 20, "dpo": [*dpo, *[1, 0] * 19]})
    assert "share_of_gain" not in run(tmp_path, ["a"])


def test_a_record_without_its_protocol_is_named(tmp_path):
    write_scores(tmp_path, "a", {"base": [1, 1], "sft": [1, 0], "dpo": [1, 1]})
    file = tmp_path / "metrics" / "sft" / "a.json"
    write_json(file, {key: value for key, value in read_json(file).items() if key != "protocol_parts"})
    with pytest.raises(InputError, match=r"sft/a\.json: it does not say how it was scored; `dvc repro` scores anew"):
        run(tmp_path, ["a"])


def test_without_arguments_it_says_what_to_call(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["compare"])
    with pytest.raises(SystemExit):
        compare.main()
    assert "--contamination is not given; `dvc repro compare` makes the summary" in capsys.readouterr().err


def test_models_scored_on_other_rows_are_refused(tmp_path):
    write_scores(tmp_path, "a", {"base": [1, 1], "sft": [1, 0], "dpo": [1, 1, 0]})
    with pytest.raises(InputError, match=r"a: the models were scored on different rows \(doc_id 6 and 0 more\)"):
        run(tmp_path, ["a"])


def test_scores_of_other_protocols_are_refused_by_what_differs(tmp_path):
    correct = {"base": [1, 1], "sft": [1, 0], "dpo": [1, 1]}
    write_scores(tmp_path, "a", correct, protocols={"dpo": {"task": "a 1", "dtype": "bfloat16"}, **{model: {"task": "a 1", "dtype": "float32"} for model in ("base", "sft")}})
    with pytest.raises(InputError, match=r"base/a\.json and .*dpo/a\.json are scores of different protocols \(dtype: float32 and dtype: bfloat16\); `dvc repro` scores"):
        run(tmp_path, ["a"])


def test_clean_rows_are_counted_apart(tmp_path):
    write_scores(tmp_path, "a", {"base": [1, 0, 0, 0], "sft": [1, 1, 0, 0], "dpo": [1, 1, 1, 0]}, contaminated=(0, 3, 99))
    write_scores(tmp_path, "b", {"base": [1, 0], "sft": [1, 0], "dpo": [1, 1]}, contaminated=(0,))
    summary = run(tmp_path, ["a", "b"])
    assert summary["all"]["a"]["n"] == 4 and summary["all"]["a"]["base"]["score"] == 0.25
    clean = summary["clean"]
    assert clean.keys() == {"a", "mean"}, "one row has no standard error"
    assert clean["a"]["n"] == clean["mean"]["n"] == 2
    assert [clean["a"][model]["score"] for model in ("base", "sft", "dpo")] == [0.0, 0.0, 0.5]
    assert clean["a"]["dpo_vs_base"]["difference"] == clean["mean"]["dpo"]["score"] == 0.5


def call(folder, *command: str) -> str:
    names = {f"GIT_{who}_{what}": "t@t" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(command, cwd=folder, env=os.environ | names | {"GIT_CONFIG_GLOBAL": "/dev/null"}, text=True, capture_output=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def dvc(folder, *command: str) -> str:
    return call(folder, sys.executable, "-m", "dvc", *command)


BASE = [1, 0] * 20


def scored_repository(folder, scores: dict[str, dict[str, list[float]]]) -> None:
    """A git repository with scores as stages leave them, and a remote."""
    folder.mkdir()
    call(folder, "git", "init", "-q", "-b", "main")
    dvc(folder, "init", "-q")
    dvc(folder, "remote", "add", "-d", "-q", "shared", str(folder.parent / "remote"))
    score(folder, scores)
    call(folder, "git", "add", "-A")
    call(folder, "git", "commit", "-qm", "first")


def score(folder, scores: dict[str, dict[str, list[float]]]) -> None:
    """What a run of `evaluate` leaves, recorded in dvc.lock."""
    for made in ("metrics", "evals"):
        shutil.rmtree(folder / made, ignore_errors=True)
    for name, correct in scores.items():
        write_scores(folder, name, correct)
    shutil.rmtree(folder / "contamination")
    (folder / ".gitignore").write_text("evals/\n")
    cells = [(model, name) for name in scores for model in compare.MODELS]
    stages = {f"evaluate-{model}-{name}": {"cmd": "true", "outs": [f"evals/{model}/{name}.parquet"], "metrics": [{f"metrics/{model}/{name}.json": {"cache": False}}]} for model, name in cells}
    with (folder / "dvc.yaml").open("w") as file:
        params.YAML().dump({"stages": stages}, file)
    dvc(folder, "commit", "-q", "--force")


def beside(folder, names: list[str], revision: str, monkeypatch) -> str:
    settings = params.load(ROOT / "params.yaml")
    settings = settings.model_copy(update={"evaluate": settings.evaluate.model_copy(update={"benchmarks": names})})
    monkeypatch.chdir(folder)
    return compare.against(settings, revision, compare.Path("metrics"), compare.Path("evals"))


def test_a_change_between_revisions_is_real_or_not(tmp_path, monkeypatch):
    """Against a branch whose name has a slash, an experiment's, and with what is only on the remote; benchmarks that only one side has are named."""
    folder = tmp_path / "clone"
    scored_repository(folder, {"a": dict.fromkeys(compare.MODELS, BASE), "old": dict.fromkeys(compare.MODELS, BASE)})
    call(folder, "git", "branch", "tried/first")
    dvc(folder, "push", "-q")
    score(folder, {"a": {"base": BASE, "sft": BASE, "dpo": [1] * 40}, "new": dict.fromkeys(compare.MODELS, BASE)})
    shutil.rmtree(folder / ".dvc" / "cache")
    dvc(folder, "commit", "-q", "--force")
    printed = beside(folder, ["a", "new"], "tried/first", monkeypatch)
    assert "dpo: now − tried/first: the mean score rose (+50.0 [" in printed and "sft: now − tried/first: the mean score shows no difference (+0.0 p 1.000" in printed
    assert "new is left out: tried/first has no scores of it" in printed and "old is left out: only tried/first has it" in printed
    shutil.rmtree(tmp_path / "remote")
    shutil.rmtree(folder / ".dvc" / "cache")
    with pytest.raises(InputError, match=r"nothing can be compared\n.*\na is left out: evals/base/a\.parquet of tried/first is in no cache and on no remote"):
        beside(folder, ["a"], "tried/first", monkeypatch)


def test_what_is_no_revision_and_what_was_edited_are_refused(tmp_path, monkeypatch):
    folder = tmp_path / "clone"
    scored_repository(folder, {"a": dict.fromkeys(compare.MODELS, BASE)})
    for revision in ("", " ", "nonsense"):
        with pytest.raises(InputError, match=f"--against: found '{revision}', expected a git revision, or an experiment"):
            beside(folder, ["a"], revision, monkeypatch)
    file = folder / "metrics" / "sft" / "a.json"
    write_json(file, read_json(file) | {"score": 1.0})
    with pytest.raises(InputError, match=r"metrics/sft/a\.json: it is not what dvc\.lock says that this run made; `dvc repro` makes it anew"):
        beside(folder, ["a"], "HEAD", monkeypatch)
    file.unlink()
    with pytest.raises(FileNotFoundError):
        beside(folder, ["a"], "HEAD", monkeypatch)
