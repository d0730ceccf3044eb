"""Outs hold what stages made and nothing else, with real `dvc` on the tiny params."""

import shutil
from functools import cache
from pathlib import Path

import pytest
from ruamel.yaml import YAML

from reprotune import dvc_yaml, outs, params_file
from reprotune.data.sources import local_sha256
from reprotune.errors import InputError
from tests.clones import DVC, call, make_clone, own_copy, with_params
from tests.conftest import changed

KEYS = {
    "model": "model__source",
    "sft": "data__sft__sources__rows__source",
    "preferences": "data__preferences__sources__pairs__source",
    "benchmark": "benchmarks__gsm8k__source",
}
"""The source of each kind, as `with_params` names it."""


@pytest.fixture(scope="module")
def clone(tmp_path_factory) -> Path:
    return make_clone(tmp_path_factory.mktemp("outs") / "clone")


@pytest.fixture
def params(clone, monkeypatch):
    """The clone as working folder; its params.yaml is put back."""
    monkeypatch.chdir(clone)
    before = (clone / "params.yaml").read_text()
    yield clone
    (clone / "params.yaml").write_text(before)


loaded = cache(params_file.load)


def refused(folder: Path, kind: str, path: str) -> str:
    """The message that refuses a source of this kind at `path`."""
    key = KEYS[kind].replace("__", ".")
    source = {"kind": "local", "path": path, "sha256": "0" * 64}
    with pytest.raises(InputError) as error:
        outs.check_sources(changed(loaded(folder / "params.yaml"), {key: source}))
    assert f"params.yaml: {key}.path: found {path!r}" in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("kind", "path", "file"),
    [
        ("model", "models/base", "models/base/config.json"),
        ("sft", "data/raw/sft/my_rows.json", "data/raw/sft/my_rows.json"),
        ("preferences", "tiny/../data/raw/preferences", "data/raw/preferences/mine/pairs.jsonl"),
        ("benchmark", "data/raw/benchmarks/gsm8k", "data/raw/benchmarks/gsm8k/test.parquet"),
        ("sft", "report/rows.json", "report/rows.json"),
    ],
)
def test_a_source_in_an_out_is_still_there_after_dvc_repro(kind, path, file, params):
    (params / file).parent.mkdir(parents=True)
    (params / file).write_text("the only copy")
    digest = local_sha256(Path(path))
    with_params(params, **{KEYS[kind]: {"kind": "local", "path": path, "sha256": digest}})
    result = call(*DVC, "repro", cwd=params, check=False)
    assert result.returncode != 0
    assert f"params.yaml: {KEYS[kind].replace('__', '.')}.path: found {path!r}" in result.stdout
    assert (params / file).read_text() == "the only copy"
    assert not (params / "data" / "params.ok").exists()
    shutil.rmtree(params / Path(file).parts[0])


def test_every_out_is_refused_for_every_kind(params):
    """A source that is, lies in or holds an out; metrics, plots and outs of a matrix are among them."""
    made = {str(out) for stage in dvc_yaml.all_stages().values() for out in stage.outs}
    expected = {
        "code.yaml", "data/params.ok", "data/raw/benchmarks/gsm8k", "evals/dpo/arc_challenge.parquet",
        "metrics/mean", "metrics/sft/gsm8k.json", "models/base", "plots/sft.csv", "report",
    }  # fmt: skip
    assert expected <= made
    for number, out in enumerate(sorted(made)):
        kind = list(KEYS)[number % len(KEYS)]
        assert f"which is {out}, an out of" in refused(params, kind, out)
        assert f"which lies in {out}, an out of" in refused(params, kind, f"{out}/mine")
    shared = {folder for stage in dvc_yaml.all_stages().values() for folder in stage.folders}
    for parent in {str(Path(out).parent) for out in made}:
        assert "which holds" in refused(params, "sft", parent) or Path(parent) in shared


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        (
            "data/raw/benchmarks/mine.json",
            "lies in data/raw/benchmarks, where stages write what contamination",
        ),
        ("evals/base/mine.json", "lies in evals/base, where stages write what compare reads"),
        (".dvc/cache/files/md5/aa/bb", "lies in .dvc, DVC's own folder"),
        (".git/mine", "lies in .git, git's own folder"),
        ("reprotune/data", "lies in reprotune, a part of this project"),
        ("stages", "is stages, a part of this project"),
        (".", "holds"),
        ("..", "holds"),
        ("/", "holds"),
        ("tiny/../models/./base/", "is models/base"),
    ],
)
def test_other_places_that_are_no_users_are_refused(path, expected, params):
    assert expected in refused(params, "sft", path)
    assert expected in refused(params, "model", f"{Path.cwd()}/{path}" if path != "/" else path)


def test_links_into_and_out_of_outs_are_followed(params, tmp_path, monkeypatch):
    (params / "data" / "raw" / "sft").mkdir(parents=True, exist_ok=True)
    for link, target in {
        "link.json": "data/raw/sft/mine.json",
        "second.json": "link.json",
        "folder": "data/raw",
    }.items():
        (params / link).symlink_to(target)
    assert "which lies in data/raw/sft" in refused(params, "sft", "link.json")
    assert "which lies in data/raw/sft" in refused(params, "sft", "second.json")
    assert "which lies in data/raw/sft" in refused(params, "sft", "folder/sft/mine.json")
    assert "which holds data/raw/" in refused(params, "sft", "folder")
    # a link that lies in an out, to a file elsewhere
    (params / "data" / "raw" / "sft" / "mine.json").symlink_to(params / "tiny" / "alpaca.json")
    assert "which lies in data/raw/sft" in refused(params, "sft", "second.json")
    # a folder with a link
    (params / "mine").mkdir()
    (params / "mine" / "a.json").symlink_to("../data/raw/sft/mine.json")
    assert "of which mine/a.json lies in data/raw/sft" in refused(params, "sft", "mine")
    # outs on another disk
    (tmp_path / "big" / "base").mkdir(parents=True)
    (params / "models").symlink_to(tmp_path / "big")
    assert "which lies in models/base" in refused(params, "model", str(tmp_path / "big" / "base" / "mine"))


def test_other_sources_are_taken(params):
    (params / "data").mkdir(exist_ok=True)
    for path in ("tiny/alpaca.json", "data/mine.json", "data/raw/mine.json", "reports/x", "modelsx/base"):
        with_params(
            params, data__sft__sources__rows__source={"kind": "local", "path": path, "sha256": "0" * 64}
        )
        outs.check_sources(params_file.load())


@pytest.fixture(scope="module")
def searched(tmp_path_factory) -> Path:
    """A clone in which `contamination` has run, committed."""
    folder = make_clone(tmp_path_factory.mktemp("searched") / "clone")
    call(*DVC, "repro", "contamination", cwd=folder)
    call("git", "add", "-A", cwd=folder)
    call("git", "commit", "-qm", "run", cwd=folder)
    return folder


def copied(searched: Path, folder: Path) -> Path:
    """A clone with its own cache, in which all that has run is checked out."""
    call("git", "clone", "-q", str(searched), str(folder), cwd=searched)
    shutil.copytree(searched / ".dvc" / "cache", folder / ".dvc" / "cache")
    # other stages have not run, so that it fails
    call(*DVC, "checkout", cwd=folder, check=False)
    return folder


def test_a_removed_benchmark_leaves_nothing_that_others_depend_on(searched, tmp_path):
    folder = copied(searched, tmp_path / "clone")
    with_params(folder, evaluate__benchmarks=["arc_challenge"])
    printed = call(*DVC, "repro", "contamination", cwd=folder).stdout
    assert "data/raw/benchmarks/gsm8k: removed" in printed
    assert [path.name for path in (folder / "data" / "raw" / "benchmarks").iterdir()] == ["arc_challenge"]
    call("git", "commit", "-qam", "fewer", cwd=folder)
    fresh = copied(folder, tmp_path / "fresh")
    assert "up to date" in call(*DVC, "status", "contamination", cwd=fresh).stdout
    # and comes back
    with_params(folder, evaluate__benchmarks=["arc_challenge", "gsm8k"])
    call(*DVC, "repro", "contamination", cwd=folder)
    assert "up to date" in call(*DVC, "status", "contamination", cwd=folder).stdout
    assert call("git", "diff", "HEAD~1", "--stat", "--", "metrics", cwd=folder).stdout == ""


def test_a_removed_source_leaves_nothing(searched, tmp_path):
    folder = copied(searched, tmp_path / "clone")
    sft = YAML(typ="safe", pure=True).load(folder / "params.yaml")["data"]["sft"]
    more = {part: sft[part] | {"more": sft[part]["rows"]} for part in ("sources", "mix")}
    with_params(folder, data__sft__sources=more["sources"], data__sft__mix=more["mix"])
    call(*DVC, "repro", "fetch_sft_data", cwd=folder)
    raw = folder / "data" / "raw" / "sft"
    assert sorted(file.name for file in raw.iterdir()) == ["more.parquet", "rows.parquet"]
    with_params(folder, data__sft__sources=sft["sources"], data__sft__mix=sft["mix"])
    call(*DVC, "repro", "contamination", cwd=folder)
    assert [file.name for file in raw.iterdir()] == ["rows.parquet"]
    # DVC keeps what it locked of a stage that is gone
    assert call("git", "status", "--short", cwd=folder).stdout == " M dvc.lock\n"


def test_what_another_branch_left_is_named_and_dvc_checkout_removes_it(searched, tmp_path):
    folder = copied(searched, tmp_path / "clone")
    call("git", "switch", "-qc", "fewer", cwd=folder)
    with_params(folder, evaluate__benchmarks=["arc_challenge"])
    call(*DVC, "repro", "contamination", cwd=folder)
    call("git", "commit", "-qam", "fewer", cwd=folder)
    call("git", "switch", "-q", "-", cwd=folder)
    call(*DVC, "checkout", cwd=folder, check=False)
    call("git", "switch", "-q", "fewer", cwd=folder)
    result = call(*DVC, "repro", "contamination", cwd=folder, check=False)
    assert "data/raw/benchmarks/gsm8k/test.parquet: made by no stage of this commit" in result.stdout
    call("git", "checkout", "-q", "metrics", cwd=folder)
    call(*DVC, "checkout", cwd=folder, check=False)
    assert not (folder / "data" / "raw" / "benchmarks" / "gsm8k").exists()
    assert "up to date" in call(*DVC, "status", "contamination", cwd=folder).stdout


@pytest.mark.parametrize("source", ["sft/mine.json", "preferences/mine.json", "benchmarks/mine.json"])
def test_what_lies_beside_a_source_is_not_deleted_with_it(source, searched, tmp_path):
    """Not even where `check_params` does not run."""
    folder = copied(searched, tmp_path / "clone")
    (folder / "data" / "raw" / source).write_text("the only copy")
    for stage in ("fetch_sft_data@rows", "fetch_preference_data@pairs", "fetch_benchmark@gsm8k"):
        call(*DVC, "repro", "--force", "--single-item", stage, cwd=folder)
    assert (folder / "data" / "raw" / source).read_text() == "the only copy"


@pytest.mark.parametrize("mine", ["data/raw/benchmarks/notes.txt", "data/raw/benchmarks/gsm8k/notes.txt"])
def test_what_somebody_put_there_stays_and_is_named(mine, searched, tmp_path):
    folder = copied(searched, tmp_path / "clone")
    (folder / mine).write_text("mine")
    # this is nobody's
    (folder / mine).with_name(".DS_Store").write_text("")
    with_params(folder, evaluate__benchmarks=["arc_challenge"])
    result = call(*DVC, "repro", "contamination", cwd=folder, check=False)
    assert result.returncode != 0
    assert mine in result.stdout and ": made by no stage of this commit" in result.stdout
    assert (folder / mine).read_text() == "mine"


@pytest.mark.slow
def test_a_clone_of_a_run_with_fewer_benchmarks_is_up_to_date(finished, tmp_path):
    folder = own_copy(finished, tmp_path / "clone")
    with_params(folder, evaluate__benchmarks=["arc_challenge"])
    call(*DVC, "repro", cwd=folder)
    call("git", "add", "-A", cwd=folder)
    call("git", "commit", "-qm", "fewer", cwd=folder)
    left = [
        *folder.glob("data/**/gsm8k*"),
        *folder.glob("evals/**/gsm8k*"),
        *folder.glob("metrics/**/gsm8k*"),
    ]
    assert left == []
    fresh = own_copy(folder, tmp_path / "fresh")
    assert "up to date" in call(*DVC, "status", cwd=fresh).stdout
