"""Log-probs of every pair's chosen and rejected answer under the frozen SFT model, computed once.

They depend on the SFT adapter and the pairs and on nothing that is swept, so no value of beta, learning rate or loss
computes them again, and one changed byte of the adapter computes all of them.
"""

import argparse
from pathlib import Path

from trl.trainer.utils import add_fused_lm_head

from stages import checkpoints, command, launch, modeling, pairs, params, training
from stages.records import filling, write_parquet
from stages.templating import load_tokenizer


def run(settings: params.Params, paths: argparse.Namespace) -> None:
    modeling.start(settings.seed)
    launch.join()
    template = paths.templates / f"{settings.model.chat_template}.jinja"
    tokenizer = load_tokenizer(paths.base, template)
    # as DPO will have it: whole weights in float32
    model = modeling.load_policy(paths.base, paths.adapter, settings.model, trainable=True)
    add_fused_lm_head(modeling.bare(model))
    pairs.share_prompts(model)
    modeling.compute_in(model, settings.model.dtype)
    inputs = [paths.base, paths.adapter, paths.data, template]
    with checkpoints.kept(paths.checkpoints, settings.model_dump(include={"seed", "model", "reference"}), inputs) as run:
        found = {}
        for part in ("train", "held_out"):
            rows = training.shards(paths.data, part)
            size = settings.reference.batch_size
            found[part] = pairs.log_probs(model, rows, tokenizer.pad_token_id, size, f"reference log-probs, {part}", run / part)
        if launch.is_main():
            with filling(paths.out) as folder:
                for part, values in found.items():
                    both = zip(values["chosen"], values["rejected"], strict=True)
                    write_parquet(folder / f"{part}.parquet", [{"ref_chosen_logps": c, "ref_rejected_logps": r} for c, r in both])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "adapter", "data", "templates", "configs", "checkpoints", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    paths = parser.parse_args()
    settings = params.load()
    if not launch.relaunched("stages.reference", launch.config(paths.configs, settings.model.quantization)):
        run(settings, paths)


if __name__ == "__main__":
    command(main)
