"""How every model of a run decodes: by the base's generation settings, up to the end of a turn or of a text.

Saved models, scoring and chat take it from here. Otherwise a `repetition_penalty` of the base would apply to
the base and to adapters on it, and not to a model whose weights are all trained.
"""

from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedTokenizerBase

from reprotune.errors import InputError, first_line
from reprotune.records import read_json

UNSAVED = {"transformers_version", "_from_model_config"}


def of_run(base: Path, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """The base's generation config, which also stops at the tokenizer's end of turn."""
    config = of_base(base, base)
    own_ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    ends = [tokenizer.eos_token_id, *own_ends]
    config.eos_token_id = [end for end in dict.fromkeys(ends) if end is not None]
    config.pad_token_id = tokenizer.pad_token_id
    return config


def of_base(base: Path, name: object) -> GenerationConfig:
    """
    Args:
        name: of the base, for an error.

    Raises:
        InputError: its generation_config.json, or the settings in its config.json, cannot be read.
    """
    file = base / "generation_config.json"
    try:
        if file.exists():
            return GenerationConfig.from_pretrained(base, local_files_only=True)
        # as transformers does: models from before that file have such settings in their config.json
        file = base / "config.json"
        return GenerationConfig.from_model_config(read_json(file))
    except Exception as error:
        raise InputError(
            f"{name}: {file.name}: not a generation config that transformers can read ({first_line(error)}); "
            "correct the files of model.source; a damaged copy comes back with `dvc checkout`"
        ) from error


def content(config: GenerationConfig) -> dict[str, Any]:
    """What generation_config.json holds."""
    return {key: value for key, value in config.to_diff_dict().items() if key not in UNSAVED}
