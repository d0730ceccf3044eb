"""Log-probs of every pair's chosen and rejected answer under the frozen SFT adapter, computed once.

They depend on the SFT adapter and the pairs and on nothing that is swept, so no value of beta, learning rate or loss
computes them again, and one changed byte of the adapter computes all of them.
"""

import argparse
from pathlib import Path

from trl.trainer.utils import add_fused_lm_head

from stages import checkpoints, command, modeling, params, training
from stages.chat import load_tokenizer
from stages.records import filling, write_parquet


def run(settings: params.Params, paths: argparse.Namespace) -> None:
    modeling.start(settings.seed)
    template = paths.templates / f"{settings.model.chat_template}.jinja"
    tokenizer = load_tokenizer(paths.base, template)
    base = modeling.load_base(paths.base, settings.model)
    add_fused_lm_head(base)
    model = modeling.load_adapter(base, paths.adapter)
    inputs = [paths.base, paths.adapter, paths.data, template]
    with checkpoints.kept(paths.checkpoints, settings.model_dump(include={"seed", "model", "reference"}), inputs) as run, filling(paths.out) as folder:
        for part in ("train", "held_out"):
            rows = training.shards(paths.data, part)
            label = f"reference log-probs, {part}"
            size = settings.reference.batch_size
            found = training.pair_log_probs(model, rows, tokenizer.pad_token_id, size, label, run / part)
            pairs = zip(found["chosen"], found["rejected"], strict=True)
            write_parquet(folder / f"{part}.parquet", [{"ref_chosen_logps": c, "ref_rejected_logps": r} for c, r in pairs])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("base", "adapter", "data", "templates", "checkpoints", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    run(params.load(), parser.parse_args())


if __name__ == "__main__":
    command(main)
