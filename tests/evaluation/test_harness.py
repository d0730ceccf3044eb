"""lm-eval's own tasks on local rows: known answers give the known metrics, and samples are lm-eval's own."""

import pytest
from lm_eval.models.huggingface import HFLM

from reprotune import params_file
from reprotune.data import benchmarks
from reprotune.data.templates import load_tokenizer
from reprotune.errors import InputError
from reprotune.evaluation import harness, lm_eval_model, tasks
from reprotune.model import loading
from reprotune.records import read_parquet, write_parquet
from tests.conftest import changed
from tests.evaluation.known import TASKS, Known, Writer, no_sandbox, packaged
from tests.tiny import ROOT, benchmark_rows

needs_sandbox = pytest.mark.skipif(no_sandbox() != "", reason=no_sandbox() or "there is one")


def benchmark_with(settings, name, **values):
    values = {f"benchmarks.{name}.{key}": value for key, value in values.items()}
    return changed(settings, values).benchmarks[name]


@pytest.mark.parametrize("name", TASKS)
def test_known_log_probs_give_the_known_accuracy(name, data, settings):
    right = {0, 1, 4, 7, 8}
    benchmark = benchmark_with(settings, name, limit=None, max_new_tokens=None)
    metrics, samples, _ = harness.score(Known(name, right), name, benchmark, data / name, seed=1)
    assert metrics["n"] == len(samples) == 12
    assert metrics["score"] == pytest.approx(5 / 12)
    assert metrics["stderr"] == pytest.approx((5 / 12 * 7 / 12 / 11) ** 0.5)
    assert [row["doc_id"] for row in samples] == list(range(12))
    assert {row["doc_id"] for row in samples if row["correct"]} == right
    if name == "gsm8k":
        assert all(row["generation"].startswith("so it is") and row["log_probs"] is None for row in samples)
        assert [row["predicted"] for row in samples][:3] == ["1", "2", "4"]
        return
    for row in samples:
        assert row["log_probs"].index(max(row["log_probs"])) == int(row["predicted"])
        assert len(row["choices"]) == len(row["log_probs"]) and row["generation"] is None


def test_few_shot_examples_are_other_rows(data, settings):
    """They come from the scored split itself, and are never the row that is scored."""
    name = "arc_challenge"
    benchmark = benchmark_with(settings, name, num_fewshot=11, limit=None)
    _, samples, _ = harness.score(Known(name, set()), name, benchmark, data / name, seed=1)
    for sample, row in zip(samples, benchmark_rows()[name][1], strict=True):
        questions = [line for line in sample["prompt"].splitlines() if line.startswith("Question: ")]
        assert len(questions) == 12 and questions[-1] == f"Question: {row['question']}"
        assert questions.count(questions[-1]) == 1


def test_the_number_of_new_tokens_reaches_the_task(data, settings):
    seen = []

    class Asked(Known):
        def generate_until(self, requests, **_):
            seen.extend(request.args[1] for request in requests)
            return super().generate_until(requests)

    harness.score(Asked("gsm8k", set()), "gsm8k", settings.benchmarks["gsm8k"], data / "gsm8k", seed=1)
    assert seen
    for arguments in seen:
        assert arguments["max_gen_toks"] == 8 and not arguments["do_sample"]
        assert "Question:" in arguments["until"]


def test_unknown_metrics_and_tasks_are_named(data, settings):
    name = "winogrande"
    message = r"benchmarks\.winogrande\.metric: found 'acc_norm,none', expected one of \['acc,none'\]"
    with pytest.raises(InputError, match=message):
        benchmark = benchmark_with(settings, name, metric="acc_norm,none")
        harness.score(Known(name, set()), name, benchmark, data / name, seed=1)
    with pytest.raises(InputError, match=r"benchmarks\.winograd: lm-eval has no task"):
        tasks.definitions({"gsm8k": "gsm8k", "winograd": "winograd"})
    with pytest.raises(InputError, match="expected null for a task that does not generate"):
        benchmark = benchmark_with(settings, name, max_new_tokens=5)
        harness.score(Known(name, set()), name, benchmark, data / name, seed=1)


@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("name", TASKS)
def test_samples_are_those_of_the_harness(name, shots, data, settings, model, tokenizer):
    """lm-eval's own model gets the same requests and gives the same log-probs, texts and predictions."""
    base = loading.load_base(model, settings.model.model_copy(update={"quantization": "none"}))
    benchmark = benchmark_with(settings, name, limit=None, num_fewshot=shots)

    def scored(scorer):
        _, samples, protocol = harness.score(scorer, name, benchmark, data / name, seed=1)
        return protocol, [(row.pop("log_probs") or [], row) for row in samples]

    protocol, samples = scored(lm_eval_model.Scorer(base, tokenizer, 300, 4))
    stock_protocol, stock_samples = scored(HFLM(pretrained=base, tokenizer=tokenizer, batch_size=1))
    assert protocol == stock_protocol and len(samples) == 12
    for (log_probs, row), (stock_log_probs, stock_row) in zip(samples, stock_samples, strict=True):
        assert row == stock_row and log_probs == pytest.approx(stock_log_probs, abs=1e-4)


@pytest.fixture(scope="module")
def scorer(model):
    tokenizer = load_tokenizer(model, ROOT / "templates" / "chatml.jinja")
    unquantized = params_file.load(ROOT / "params.yaml").model.model_copy(update={"quantization": "none"})
    return lm_eval_model.Scorer(loading.load_base(model, unquantized), tokenizer, 512, 4)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_sandbox) if name == "humaneval" else name for name in packaged()]
)
def test_more_benchmarks_need_an_entry_alone(name, scorer, tmp_path):
    """The package's rows, with their own split and examples, are scored by lm-eval's own task."""
    benchmark = packaged()[name]
    benchmarks.run(name, benchmark, tmp_path)
    shorter = {"max_new_tokens": 4} if name == "humaneval" else {}
    limited = benchmark.model_copy(update={"limit": 6, **shorter})
    metrics, samples, protocol = harness.score(scorer, name, limited, tmp_path, 1)
    assert metrics["n"] == len(samples) == 6 and 0 <= metrics["score"] <= 1
    assert protocol["task"].startswith(benchmark.task or name)
    assert len({row["doc_id"] for row in samples}) == 6
    rows = read_parquet(tmp_path / f"{benchmark.split}.parquet").to_pylist()
    if name == "mmlu":
        scored = [rows[row["doc_id"]] for row in samples]
        assert len(rows) == 14_042 and len({row["subject"] for row in scored}) > 3
        for sample, row in zip(samples, scored, strict=True):
            subject = row["subject"].replace("_", " ")
            opening = f"The following are multiple choice questions (with answers) about {subject}."
            assert sample["prompt"].startswith(opening) and sample["prompt"].count("Answer:") == 6
            assert row["question"].strip() in sample["prompt"]


@pytest.mark.slow
def test_ifeval_needs_an_entry_alone(tmp_path):
    """IFEval's rows are on the Hub alone: rows of their form pass lm-eval's own checks as they should.

    The check of a text's language draws at random, and gives the same on a second run.
    """
    # instruction, its arguments, a text that follows it, and one that does not
    cases = [
        ("punctuation:no_comma", {}, "One word after the other", "One word, then another"),
        (
            "language:response_language",
            {"language": "de"},
            "Der Hund läuft schnell durch den Wald",
            "The dog runs through the wood",
        ),
        ("keywords:existence", {"keywords": ["red"]}, "A red cat", "A blue cat"),
        (
            "length_constraints:number_words",
            {"num_words": 3, "relation": "at least"},
            "One two three four",
            "One",
        ),
    ]
    keys = sorted({key for _, kwargs, *_ in cases for key in kwargs})
    rows = [
        {
            "key": number,
            "prompt": f"Question {number}",
            "instruction_id_list": [kind],
            "kwargs": [{key: kwargs.get(key) for key in keys}],
        }
        for number, (kind, kwargs, *_) in enumerate(cases)
    ]
    write_parquet(tmp_path / "train.parquet", rows)
    benchmark = packaged()["boolq"].model_copy(
        update={"split": "train", "fewshot_split": "train", "metric": "prompt_level_strict_acc,none"}
    )
    for right in ({0, 1, 2, 3}, {0, 3}, {1, 2}):
        writer = Writer(lambda doc, right=right: cases[doc["key"]][2 if doc["key"] in right else 3])
        for _ in range(2):
            metrics, samples, _ = harness.score(writer, "ifeval", benchmark, tmp_path, 1)
            assert {row["doc_id"] for row in samples if row["correct"]} == right
            assert metrics["score"] == len(right) / 4
    names = {metric["metric"] for metric in metrics["metrics"]}
    assert names >= {"inst_level_loose_acc,none", "prompt_level_loose_acc,none"}


@needs_sandbox
def test_code_is_run_and_scored(tmp_path):
    """The package's own solutions pass their tests and others do not; none run unless `run_code` says so."""
    benchmarks.run("humaneval", packaged()["humaneval"], tmp_path)
    rows = read_parquet(tmp_path / "test.parquet").to_pylist()

    def solved(row):
        return row["task_id"].endswith("0")

    solver = Writer(lambda row: row["canonical_solution"] if solved(row) else "    return None\n")
    benchmark = packaged()["humaneval"].model_copy(update={"limit": 40})
    metrics, samples, _ = harness.score(solver, "humaneval", benchmark, tmp_path, 1)
    expected = {row["doc_id"] for row in samples if solved(rows[row["doc_id"]])}
    assert {row["doc_id"] for row in samples if row["correct"]} == expected and 0 < len(expected) < 40
    assert metrics["score"] == pytest.approx(len(expected) / 40)
    message = (
        r"benchmarks\.humaneval\.run_code: humaneval runs code that the model writes, in a sandbox; "
        "true allows it"
    )
    with pytest.raises(InputError, match=message):
        forbidden = benchmark.model_copy(update={"run_code": False})
        harness.score(solver, "humaneval", forbidden, tmp_path, 1)
