"""Scoring: known log-probs give the known accuracy through lm-eval's own tasks, and a limit draws rows by seed."""

import pytest
from lm_eval.api.model import LM

from stages import InputError, evaluate, fetch_benchmark, tasks
from stages.records import read_parquet
from tests.conftest import changed
from tests.tiny import benchmark_rows

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
    metrics, samples = evaluate.score(Known(name, right), name, benchmark, data / name, seed=1)
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
    _, samples = evaluate.score(Known("winogrande", set(range(12))), "winogrande", benchmark, data / "winogrande", seed=3)
    assert [row["doc_id"] for row in samples] == drawn[3]
    rows = read_parquet(file).to_pylist()
    for sample in samples:
        assert rows[sample["doc_id"]]["sentence"] in sample["doc"].replace('\\"', '"')


def test_few_shot_examples_are_other_rows(data, settings):
    """From the scored split itself, and never the row that is scored."""
    benchmark = changed(settings, {"benchmarks.arc_challenge.num_fewshot": 11, "benchmarks.arc_challenge.limit": None}).benchmarks["arc_challenge"]
    _, samples = evaluate.score(Known("arc_challenge", set()), "arc_challenge", benchmark, data / "arc_challenge", seed=1)
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
        tasks.definitions(["gsm8k", "winograd"])
    with pytest.raises(InputError, match="expected null for a task that does not generate"):
        evaluate.score(
            Known("winogrande", set()), "winogrande", changed(settings, {"benchmarks.winogrande.max_new_tokens": 5}).benchmarks["winogrande"], data / "winogrande", 1
        )


def test_the_real_scorer_agrees_with_full_logits(data, settings, model, tokenizer):
    """HFLM on the tiny model: each choice's log-prob is that of the model's own logits."""
    import torch
    from lm_eval.models.huggingface import HFLM

    from stages import modeling

    base = modeling.load_base(model, settings.model)
    scorer = HFLM(pretrained=base, tokenizer=tokenizer, batch_size=4)
    _, samples = evaluate.score(scorer, "arc_challenge", settings.benchmarks["arc_challenge"], data / "arc_challenge", seed=1)
    for sample in samples:
        for choice, log_prob in zip(sample["choices"], sample["log_probs"], strict=True):
            prompt = tokenizer.encode(sample["prompt"])
            ids = torch.tensor([tokenizer.encode(sample["prompt"] + choice)])
            with torch.no_grad():
                scores = base(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            assert float(scores[len(prompt) - 1 :].sum()) == pytest.approx(log_prob, abs=1e-3)
