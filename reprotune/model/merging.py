"""Fold the trained adapter into the base: one bfloat16 model, loaded by transformers and vLLM as usual.

A gate compares the written model with the adapter on the same base, on the held-out SFT rows.
"""

import argparse
from itertools import accumulate, pairwise

import datasets
import torch
from peft import PeftModel
from tqdm import tqdm

from reprotune import params
from reprotune.data.chat_tokens import IGNORED
from reprotune.data.shards import read_shards
from reprotune.data.templates import load_tokenizer, template_file
from reprotune.errors import InputError
from reprotune.model import determinism, loading, policies, saving
from reprotune.model.policies import Policy
from reprotune.records import write_metrics


def run(settings: params.Params, paths: argparse.Namespace) -> None:
    """Write the merged model and how its predictions differ from the adapter's.

    With `model.quantization: nf4` the scored model has a quantized base. The merged model's distance from it
    is measured as well; it comes from the quantization, so the gate does not count it.

    Raises:
        InputError: the merged model is further from the adapter than `merge` allows.
    """
    determinism.start(settings.seed)
    unquantized = settings.model.model_copy(update={"quantization": "none"})
    write_merged(settings, unquantized, paths)
    rows, merged = read_shards(paths.data, "held_out"), loading.load_base(paths.out, unquantized)
    differences = scored = compare(loading.load_policy(paths.base, paths.adapter, unquantized), merged, rows)
    if settings.model != unquantized:
        dequantized = loading.fits_dequantized(paths.base, settings.model)
        policy = loading.load_policy(paths.base, paths.adapter, settings.model, dequantized=dequantized)
        scored = compare(policy, merged, rows)
    details = {"agreement": differences["agreement"], "n": differences["n"]}
    details |= {f"scored_{key}": scored[key] for key in ("kl", "agreement")}
    write_metrics(paths.metrics, {"kl": differences["kl"]}, details)
    for name, values in (("the adapter on the same base", differences), ("the scored model", scored)):
        print(
            f"merged model and {name}: KL divergence {values['kl']:.2g} nats per token, "
            f"same top token at {100 * values['agreement']:.1f}% of {values['n']:,}"
        )
    check(differences, settings.merge, paths)


def write_merged(settings: params.Params, unquantized: params.Model, paths: argparse.Namespace) -> None:
    """Add the adapter's product to the base's own weights in float32 and round the sum once."""
    tokenizer = load_tokenizer(paths.base, template_file(paths.templates, paths.base, settings.model))
    policy = loading.load_policy(paths.base, paths.adapter, loading.in_float32(unquantized))
    merged = policy.merge_and_unload(safe_merge=True) if isinstance(policy, PeftModel) else policy
    saving.save_policy(merged, tokenizer, paths.base, "bfloat16", paths.out)


def compare(first: Policy, second: Policy, rows: datasets.Dataset) -> dict[str, float]:
    """How the predictions of two models differ at labelled tokens; packed examples are computed one by one.

    Args:
        rows: packed or not, with input_ids, labels and seq_lengths.

    Returns:
        `kl`, KL(first ‖ second) in nats per token; `agreement`, the share of tokens where both have the same
        top token; `n`, their number.
    """
    divergence, same, tokens = 0.0, 0, 0
    with policies.measuring(first), policies.measuring(second):
        for row in tqdm(rows, desc="held-out rows", unit="row"):
            for start, end in pairwise([0, *accumulate(row["seq_lengths"])]):
                labels = torch.tensor(row["labels"][start:end], device=first.device)
                (places,) = torch.nonzero(labels[1:] != IGNORED, as_tuple=True)
                ids = torch.tensor([row["input_ids"][start:end]], device=first.device)
                log_probs = predictions(first, ids, places)
                others = predictions(second, ids, places)
                kl = torch.nn.functional.kl_div(others, log_probs, log_target=True, reduction="sum")
                divergence += float(kl)
                same += int((log_probs.argmax(-1) == others.argmax(-1)).sum())
                tokens += len(places)
    return {"kl": divergence / tokens, "agreement": same / tokens, "n": tokens}


def predictions(model: Policy, ids: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Log-probs of the tokens after these places, (places, vocabulary), in float32."""
    logits = model(input_ids=ids, logits_to_keep=places, use_cache=False).logits[0]
    return logits.float().log_softmax(-1)


def check(differences: dict[str, float], gate: params.Merge, paths: argparse.Namespace) -> None:
    if not (differences["kl"] <= gate.max_kl and differences["agreement"] >= gate.min_agreement):
        raise InputError(
            f"{paths.out}: found a KL divergence from the adapter on its base of {differences['kl']:.3g} "
            f"nats per token and the same top token at {differences['agreement']:.3g} of the tokens, "
            f"expected at most {gate.max_kl:g} and at least {gate.min_agreement:g} (params.yaml: merge): "
            "bfloat16 does not hold this model well enough; use the adapter, or raise the limits"
        )
