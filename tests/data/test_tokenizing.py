"""Both tokenizing stages: bytes that no number of processes changes, bad rows, and killed processes."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from reprotune.data import packing, tokenizing
from reprotune.data.tables import write_table
from reprotune.errors import InputError
from reprotune.records import write_parquet
from tests import steps
from tests.conftest import changed
from tests.tiny import ROOT

BYTES_CODE = """
import sys
from pathlib import Path
from reprotune import params_file
from tests import steps, tiny
from tests.conftest import changed
if __name__ == "__main__":
    world, out, processes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    values = {"tokenize.sft.deduplicate.near": 0.3, "tokenize.sft.held_out": 100}
    settings = changed(params_file.load(world / "params.yaml"), values)
    steps.tokenize_sft(settings, world / "tiny" / "model", tiny.alpaca_rows(1800), out, processes)
    steps.tokenize_dpo(settings, world / "tiny" / "model", tiny.preference_rows(1200), out, processes)
"""


def tokenize_sft(settings, paths):
    tokenizing.instructions(settings, paths, packing.packer(settings.tokenize.sft))


@pytest.mark.slow
def test_no_number_of_processes_and_no_hash_seed_changes_a_byte(world, tmp_path):
    outcomes = []
    for processes, seed in ((1, "0"), (3, "random")):
        folder = tmp_path / str(processes)
        command = [sys.executable, "-c", BYTES_CODE, str(world), str(folder), str(processes)]
        result = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PYTHONHASHSEED": seed}, text=True, capture_output=True
        )
        assert result.returncode == 0, result.stderr
        accounts = {name: steps.account(folder / name) for name in ("sft_data.json", "dpo_data.json")}
        outcomes.append(
            (steps.content(folder / "sft_tokens"), steps.content(folder / "dpo_tokens"), accounts)
        )
    assert outcomes[0] == outcomes[1]
    assert accounts["sft_data.json"]["total"]["rows"]["near_duplicate"] > 0


GOOD = [
    json.dumps({"instruction": f"say {n}", "input": "", "output": "red cat"}).encode() for n in range(200)
]
BAD = {
    "a missing key": (b'{"instruction": "say", "input": ""}', "`output` is missing"),
    "a wrong type": (
        b'{"instruction": "say", "input": "", "output": ["a"]}',
        "`output` is a list, expected a text as in other rows",
    ),
    "an empty answer": (b'{"instruction": "say", "input": "", "output": ""}', "`output` is empty"),
    "no object": (b'["say"]', "the row is a list, expected an object"),
    "broken JSON": (b'{"instruction": "say', "line 101 is not JSON"),
    "invalid UTF-8": (
        b'{"instruction": "say", "input": "", "output": "caf\xe9"}',
        "`output` holds the byte 0xe9, which is not UTF-8",
    ),
    "NUL": (b'{"instruction": "say", "input": "", "output": "a\\u0000b"}', "`output` holds a NUL character"),
    "a lone surrogate": (
        b'{"instruction": "say", "input": "", "output": "\\ud800"}',
        "`output` holds the lone surrogate U+D800",
    ),
    "a 1 MB line": (
        b'{"instruction": "say", "input": "", "output": "' + b"cat " * 250_000 + b'"}',
        "tokens, max_length is 128",
    ),
    "deep nesting": (b"[" * 100_000 + b"]" * 100_000, "line 101 is not JSON"),
    "nesting that tables cannot hold": (
        b'{"instruction": ' + b"[" * 60 + b"]" * 60 + b"}",
        "`instruction` is",
    ),
    "deep nesting in another column": (
        b'{"instruction": "say", "output": "cat", "extra": ' + b'{"a": ' * 600 + b"1" + b"}" * 601,
        "`extra` is more than 16 levels deep",
    ),
    "a number of 5,000 digits": (
        b'{"instruction": "say", "output": ' + b"1" * 5_000 + b"}",
        "line 101 is not JSON",
    ),
    "a huge number": (b'{"instruction": 1' + b"0" * 30 + b"}", "`instruction` is a number"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_accounted_for_or_fails_the_stage(name, settings, model, tmp_path):
    line, expected = BAD[name]
    file = tmp_path / "rows.jsonl"
    file.write_bytes(b"\n".join([*GOOD[:100], line, *GOOD[100:]]) + b"\n")
    check_bad_row(file, expected, settings, model, tmp_path)


@pytest.mark.parametrize(
    ("turns", "expected"),
    [
        ([{"from": "gpt", "value": "red"}], "turn 0 is the assistant's, expected the user's"),
        ([{"from": "human", "value": "red"}] * 2, "turn 1 is the user's, expected the assistant's"),
        (
            [{"from": ("human", "gpt")[n % 2], "value": "cat"} for n in range(10_000)],
            "tokens, max_length is 128",
        ),
    ],
)
def test_bad_turns_are_accounted_for_or_fail_the_stage(turns, expected, settings, model, tmp_path):
    chats = [
        {"conversations": [{"from": "human", "value": f"say {n}"}, {"from": "gpt", "value": "red cat"}]}
        for n in range(200)
    ]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([*chats[:100], {"conversations": turns}, *chats[100:]]))
    check_bad_row(
        file, expected, changed(settings, {"data.sft.sources.rows.format": "sharegpt"}), model, tmp_path
    )


def test_a_parquet_row_that_cannot_be_read_is_accounted_for(settings, model, tmp_path):
    """Arrow does not check that texts are UTF-8, nor that dates are within a calendar."""
    answers = pa.array([b"red cat %d" % n for n in range(200)]).cast(pa.string())
    bad = pa.Array.from_buffers(pa.string(), 1, pa.array([b"caf\xe9"]).buffers())
    stamps = pa.array([0] * 150 + [2**60] + [0] * 50, pa.timestamp("ms"))
    table = pa.table(
        {
            "instruction": [f"say {n}" for n in range(201)],
            "output": pa.concat_arrays([answers[:100], bad, answers[100:]]),
            "when": stamps,
        }
    )
    pq.write_table(table, tmp_path / "rows.parquet")
    write_table(tmp_path / "rows.parquet", tmp_path / "raw_sft" / "rows.parquet", "rows")
    values = {"tokenize.sft.max_dropped": 0.02, "data.sft.sources.rows.ignore": ["when"]}
    tokenize_sft(changed(settings, values), steps.tokenize_paths(model, tmp_path, "sft"))
    (first, second) = steps.dropped(tmp_path)
    assert first[:2] == (100, "invalid")
    assert "a value cannot be read: 'utf-8' codec can't decode byte 0xe9" in first[2]
    assert second[:2] == (150, "invalid") and "a value cannot be read" in second[2]


SLOW_CODE = BYTES_CODE.replace("tiny.alpaca_rows(1800)", "tiny.alpaca_rows(60_000)")


@pytest.mark.slow
@pytest.mark.parametrize("victim", ["a worker", "the stage"])
def test_killed_processes_leave_a_clear_message_and_nothing_behind(victim, world, tmp_path):
    command = [
        sys.executable,
        "-c",
        "from reprotune.process import command\n"
        + SLOW_CODE.replace('if __name__ == "__main__":', "def main():")
        + "\ncommand(main)",
    ]
    process = subprocess.Popen(
        [*command, str(world), str(tmp_path / "out"), "2"],
        cwd=ROOT,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    root = psutil.Process(process.pid)
    while len(workers := root.children()) < 2:
        assert process.poll() is None
        time.sleep(0.1)
    time.sleep(1)
    (workers[0] if victim == "a worker" else root).send_signal(signal.SIGKILL)
    message = process.communicate(timeout=60)[1]
    if victim == "a worker":
        assert process.returncode == 1 and "Traceback" not in message
        expected = "error: a process that tokenizes was ended from outside, most likely for want of memory"
        assert expected in message
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert not (tmp_path / "out" / "sft_tokens").exists()


def check_bad_row(file, expected, settings, model, folder):
    raw = folder / "raw_sft" / "rows.parquet"
    raw.parent.mkdir()
    assert write_table(file, raw, "rows") == 201
    paths = steps.tokenize_paths(model, folder, "sft")
    with pytest.raises(InputError) as error:
        tokenize_sft(settings, paths)
    assert "tokenize.sft.max_dropped: 1 of 201 rows of rows" in str(error.value)
    assert f"{raw}, row 100: " in str(error.value) and expected in str(error.value)
    tokenize_sft(changed(settings, {"tokenize.sft.max_dropped": 0.02}), paths)
    ((row, reason, detail),) = steps.dropped(folder)
    assert row == 100 and reason == ("overlong" if "tokens" in expected else "invalid") and expected in detail


LOOP = "{%- for message in messages -%}"
RAISE = "{%- if 'dog' in message['content'] -%}{{ raise_exception('no dogs') }}{%- endif -%}"
ASSISTANT = "if message['role'] == 'assistant'"


@pytest.mark.parametrize(
    ("part", "instead", "expected"),
    [
        (LOOP, LOOP + RAISE, "the template cannot render it (TemplateError: no dogs)"),
        (ASSISTANT, ASSISTANT + " and 'dog' not in message['content']", "the template marks 0 of 1 answers"),
    ],
)
def test_a_row_that_the_template_fails_on_is_accounted_for(
    part, instead, expected, settings, model, tmp_path
):
    template = (ROOT / "templates" / "chatml.jinja").read_text()
    assert template.count(part) == 1
    (tmp_path / "templates").mkdir()
    (tmp_path / "templates" / "chatml.jinja").write_text(template.replace(part, instead))
    rows = [
        {"instruction": f"say {n}", "input": "", "output": "a dog" if n in (3, 17) else "a cat"}
        for n in range(20)
    ]
    write_parquet(tmp_path / "raw_sft" / "rows.parquet", rows)
    paths = steps.tokenize_paths(model, tmp_path, "sft")
    paths.templates = tmp_path / "templates"
    tokenize_sft(changed(settings, {"tokenize.sft.max_dropped": 0.1}), paths)
    assert steps.dropped(tmp_path) == [(number, "invalid", expected) for number in (3, 17)]


def test_too_few_rows_are_explained_by_those_that_left(settings, model, tmp_path):
    rows = [{"instruction": f"say {n}", "input": "", "output": ""} for n in range(5)]
    settings = changed(settings, {"tokenize.sft.max_dropped": 1.0})
    expected = (
        r"0 of 5 rows are kept, .*Left out: 5 invalid\. The first:\n.*row 0: invalid: `output` is empty"
    )
    with pytest.raises(InputError, match=expected):
        steps.tokenize_sft(settings, model, rows, tmp_path)
