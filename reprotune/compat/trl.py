"""TRL: steps of its trainers that an exact, cached run leaves out, and its counts of FLOPs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import trl.trainer.dpo_trainer
import trl.trainer.utils
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedConfig, Trainer
from trl import DPOTrainer
from trl.kernels import ChunkedLogProbFunction


def score_only_labelled_tokens() -> None:
    """Have TRL's fused LM head compute only the positions that have a label.

    On a device without Triton it computes every position, because new shapes would make a compiler start
    anew; nothing is compiled here. Seen with TRL 1.16.0.
    """
    trl.trainer.utils._use_triton = lambda _: True


def skip_hashing_the_model() -> None:
    """Do not hash all weights when a DPOTrainer is made.

    The hash is part of the key of TRL's own cache of reference log-probs
    (https://github.com/huggingface/trl/pull/5906), which is not used here. Seen with TRL 1.16.0.
    """
    trl.trainer.dpo_trainer.hash_module = lambda _: None


class CachedReferenceTrainer(DPOTrainer):
    """A DPOTrainer for pairs that are tokenized and have their reference log-probs.

    TRL's own expects texts, and computes the reference log-probs anew (a request to pass them in:
    https://github.com/huggingface/trl/issues/3985). Seen with TRL 1.16.0.
    """

    def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: object) -> Dataset:
        return dataset


def drop_frozen_copy(model: torch.nn.Module) -> None:
    """Delete `ref`, the frozen copy of the adapter that a DPOTrainer makes.

    It is for the reference log-probs, which are cached. Seen with TRL 1.16.0.
    """
    if isinstance(model, PeftModel):
        model.delete_adapter("ref")


@contextmanager
def adapter_dtype_kept(model: torch.nn.Module) -> Iterator[None]:
    """Undo the cast to bfloat16 that a trainer's constructor applies to an adapter on a quantized base.

    With it, the reference, the first DPO step and a resumed run would each see another model, and updates
    smaller than bfloat16 can tell apart would be lost (https://github.com/huggingface/trl/issues/7268 is
    about DoRA's magnitudes, which TRL casts no longer). Seen with TRL 1.16.0.
    """
    adapter = model.named_parameters() if isinstance(model, PeftModel) else ()
    kept = {name: parameter.detach().clone() for name, parameter in adapter if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if name in kept:
            parameter.data = kept[name]


def resume_token_count(trainer: Trainer, log_history: Sequence[dict[str, float]]) -> None:
    """Continue TRL's count of trained tokens, which restarts at 0 in a resumed run. Seen with TRL 1.16.0."""
    counts = [entry["num_tokens"] for entry in log_history if "num_tokens" in entry]
    trainer._total_train_tokens = counts[-1]


def head_log_probs(hidden: torch.Tensor, head: torch.nn.Linear, labels: torch.Tensor) -> torch.Tensor:
    """Log-probs of labels, (tokens,), from hidden states, (tokens, width), as TRL's fused LM head has them.

    TRL calls its kernel only inside a model's forward. Seen with TRL 1.16.0.
    """
    chunk = trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE
    log_probs, *_ = ChunkedLogProbFunction.apply(
        hidden, head.weight, head.bias, labels, 1.0, chunk, None, 1.0, ("log_probs",)
    )
    return log_probs


def flops_per_token(config: PreTrainedConfig, length: int) -> float | None:
    """FLOPs per token of a training step of all weights; None for an architecture that TRL cannot count.

    TRL does not export its function. Seen with TRL 1.16.0.
    """
    try:
        return trl.trainer.utils.compute_flops_per_token(config, length)
    except AttributeError:
        return None


def peak_flops(device: str, dtype: str) -> float | None:
    """Peak FLOP/s of a GPU from its data sheet; None for one that TRL does not list. Seen with TRL 1.16.0."""
    return trl.trainer.utils.get_peak_flops(device, dtype)


def known_devices(dtype: str) -> list[str]:
    """The GPUs that `peak_flops` lists for this dtype. Seen with TRL 1.16.0."""
    table = trl.trainer.utils._PEAK_FLOPS_BY_DEVICE
    return sorted({device.lower().replace(" ", "-") for device, by_dtype in table if dtype in by_dtype})
