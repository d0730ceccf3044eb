"""lm-eval models whose answers are known, and the benchmarks that the guide adds."""

import re

from lm_eval.api.model import LM
from ruamel.yaml import YAML

from reprotune import params
from reprotune.errors import InputError
from reprotune.evaluation import sandbox
from tests.tiny import ROOT, benchmark_rows

TASKS = list(benchmark_rows())
GOLD = {
    "arc_challenge": lambda row: "ABCD".index(row["answerKey"]),
    "commonsense_qa": lambda row: "ABCDE".index(row["answerKey"]),
    "hellaswag": lambda row: int(row["label"]),
    "winogrande": lambda row: int(row["answer"]) - 1,
}


class Known(LM):
    """Knows the gold answers: right about the rows in `right`, wrong about the others."""

    def __init__(self, name: str, right: set[int]):
        super().__init__()
        self.name, self.right = name, right
        self.rows = benchmark_rows()[name][1]

    def loglikelihood(self, requests, **_):
        answers = []
        for request in requests:
            number, choice = self.number(request.doc), request.idx
            gold = GOLD[self.name](self.rows[number])
            chosen = gold if number in self.right else next(wrong for wrong in (0, 1) if wrong != gold)
            answers.append((-1.0 - choice / 100 if choice == chosen else -5.0 - choice / 100, False))
        return answers

    def number(self, doc):
        def is_source(row):
            return all(doc[key] == value for key, value in row.items() if key in doc)

        return next(number for number, row in enumerate(self.rows) if is_source(row))

    def generate_until(self, requests, **_):
        numbers = [self.number(request.doc) for request in requests]
        answers = [number + 1 if number in self.right else number + 2 for number in numbers]
        return [f"so it is\n#### {answer}" for answer in answers]

    def loglikelihood_rolling(self, requests, **_):
        raise AssertionError("no task here asks for this")


class Writer(Known):
    """Writes what a function of the document gives."""

    def __init__(self, write):
        LM.__init__(self)
        self.write = write

    def generate_until(self, requests, **_):
        return [self.write(request.doc) for request in requests]


def packaged() -> dict[str, params.Benchmark]:
    """The entries of docs/guides/benchmarks.md, whose rows come from a package."""
    page = (ROOT / "docs" / "guides" / "benchmarks.md").read_text()
    (block,) = re.findall(r"```yaml\n(benchmarks:.*?)```", page, re.DOTALL)
    entries = YAML(typ="safe", pure=True).load(block)["benchmarks"]
    return {name: params.Benchmark.model_validate(entry) for name, entry in entries.items()}


def no_sandbox() -> str:
    """Why code cannot be run safely here; empty if it can."""
    try:
        sandbox.check()
    except InputError as error:
        return str(error)
    return ""
