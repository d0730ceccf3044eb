"""Reading params.yaml: the only place where it is read.

An error names the file, the dotted key, the value found and what was expected, one line a problem.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.error import YAMLError

from reprotune.errors import InputError
from reprotune.params import Params

PARAMS_FILE = Path("params.yaml")
TEMPLATES = Path("templates")
"""The folder of the chat templates."""

Resolve = Callable[[str, str, str], str | None]
"""(repo, repo_type, branch) to the commit that the branch points to now, or None."""


def load(path: Path = PARAMS_FILE, resolve: Resolve = lambda *_: None) -> Params:
    """Read and check a params file.

    Args:
        resolve: finds the commit that the message on an unpinned branch names.

    Raises:
        InputError: the file is no YAML, or a key is missing, unknown, double, out of range or unpinned.
    """
    try:
        content = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except DuplicateKeyError as error:
        line = error.problem_mark.line + 1
        raise InputError(f"{path}: {error.problem} (line {line}); keep one of the two") from error
    except FileNotFoundError:
        raise InputError(
            f"{path}: no such file; `git checkout {path}` restores it, `cp recipes/... {path}` takes another"
        ) from None
    except (YAMLError, ValueError, RecursionError, OSError) as error:
        if line := conflict(path):
            raise InputError(
                f"{path}: line {line} is the mark of a merge conflict; keep one side, remove "
                f"the marks, then `git add {path}`"
            ) from error
        raise InputError(f"{path}: not YAML: {error}") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{path}: found {type(content).__name__}, expected sections such as `seed:` and `model:`"
        )
    try:
        params = Params.model_validate(content)
    except ValidationError as error:
        problems = [problem(content, item, resolve) for item in error.errors()]
    else:
        problems = [*inconsistent(params), *unsupported(params)]
    if problems:
        raise InputError(f"{path}: " + f"\n{path}: ".join(problems))
    return params


def check_template(params: Params) -> None:
    """Refuse a chat template that is not there.

    Raises:
        InputError: naming those that are.
    """
    known = sorted(file.stem for file in TEMPLATES.glob("*.jinja"))
    if params.model.chat_template not in known:
        raise InputError(
            f"{PARAMS_FILE}: model.chat_template: found {params.model.chat_template!r}, expected one of "
            f"{', '.join(known)}, the files in {TEMPLATES}/"
        )


def conflict(path: Path) -> int:
    """The number of the line in which git marks a conflict; 0 if there is none."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((number for number, line in enumerate(lines, 1) if line.startswith("<<<<<<< ")), 0)


def inconsistent(params: Params) -> Iterator[str]:
    """Problems that no single key can show."""
    names = params.evaluate.benchmarks
    for name in names:
        if name not in params.benchmarks:
            known = sorted(params.benchmarks)
            yield f"evaluate.benchmarks: found {name!r}, expected one of {known} (the keys of benchmarks)"
    for name in names:
        if name not in params.contamination.columns:
            yield (
                f"contamination.columns: found no {name!r}, expected a column for each of evaluate.benchmarks"
            )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        yield f"evaluate.benchmarks: found {twice[0]!r} twice, expected each name once"
    for key, data in (("sft", params.data.sft), ("preferences", params.data.preferences)):
        if data.mix.keys() != data.sources.keys():
            yield (
                f"data.{key}.mix: found {sorted(data.mix)}, "
                f"expected the names in data.{key}.sources, {sorted(data.sources)}"
            )
    reported = params.report.reported.scores.keys() if params.report.reported else set()
    for name in sorted(reported - params.benchmarks.keys()):
        yield f"report.reported.scores: found {name!r}, expected one of {sorted(params.benchmarks)}"
    for name, stage in (("sft", params.sft), ("dpo", params.dpo)):
        if stage.global_batch_size % stage.micro_batch_size:
            yield (
                f"{name}.global_batch_size: found {stage.global_batch_size}, expected a multiple of "
                f"{name}.micro_batch_size ({stage.micro_batch_size})"
            )


def unsupported(params: Params) -> Iterator[str]:
    """Combinations that a library refuses, or takes without doing what they say."""
    model, lora, dpo, sft = params.model, params.lora, params.dpo, params.sft
    if lora.method == "full" and model.quantization != "none":
        yield (
            "lora.method: found 'full', expected lora or dora with model.quantization "
            f"{model.quantization!r}: quantized weights cannot be trained"
        )
    if model.attention == "flash_attention_2" and model.dtype != "bfloat16":
        yield (
            "model.attention: found 'flash_attention_2', expected sdpa or eager with model.dtype "
            f"{model.dtype!r}: its kernels take bfloat16"
        )
    if "lm_head" in lora.target_modules:
        yield (
            "lora.target_modules: found 'lm_head', expected layers below it: log-probs are computed from the "
            "LM head's own weights alone"
        )
    if sft.neftune_noise_alpha is not None and sft.micro_batch_size > 1:
        yield (
            f"sft.neftune_noise_alpha: found {sft.neftune_noise_alpha}, expected null with "
            f"sft.micro_batch_size {sft.micro_batch_size}: the noise falls with the tokens computed at once, "
            "so more than one row would change it; set micro_batch_size to 1"
        )
    needs_smoothing = dpo.loss in ("robust", "exo_pair")
    if needs_smoothing != (dpo.label_smoothing > 0):
        expected = "more than 0" if needs_smoothing else "0"
        found = f"found {dpo.label_smoothing}, expected {expected} with dpo.loss {dpo.loss!r}"
        yield f"dpo.label_smoothing: {found}"


def problem(content: Any, error: Mapping[str, Any], resolve: Resolve) -> str:
    """One pydantic error as one line.

    The tag of a union stands in the error's location but in no file, so it is left out of the key.
    """
    keys, here, around = [], content, content
    for part in error["loc"]:
        if (isinstance(here, dict) and part in here) or (isinstance(here, list) and isinstance(part, int)):
            keys.append(str(part))
            here, around = here[part], here
        elif part == error["loc"][-1] and error["type"] == "missing":
            keys.append(str(part))
    key, kind = ".".join(keys), error["type"]
    if kind == "missing":
        return f"{key}: missing; expected a value, there are no defaults"
    if kind == "unknown_key":
        unknown = error["ctx"]["key"]
        whole = ".".join([*keys, str(unknown)])
        return (
            f"{whole}: found {here[unknown]!r} under an unknown key; expected one of {error['ctx']['known']}"
        )
    if kind == "unpinned":
        return f"{key}: found {here!r}, {error['msg']}; {how_to_pin(around, here, resolve)}"
    if kind in ("model_type", "dict_type"):
        return f"{key}: found {here!r}, expected keys with values under it"
    if kind == "union_tag_not_found":
        return f"{key}: found {here!r}, expected a key `kind`: hub, pypi, local or split"
    expected = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if not expected.startswith("expected"):
        expected = f"expected {expected[0].lower()}{expected[1:]}"
    return f"{key}: found {here!r}, {expected}"


def how_to_pin(source: Mapping[str, Any], branch: str, resolve: Resolve) -> str:
    """Which commit to put in a branch's place, or how to find it."""
    known = {"repo", "repo_type"} <= source.keys()
    if commit := resolve(source["repo"], source["repo_type"], branch) if known else None:
        return f"it is now at {commit}"
    folder = "datasets/" if source.get("repo_type") == "dataset" else ""
    url = f"https://huggingface.co/{folder}{source.get('repo', 'REPO')}"
    return f"`git ls-remote {url} {branch}` prints the commit"
