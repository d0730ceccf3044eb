"""The stage `reference`: log-probs of every pair under the frozen SFT model, computed once for DPO."""

import argparse

from trl.trainer.utils import add_fused_lm_head

from reprotune import params
from reprotune.compat.trl import score_only_labelled_tokens
from reprotune.data.shards import read_shards
from reprotune.data.templates import load_tokenizer, template_file
from reprotune.model import determinism, loading, policies
from reprotune.records import filling, write_parquet
from reprotune.training import checkpoints, distributed, pairs


def run(settings: params.Params, paths: argparse.Namespace) -> None:
    determinism.start(settings.seed)
    score_only_labelled_tokens()
    distributed.join()
    template = template_file(paths.templates, paths.base, settings.model)
    tokenizer = load_tokenizer(paths.base, template)
    # trainable, so that full weights are in float32 as in DPO
    model = loading.load_policy(paths.base, paths.adapter, settings.model, trainable=True)
    add_fused_lm_head(policies.bare(model))
    pairs.share_prompts(model)
    policies.compute_in(model, settings.model.dtype)
    inputs = [paths.base, paths.adapter, paths.data, template]
    with checkpoints.kept(
        paths.checkpoints,
        settings.model_dump(include={"seed", "model", "reference"}, exclude={"model": {"source"}}),
        inputs,
    ) as run_folder:
        log_probs = {
            part: pairs.log_probs(
                model,
                read_shards(paths.data, part),
                tokenizer.pad_token_id,
                settings.reference.batch_size,
                f"reference log-probs, {part}",
                run_folder / part,
            )
            for part in ("train", "held_out")
        }
        if distributed.is_main():
            with filling(paths.out) as folder:
                for part, by_answer in log_probs.items():
                    columns = {pairs.REFERENCE[answer]: values for answer, values in by_answer.items()}
                    rows = [
                        dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)
                    ]
                    write_parquet(folder / f"{part}.parquet", rows)
