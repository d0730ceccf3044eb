"""The real Hub client against a server on loopback: what is downloaded, and every way in which it fails."""

import json
import os
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ruamel.yaml import YAML

from reprotune.records import read_parquet
from tests import tiny
from tests.hub_server import COMMIT, Server

CODE = """
import json, shutil, sys
from pathlib import Path
from reprotune.data import sources
from reprotune.params import HubSource
from reprotune.process import command

def main():
    source = HubSource.model_validate(json.loads(sys.argv[1]))
    with sources.fetched(source) as folder:
        shutil.copytree(folder, sys.argv[2], ignore=shutil.ignore_patterns(".cache"))

command(main)
"""
BIG = bytes(range(256)) * 4_000


@pytest.fixture
def hub(tmp_path):
    server = Server(tmp_path / "hub")
    server.add(
        "some/rows", {"data/train-0.parquet": BIG, "data/test-0.parquet": BIG[1:], "README.md": b"# rows"}
    )
    yield server
    server.close()


@pytest.fixture
def fetch(hub, tmp_path):
    """Run a fetch in a process of its own, since the client reads its settings on import.

    Returns the process and the files that came.
    """
    calls = []

    def run(revision=COMMIT, files=("data/train-*.parquet",), repo="some/rows", **environment):
        calls.append(out := tmp_path / f"out{len(calls)}")
        source = {
            "kind": "hub",
            "repo": repo,
            "repo_type": "dataset",
            "revision": revision,
            "files": list(files),
        }
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "PYTHONPATH": str(tiny.ROOT),
            "HF_HUB_ETAG_TIMEOUT": "2",
        }
        clean = {key: value for key, value in os.environ.items() if key != "HF_TOKEN"}
        result = subprocess.run(
            [sys.executable, "-c", CODE, json.dumps(source), str(out)],
            cwd=tmp_path,
            env=clean | settings | environment,
            text=True,
            capture_output=True,
        )
        fetched = {str(file.relative_to(out)): file.read_bytes() for file in out.rglob("*") if file.is_file()}
        return result, fetched

    return run


def failed(result, *expected):
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    message = result.stderr[result.stderr.index("error: ") :]
    for part in expected:
        assert part in message, message
    return True


def gets(hub) -> list[tuple[str, str | None]]:
    return [(path, span) for method, path, span, _ in hub.requests if method == "GET" and "/resolve/" in path]


def test_only_the_files_of_the_run_come_at_their_commit(hub, fetch, tmp_path):
    result, fetched = fetch()
    assert result.returncode == 0, result.stderr
    assert fetched == {"data/train-0.parquet": BIG}
    assert [path for path, _ in gets(hub)] == [f"/datasets/some/rows/resolve/{COMMIT}/data/train-0.parquet"]
    assert not any((tmp_path / ".dvc/tmp/downloads").iterdir())


def test_a_broken_download_goes_on_where_it_broke(hub, fetch):
    """The client keeps whole chunks of 10 MB."""
    large = BIG * 24
    hub.add("some/rows", {"data/train-0.parquet": large})
    hub.break_after["train-0.parquet"] = 15_000_000
    result, fetched = fetch()
    assert result.returncode == 0, result.stderr
    assert fetched == {"data/train-0.parquet": large}
    first, second = (span for _, span in gets(hub))
    assert first is None and second is not None
    assert 0 < int(second.removeprefix("bytes=").split("-")[0]) <= 15_000_000


def test_what_arrived_whole_is_not_downloaded_again(hub, fetch):
    hub.corrupt.add("train-0.parquet")
    result, _ = fetch(files=["data/*.parquet"])
    assert failed(
        result,
        f"some/rows at {COMMIT}: data/train-0.parquet: sha256 is",
        "expected",
        "`dvc repro` downloads it again",
    )
    hub.corrupt.clear()
    hub.requests.clear()
    result, fetched = fetch(files=["data/*.parquet"])
    assert result.returncode == 0, result.stderr
    assert fetched == {"data/train-0.parquet": BIG, "data/test-0.parquet": BIG[1:]}
    assert [path.rsplit("/")[-1] for path, _ in gets(hub)] == ["train-0.parquet"]


def test_small_files_are_checked_too(hub, fetch):
    hub.corrupt.add("README.md")
    result, _ = fetch(files=["*.md"])
    assert failed(result, "README.md: git-sha1 is", "downloads it again")


def test_a_commit_that_is_not_there(fetch):
    result, _ = fetch(revision="f" * 40)
    assert failed(result, f"some/rows at {'f' * 40}: the repository has no such commit; correct `revision`")


def test_a_repository_that_is_not_there(fetch):
    result, _ = fetch(repo="some/nothing")
    assert failed(result, "some/nothing at", "no such repository, or a private one", "set HF_TOKEN")


def test_no_file_matches(fetch):
    result, _ = fetch(files=["*.csv"])
    assert failed(result, "no file matches", "*.csv", "correct `files` in params.yaml")
    result, _ = fetch(files=["data/train-*.parquet", "data/trian-*.parquet"])
    assert failed(result, "no file matches 'data/trian-*.parquet'; correct `files` in params.yaml")


def test_a_gated_repository_says_where_the_token_goes_and_writes_it_nowhere(hub, fetch, tmp_path):
    hub.gated = True
    result, _ = fetch()
    assert failed(result, "the repository is gated; accept its terms", "HF_TOKEN")
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    (home / "token").write_text("hf_secret")
    assert failed(fetch()[0], "the repository is gated"), "a token comes from the environment alone"
    (home / "token").unlink()
    result, fetched = fetch(HF_TOKEN="hf_secret")
    assert result.returncode == 0 and fetched == {"data/train-0.parquet": BIG}
    assert "hf_secret" not in result.stdout + result.stderr
    hub.corrupt.add("train-0.parquet")
    fetch(HF_TOKEN="hf_secret")
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and b"hf_secret" in file.read_bytes()]


def test_too_many_requests_are_waited_for(hub, fetch):
    hub.busy = 2
    result, fetched = fetch()
    assert result.returncode == 0 and fetched == {"data/train-0.parquet": BIG}, result.stderr


@pytest.mark.slow
def test_a_hub_that_stays_busy_is_named(hub, fetch):
    hub.busy = 10_000
    result, _ = fetch()
    assert failed(
        result,
        f"{hub.url} answered 429 (too many requests: wait a few minutes, or set HF_TOKEN); then `dvc repro`",
    )


@pytest.mark.soak
def test_a_hub_that_does_not_answer(hub, fetch):
    """The client waits ten seconds, six times."""
    hub.delay = 12
    result, _ = fetch()
    assert failed(
        result, f"some/rows at {COMMIT}: {hub.url} gave no answer", "timed out", "check the network"
    )


@pytest.mark.slow
def test_a_download_that_stalls(hub, fetch):
    hub.stalled.add("train-0.parquet")
    result, _ = fetch(HF_HUB_DOWNLOAD_TIMEOUT="1")
    assert failed(
        result, f"some/rows at {COMMIT}: {hub.url} gave no answer", "timed out", "check the network"
    )


@pytest.mark.slow
def test_no_hub(fetch):
    result, _ = fetch(HF_ENDPOINT="http://127.0.0.1:9")
    assert failed(result, "http://127.0.0.1:9 gave no answer", "check the network and proxy settings")


def test_a_model_and_rows_come_whole_through_their_stages(hub, world, model, tmp_path):
    """Safetensors, tokenizer and Parquet files, from repositories that hold more."""
    hub.add(
        "some/model",
        {file.name: file.read_bytes() for file in model.iterdir()}
        | {"pytorch_model.bin": b"pickle", "LICENSE": b"free"},
        kind="models",
    )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(tiny.alpaca_rows()), sink)
    hub.add("some/rows", {"data/train-0.parquet": sink.getvalue().to_pybytes()})
    content = YAML(typ="safe", pure=True).load((world / "params.yaml").read_text())
    source = {"kind": "hub", "revision": COMMIT}
    content["model"]["source"] = source | {
        "repo": "some/model",
        "repo_type": "model",
        "files": ["*.safetensors", "*.json"],
    }
    rows = source | {"repo": "some/rows", "repo_type": "dataset", "files": ["data/train-*.parquet"]}
    content["data"]["sft"]["sources"]["rows"]["source"] = rows
    with (tmp_path / "params.yaml").open("w") as file:
        YAML().dump(content, file)
    environment = os.environ | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(tmp_path / "home"),
        "PYTHONPATH": str(tiny.ROOT),
    }
    for stage in ("fetch_model --out models/base", "fetch_sft_data rows --out data/raw/sft/rows.parquet"):
        result = subprocess.run(
            [sys.executable, "-m", *f"stages.{stage}".split()],
            cwd=tmp_path,
            env=environment,
            text=True,
            capture_output=True,
        )
        assert result.returncode == 0, result.stderr
    wanted = {
        file.name: file.read_bytes() for file in model.iterdir() if file.suffix in (".safetensors", ".json")
    }
    found = {file.name: file.read_bytes() for file in (tmp_path / "models/base").iterdir()}
    # written beside what was fetched
    assert found.pop("source.json") and found.pop("own_template.jinja")
    assert found == wanted
    assert read_parquet(tmp_path / "data/raw/sft/rows.parquet").to_pylist() == tiny.alpaca_rows()
    assert not [path for _, path, _, _ in hub.requests if path.endswith(("pytorch_model.bin", "LICENSE"))]


@pytest.mark.parametrize("reachable", [True, False])
def test_a_branch_is_refused_with_the_commit_that_it_points_to(reachable, hub, tmp_path):
    hub.branches["main"] = COMMIT
    hub.add("Qwen/Qwen3-4B-Base", {"config.json": b"{}"}, kind="models")
    recipe = (tiny.ROOT / "recipes" / "qwen3-4b.yaml").read_text()
    (tmp_path / "params.yaml").write_text(recipe.replace("906bfd4b4dc7f14ee4320094d8b41684abff8539", "main"))
    environment = os.environ | {
        "HF_ENDPOINT": hub.url if reachable else "http://127.0.0.1:9",
        "PYTHONPATH": str(tiny.ROOT),
    }
    command = [sys.executable, "-m", "stages.check_params", "--out", "ok"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    advice = (
        f"it is now at {COMMIT}"
        if reachable
        else "`git ls-remote https://huggingface.co/Qwen/Qwen3-4B-Base main` prints the commit"
    )
    assert failed(
        result,
        "model.source.revision: found 'main', expected a commit, 40 hex digits, "
        f"because a branch or tag can move; {advice}",
    )
    assert not (tmp_path / "ok").exists()
