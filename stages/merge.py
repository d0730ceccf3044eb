"""Fold what DPO trained into the base model, once: `models/final` is a whole model in bfloat16, which transformers and vLLM load as any other.

The adapter's product is added to the base's own weights in float32 and the sum is rounded once, never into 4-bit weights. A gate then holds the folder, as it was
written, against the adapter on the same base, on the held-out SFT rows. With `model.quantization: nf4` the model that was scored stands on rounded weights: how far
the merged one is from that is measured, too, and is a matter of the quantization, not of the merge.
"""

import argparse
from itertools import accumulate, pairwise
from pathlib import Path

import datasets
import torch
from peft import PeftModel
from tqdm import tqdm

from stages import InputError, command, modeling, params, training
from stages.modeling import Policy
from stages.records import write_json
from stages.templating import IGNORED, load_tokenizer


def run(settings: params.Params, paths: argparse.Namespace) -> None:
    modeling.start(settings.seed)
    tokenizer = load_tokenizer(paths.base, paths.templates / f"{settings.model.chat_template}.jinja")
    plain = settings.model.model_copy(update={"quantization": "none"})
    policy = modeling.load_policy(paths.base, paths.adapter, modeling.in_float32(plain))
    whole = policy.merge_and_unload(safe_merge=True) if isinstance(policy, PeftModel) else policy
    modeling.save_policy(whole, tokenizer, paths.base, "bfloat16", paths.out)
    del policy, whole
    rows, merged = training.shards(paths.data, "held_out"), modeling.load_base(paths.out, plain)
    found = differences(modeling.load_policy(paths.base, paths.adapter, plain), merged, rows)
    scored = found
    if plain != settings.model:
        scored = differences(modeling.load_policy(paths.base, paths.adapter, settings.model, unpacked=modeling.fits_unpacked(paths.base, settings.model)), merged, rows)
    write_json(paths.metrics, found | {f"scored_{key}": scored[key] for key in ("kl", "agreement")})
    for what, values in (("the adapter on the same base", found), ("what was scored", scored)):
        print(f"merged model beside {what}: KL divergence {values['kl']:.2g} nats a token, the same likeliest token at {100 * values['agreement']:.1f}% of {values['n']:,}")
    gate = settings.merge
    if not (found["kl"] <= gate.max_kl and found["agreement"] >= gate.min_agreement):
        raise InputError(
            f"{paths.out}: found a KL divergence from the adapter on its base of {found['kl']:.3g} nats a token and the same likeliest token at {found['agreement']:.3g} of "
            f"the tokens, expected at most {gate.max_kl:g} and at least {gate.min_agreement:g} (params.yaml: merge): bfloat16 does not hold this model well enough; "
            "use the adapter, or raise the limits"
        )


def differences(one: Policy, other: Policy, rows: datasets.Dataset) -> dict[str, float]:
    """Of what two models predict at all labelled tokens: `kl`, KL(one ‖ other) in nats a token, `agreement`, the share where both find the same token likeliest,
    and their number `n`. Packed examples are computed one by one.

    Args:
        rows: packed or not, with input_ids, labels and seq_lengths.
    """
    divergence, same, tokens = 0.0, 0, 0
    with modeling.measuring(one), modeling.measuring(other):
        for row in tqdm(rows, desc="held-out rows", unit="row"):
            for start, end in pairwise([0, *accumulate(row["seq_lengths"])]):
                labels = torch.tensor(row["labels"][start:end], device=one.device)
                (places,) = torch.nonzero(labels[1:] != IGNORED, as_tuple=True)
                ids = torch.tensor([row["input_ids"][start:end]], device=one.device)
                # (tokens, vocabulary), of the places before those that are predicted
                first, second = (model(input_ids=ids, logits_to_keep=places, use_cache=False).logits[0].float().log_softmax(-1) for model in (one, other))
                divergence += float(torch.nn.functional.kl_div(second, first, log_target=True, reduction="sum"))
                same += int((first.argmax(-1) == second.argmax(-1)).sum())
                tokens += len(places)
    return {"kl": divergence / tokens, "agreement": same / tokens, "n": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "adapter", "data", "templates", "out", "metrics"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    run(params.load(), parser.parse_args())


if __name__ == "__main__":
    command(main)
