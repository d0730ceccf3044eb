"""DPO and its reference: starts at zero, against the SFT adapter and not the base, and learns what is preferred."""

import pytest
import torch

from stages import InputError, modeling, pairs, training
from stages.records import read_parquet, write_parquet
from tests import steps
from tests.conftest import changed
from tests.tiny import WORDS, alpaca_rows, preference_rows


@pytest.fixture(scope="module")
def tuned(world, model, tmp_path_factory):
    """A folder with an SFT adapter that differs from the base, and tokenized pairs."""
    from stages import params

    folder = tmp_path_factory.mktemp("tuned")
    settings = changed(params.load(world / "params.yaml"), {"sft.learning_rate": 1e-2})
    steps.tokenize_sft(settings, model, alpaca_rows(), folder)
    steps.sft(settings, model, folder)
    steps.tokenize_dpo(settings, model, preference_rows(), folder)
    steps.reference(settings, model, folder)
    return settings, folder


def log_probs(settings, base, folder, adapter: bool) -> dict[str, list[float]]:
    """Log-probs of the training pairs, each answer computed alone and from full logits."""
    model = modeling.load_policy(base, folder / "sft", settings.model) if adapter else modeling.load_base(base, settings.model)
    found = {"chosen": [], "rejected": []}
    for row in training.shards(folder / "dpo_tokens", "train"):
        for key, values in found.items():
            ids = torch.tensor([row["prompt_ids"] + row[f"{key}_ids"]])
            with torch.no_grad():
                scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            values.append(float(scores[len(row["prompt_ids"]) - 1 :].sum()))
    return found


def test_the_reference_is_the_sft_adapter_and_not_the_base(tuned, model):
    settings, folder = tuned
    cached = read_parquet(folder / "reference" / "train.parquet").to_pydict()
    with_adapter, without = (log_probs(settings, model, folder, adapter) for adapter in (True, False))
    for key in ("chosen", "rejected"):
        found = torch.tensor(cached[f"ref_{key}_logps"])
        assert (found - torch.tensor(with_adapter[key])).abs().max() < 1e-3
        assert (found - torch.tensor(without[key])).abs().max() > 1.0


def test_the_margin_is_zero_at_step_zero(tuned, model):
    settings, folder = tuned
    metrics = steps.dpo(settings, model, folder)
    assert abs(steps.measured(metrics)["held-out pairs", "reward margin"]["before"]) < 1e-5
    first = (folder / "dpo.csv").read_text().splitlines()[:2]
    row = dict(zip(first[0].split(","), map(float, first[1].split(",")), strict=True))
    assert abs(row["reward_margin"]) < 1e-4 and row["loss"] == pytest.approx(0.693147, abs=1e-4)


def test_another_reference_stops_the_stage(tuned, model, tmp_path):
    settings, folder = tuned
    for part in ("train", "held_out"):
        rows = read_parquet(folder / "reference" / f"{part}.parquet").to_pylist()
        write_parquet(tmp_path / f"{part}.parquet", [{key: value + 0.5 for key, value in row.items()} for row in rows])
    kept = folder / "reference"
    kept.rename(folder / "kept")
    tmp_path.rename(kept)
    try:
        with pytest.raises(InputError, match=r"differs from the cached reference by 0\.[1-5]\d* nats, divided by the square root of an answer's tokens; expected at most 0\.001"):
            steps.dpo(settings, model, folder)
    finally:
        kept.rename(tmp_path)
        (folder / "kept").rename(kept)


def test_a_reference_of_other_pairs_is_refused(tuned, model):
    settings, folder = tuned
    file = folder / "reference" / "train.parquet"
    content = file.read_bytes()
    write_parquet(file, read_parquet(file).to_pylist()[:-1])
    with pytest.raises(InputError, match=r"19 rows, expected 20 as in"):
        steps.dpo(settings, model, folder)
    file.write_bytes(content)


def test_dpo_goes_on_from_the_sft_adapter_and_leaves_it_alone(tuned, model):
    from safetensors.torch import load_file

    settings, folder = tuned
    before = (folder / "sft" / "adapter_model.safetensors").read_bytes()
    steps.dpo(settings, model, folder)
    assert (folder / "sft" / "adapter_model.safetensors").read_bytes() == before
    sft, dpo = (load_file(folder / name / "adapter_model.safetensors") for name in ("sft", "dpo"))
    assert sft.keys() == dpo.keys()
    moved = max(float((sft[key] - dpo[key]).abs().max()) for key in sft)
    assert 0 < moved < 1e-3, moved


def taste_rows(count: int, swapped: bool) -> list[dict]:
    """Answers that end in `sings` are preferred to the same ones that end in `sleeps`; swapped, the other way round."""
    good, bad = ("sleeps", "sings") if swapped else ("sings", "sleeps")
    return [
        {
            "conversations": [{"from": "human", "value": f"{WORDS[n % 13]} {WORDS[n * 7 % 19]} {n}"}],
            "chosen": {"from": "gpt", "value": f"the {WORDS[n * 5 % 11]} {good}"},
            "rejected": {"from": "gpt", "value": f"the {WORDS[n * 5 % 11]} {bad}"},
        }
        for n in range(count)
    ]


@pytest.mark.parametrize("swapped", [False, True])
def test_a_preference_is_learned_whichever_way_it_goes(swapped, tuned, model, tmp_path):
    settings, folder = tuned
    settings = changed(
        settings,
        {
            "tokenize.dpo.held_out": 40, "dpo.steps": 30, "dpo.global_batch_size": 8,
            "dpo.micro_batch_size": 8, "dpo.learning_rate": 5e-3, "model.quantization": "none",
        },
    )  # fmt: skip
    (tmp_path / "sft").symlink_to(folder / "sft")
    steps.tokenize_dpo(settings, model, taste_rows(160, swapped), tmp_path)
    steps.reference(settings, model, tmp_path)
    metrics = steps.dpo(settings, model, tmp_path)
    accuracy = steps.measured(metrics)["held-out pairs", "reward accuracy"]
    assert accuracy["n"] == 40 and accuracy["before"] == 0.5
    assert accuracy["after"] == metrics["held_out_accuracy"] >= 0.95
    tokenizer_pad, rows = 0, training.shards(tmp_path / "dpo_tokens", "held_out")
    from trl.trainer.utils import add_fused_lm_head

    policy = modeling.load_policy(model, tmp_path / "dpo", settings.model)
    add_fused_lm_head(modeling.bare(policy))
    found = pairs.log_probs(policy, rows, tokenizer_pad, 4, "check")
    reference = read_parquet(tmp_path / "reference" / "held_out.parquet").to_pydict()
    sings, sleeps = ("rejected", "chosen") if swapped else ("chosen", "rejected")
    rise = [
        (s - rs) - (b - rb)
        for s, rs, b, rb in zip(found[sings], reference[f"ref_{sings}_logps"], found[sleeps], reference[f"ref_{sleeps}_logps"], strict=True)
    ]
    assert all(value < 0 for value in rise) if swapped else all(value > 0 for value in rise)


LOSSES = ["sigmoid", "sigmoid_norm", "ipo", "hinge", "robust", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down"]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_prefers_what_is_preferred(loss, tuned, model, tmp_path):
    settings, folder = tuned
    settings = changed(settings, {"dpo.loss": loss, "dpo.label_smoothing": 0.1 if loss in ("robust", "exo_pair") else 0.0, "dpo.learning_rate": 2e-3, "dpo.steps": 10})
    for name in ("sft", "dpo_tokens", "reference"):
        (tmp_path / name).symlink_to(folder / name)
    metrics = steps.dpo(settings, model, tmp_path)
    margin, accuracy = (steps.measured(metrics)["training pairs", f"reward {key}"] for key in ("margin", "accuracy"))
    assert margin["after"] > margin["before"] == 0 and accuracy["after"] > 0.6


def test_every_loss_that_params_take_is_tested():
    from stages.params import Dpo

    assert set(Dpo.model_fields["loss"].annotation.__args__) == set(LOSSES)


def test_a_global_batch_has_the_same_gradients_however_it_is_split(tuned, model, tmp_path):
    settings, folder = tuned
    for name in ("sft", "dpo_tokens", "reference"):
        (tmp_path / name).symlink_to(folder / name)
    found = []
    for size in (1, 2, 8):
        steps.dpo(changed(settings, {"dpo.global_batch_size": 8, "dpo.micro_batch_size": size, "dpo.steps": 5}), model, tmp_path)
        header, *lines = (tmp_path / "dpo.csv").read_text().splitlines()
        found.append([dict(zip(header.split(","), map(float, line.split(",")), strict=True)) for line in lines])
    for split in found[:2]:
        for one, other in zip(split, found[2], strict=True):
            for key in ("loss", "grad_norm", "logps_chosen", "logps_rejected"):
                assert one[key] == pytest.approx(other[key], rel=1e-4), key
            # not the accuracy: before the first update every pair is a tie, which rounding breaks
            assert one["tokens"] == other["tokens"]
