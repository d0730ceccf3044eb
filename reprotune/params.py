"""params.yaml as frozen, typed models, one class a section.

There are no defaults: what a run used stands in its params file. `params_file` reads and checks it.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


def pinned(revision: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{40}", revision):
        raise PydanticCustomError(
            "unpinned", "expected a commit, 40 hex digits, because a branch or tag can move"
        )
    return revision


def sha256(digest: str) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError("expected a sha256, 64 hex digits; `pip hash ARCHIVE` and `sha256sum FILE` print it")
    return digest


Name = Annotated[str, Field(pattern=r"^\w[\w-]*$")]
Percent = Annotated[float, Field(ge=0, le=100)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def known_keys(cls, content: Any) -> Any:
        """Refuse an unknown key with the list of known ones, which pydantic's own error does not give."""
        unknown = [key for key in content if key not in cls.model_fields] if isinstance(content, dict) else []
        if unknown:
            raise PydanticCustomError(
                "unknown_key", "unknown key", {"key": unknown[0], "known": ", ".join(cls.model_fields)}
            )
        return content


class HubSource(Section):
    kind: Literal["hub"]
    repo: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    """Owner and name of a repository on the Hugging Face Hub."""
    repo_type: Literal["model", "dataset"]
    revision: Annotated[str, AfterValidator(pinned)]
    """A commit."""
    files: Annotated[list[str], Field(min_length=1)]
    """Paths or glob patterns in the repository."""


class PypiSource(Section):
    kind: Literal["pypi"]
    package: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    version: Annotated[str, Field(pattern=r"^[\w.+!-]+$")]
    sha256: Annotated[str, AfterValidator(sha256)]
    """Hash of the archive. It decides whether pip downloads the wheel or the sdist."""
    path: Annotated[str, Field(min_length=1)]
    """File or folder in the wheel, or below the sdist's top folder."""


class LocalSource(Section):
    kind: Literal["local"]
    path: Annotated[str, Field(min_length=1)]
    sha256: Annotated[str, AfterValidator(sha256)]
    """Hash of the file, or of a folder's file names and hashes in order. An error prints the right one."""


class SplitSource(Section):
    kind: Literal["split"]
    path: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")]
    """Name of the whole file. Its end says what the file is, as in `model.gguf`."""
    sha256: Annotated[str, AfterValidator(sha256)]
    """Hash of the whole file: whether all parts are there, in order."""
    parts: Annotated[list[PypiSource], Field(min_length=2)]
    """Its parts, in order."""


Source = Annotated[HubSource | PypiSource | LocalSource | SplitSource, Field(discriminator="kind")]


class Model(Section):
    source: Source
    chat_template: Annotated[str, Field(pattern=r"^\w[\w-]*$")]
    """Name of a file in templates/, without `.jinja`."""
    quantization: Literal["none", "nf4"]
    """Type of the base's linear weights, in training and scoring (nf4: https://arxiv.org/abs/2305.14314)."""
    dtype: Literal["float32", "bfloat16"]
    """Type of the weights that are not quantized, and of all arithmetic."""
    attention: Literal["sdpa", "eager", "flash_attention_2"]
    """sdpa runs everywhere; flash_attention_2 needs its own package and a GPU."""


class SftSource(Section):
    source: Source
    format: Literal["alpaca", "sharegpt", "messages", "prompt_completion", "openorca"]
    """How its rows become conversations (reprotune/data/formats.py)."""
    ignore: list[str]
    """Keys of rows and turns that change nothing that matters. A row with another unknown key is invalid."""


class PreferenceSource(Section):
    source: Source
    format: Literal["sharegpt", "ultrafeedback", "scored"]
    """How its rows become preference pairs (reprotune/data/formats.py)."""
    ignore: list[str]
    """As for SFT sources."""


class Share(Section):
    limit: Annotated[int, Field(ge=1)] | None
    """Raw rows taken from the source, a seeded subset; null takes all."""
    weight: Annotated[float, Field(gt=0, le=1000)]
    """How often an epoch sees a row: 1 once; 0.5 a seeded half of the rows; 2.5 all twice, half thrice."""


class Mixture(Section):
    mix: Annotated[dict[Name, Share], Field(min_length=1)]
    """How much of each source is trained on."""
    exclude_contaminated: bool
    """Leave out rows that hold a benchmark's row, as the stage `contamination` finds them."""


class SftData(Mixture):
    sources: Annotated[dict[Name, SftSource], Field(min_length=1)]


class PreferencesData(Mixture):
    sources: Annotated[dict[Name, PreferenceSource], Field(min_length=1)]


class Data(Section):
    sft: SftData
    preferences: PreferencesData


class Deduplicate(Section):
    exact: bool
    """Drop a row whose text came before, apart from letter case, spacing and Unicode form."""
    near: Annotated[float, Field(gt=0, lt=1)] | None
    """Drop a row whose 5-word shingles have this Jaccard similarity with an earlier row's; null keeps it."""


class Tokenize(Section):
    held_out: Annotated[int, Field(ge=1)]
    """Rows that are kept out of training, to measure on."""
    max_length: Annotated[int, Field(ge=16, le=2**20)]
    """Tokens of a row; of a pair, its prompt and its longer answer."""
    overlong: Literal["drop", "truncate", "error"]
    """What becomes of a longer row. truncate cuts off its end, the end-of-turn token included."""
    deduplicate: Deduplicate
    max_dropped: Annotated[float, Field(ge=0, le=1)]
    """Share of rows that may be invalid, overlong, or without labels or preference before the stage fails."""


class TokenizeSft(Tokenize):
    packing: bool
    """Fill rows of max_length with several whole examples that cannot see each other."""


class Tokenizing(Section):
    sft: TokenizeSft
    dpo: Tokenize


class Contamination(Section):
    columns: Annotated[dict[Name, str], Field(min_length=1)]
    """For each benchmark, the column whose words are searched for in the training data."""
    coverage: Annotated[float, Field(gt=0, le=1)]
    """Share of a row's words that 8-grams of one training row must cover; one shared 13-gram is enough."""


class Lora(Section):
    method: Literal["lora", "dora", "full"]
    """lora and dora (https://arxiv.org/abs/2402.09353) train an adapter; full trains all weights."""
    r: Annotated[int, Field(ge=1, le=4096)]
    """Rank of the adapter's two matrices (LoRA, https://arxiv.org/abs/2106.09685)."""
    alpha: Annotated[int, Field(ge=1, le=2**16)]
    """The product of the two matrices is scaled by alpha / r."""
    dropout: Annotated[float, Field(ge=0, lt=1)]
    """Share of the adapter's inputs that a training step zeroes."""
    target_modules: (
        Literal["all-linear"] | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    )
    """Layers that get an adapter, by the ends of their names; all-linear: all but the LM head."""


class Training(Section):
    global_batch_size: Annotated[int, Field(ge=1)]
    """Rows an optimizer step, over all devices. sft: packed rows or examples; dpo: pairs."""
    micro_batch_size: Annotated[int, Field(ge=1)]
    """Rows a device computes at once. It changes speed and memory, and the result by rounding alone."""
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    """The highest one, after warm-up."""
    lr_scheduler: Literal["constant", "linear", "cosine", "inverse_sqrt"]
    """How the learning rate falls after warm-up; linear and cosine end at 0."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)]
    """Share of the steps in which the learning rate rises."""
    weight_decay: Annotated[float, Field(ge=0, le=10)]
    """Of AdamW."""
    max_grad_norm: Annotated[float, Field(gt=0)]
    """A larger gradient is scaled down to this norm."""
    gradient_checkpointing: bool
    """Recompute activations in the backward pass: less memory, more time, the same result."""
    measurements: Annotated[int, Field(ge=0)]
    """How often the held-out rows are measured between the measurements before and after training."""
    use_liger_kernel: bool
    """Use the fused kernels of the package liger-kernel, which needs a GPU and rounds differently."""


class Sft(Training):
    epochs: Annotated[float, Field(gt=0, le=1000)]
    """Passes over the rows."""
    neftune_noise_alpha: Annotated[float, Field(gt=0, le=100)] | None
    """Noise on the embeddings (https://arxiv.org/abs/2310.05914), scaled over the packed row; null: none."""


class Dpo(Training):
    steps: Annotated[int, Field(ge=1, le=10**7)]
    """Optimizer steps. The pairs are passed over as often as that takes."""
    beta: Annotated[float, Field(gt=0, le=1000)]
    """How strongly the policy is held to its reference: rewards are beta times the log-ratio."""
    loss: Literal[
        "sigmoid",
        "sigmoid_norm",
        "ipo",
        "hinge",
        "robust",
        "exo_pair",
        "nca_pair",
        "bco_pair",
        "sppo_hard",
        "apo_zero",
        "apo_down",
    ]
    """TRL's name. sigmoid is DPO's own loss; sigmoid_norm takes log-ratios a token, as SimPO does."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]
    """Share of pairs assumed to be labelled the wrong way round; robust and exo_pair need it."""


class Reference(Section):
    batch_size: Annotated[int, Field(ge=1)]
    """Pairs computed at once."""


class Evaluate(Section):
    benchmarks: Annotated[list[Name], Field(min_length=1)]
    """The benchmarks to score, keys of `benchmarks`."""
    batch_tokens: Annotated[int, Field(ge=1)]
    """Tokens of requests scored at once."""
    batch_texts: Annotated[int, Field(ge=1)]
    """Sequences generated at once."""
    chat_template: bool
    """Ask in the turns of a chat, for benchmarks that do not say so themselves."""
    backend: Literal["transformers", "vllm"]
    """What computes: this project's scoring on transformers, or lm-eval's on vLLM."""


class Benchmark(Section):
    source: Source
    format: Literal["hub", "arrow", "arrow_boolq", "olmes_arc", "olmes_gsm8k", "olmes_humaneval"]
    """Form of its rows (reprotune/data/benchmarks.py): Parquet or Arrow by split, or OLMES requests."""
    split: Literal["train", "validation", "test"]
    """The split that is scored."""
    fewshot_split: Literal["train", "dev", "validation", "test"]
    """The split that few-shot examples come from. A row is never its own example."""
    num_fewshot: Annotated[int, Field(ge=0, le=100)]
    limit: Annotated[int, Field(ge=2)] | None
    """Rows scored, a seeded subset of the split; null scores all."""
    metric: Annotated[str, Field(pattern=r"^[\w@]+,[\w-]+$")]
    """The task's metric that is compared, as lm-eval names it: metric,filter."""
    max_new_tokens: Annotated[int, Field(ge=1)] | None
    """Tokens generated at most; null takes the task's own limit, as tasks that generate nothing need."""
    task: Annotated[str, Field(pattern=r"^[\w.-]+(\{\w+\}[\w.-]*)?$")] | None
    """lm-eval's task; null: the benchmark's name. mmlu_{subject} is a task for each value of that column."""
    chat_template: bool | None
    """Ask in the turns of a chat; null takes evaluate.chat_template."""
    run_code: bool
    """Allow running code that the model writes, in a sandbox, as humaneval asks."""


class Merge(Section):
    max_kl: Annotated[float, Field(gt=0)]
    """Largest KL divergence of the merged model from the adapter, in nats a token of held-out SFT rows."""
    min_agreement: Annotated[float, Field(ge=0, le=1)]
    """Smallest share of those tokens at which both models find the same token likeliest."""


class ReportedScores(Section):
    base: Percent
    sft: Percent
    dpo: Percent


class Reported(Section):
    source: Annotated[str, Field(min_length=1)]
    """Who reported the scores, where, and of what run."""
    scores: Annotated[dict[Name, ReportedScores], Field(min_length=1)]
    """Scores in percent, by benchmark."""


class Licences(Section):
    model: str | None
    """null, as a missing name below: the report says that the licence is not stated."""
    sft: dict[Name, str]
    preferences: dict[Name, str]
    benchmarks: dict[Name, str]


class Report(Section):
    title: Annotated[str, Field(min_length=1)]
    note: str | None
    """What a reader must know to read the numbers. It stands under the title."""
    language: Literal["en", "zh"]
    """Language of the report, its figures and the model card."""
    licences: Licences
    """Licences of what the run is made from, as the publishers state them."""
    reported: Reported | None
    """Published scores to compare with; null: none."""


class Params(Section):
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    """Seed of every draw: rows, their order, adapter weights, dropout, benchmark rows, few-shot examples."""
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
