"""DPO: it starts at the reference, which is the SFT model and not the base, and learns what is preferred."""

import csv
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trl.trainer.utils import add_fused_lm_head

from reprotune import params_file
from reprotune.data.shards import read_shards
from reprotune.errors import InputError
from reprotune.model import loading, policies
from reprotune.params import Dpo
from reprotune.records import read_parquet, write_parquet
from reprotune.training import pairs
from tests import steps
from tests.conftest import changed
from tests.tiny import WORDS, alpaca_rows, preference_rows


@pytest.fixture(scope="module")
def tuned(world, model, tmp_path_factory):
    """Params, and a folder with an SFT adapter unlike the base, tokenized pairs and their reference."""
    folder = tmp_path_factory.mktemp("tuned")
    settings = changed(params_file.load(world / "params.yaml"), {"sft.learning_rate": 1e-2})
    steps.tokenize_sft(settings, model, alpaca_rows(), folder)
    steps.sft(settings, model, folder)
    steps.tokenize_dpo(settings, model, preference_rows(), folder)
    steps.reference(settings, model, folder)
    return settings, folder


def log_probs(settings, base, folder, adapter: bool) -> dict[str, list[float]]:
    """Log-probs of the training pairs by the SFT model or the base, each answer computed alone."""
    model = (
        loading.load_policy(base, folder / "sft", settings.model)
        if adapter
        else loading.load_base(base, settings.model)
    )
    sums = {"chosen": [], "rejected": []}
    for row in read_shards(folder / "dpo_tokens", "train"):
        for key, values in sums.items():
            ids = torch.tensor([row["prompt_ids"] + row[f"{key}_ids"]])
            with torch.no_grad():
                scores = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
            values.append(float(scores[len(row["prompt_ids"]) - 1 :].sum()))
    return sums


def test_the_reference_is_the_sft_adapter_and_not_the_base(tuned, model):
    settings, folder = tuned
    cached = read_parquet(folder / "reference" / "train.parquet").to_pydict()
    with_adapter, without = (log_probs(settings, model, folder, adapter) for adapter in (True, False))
    for key in ("chosen", "rejected"):
        reference = torch.tensor(cached[f"ref_{key}_logps"])
        assert (reference - torch.tensor(with_adapter[key])).abs().max() < 1e-3
        assert (reference - torch.tensor(without[key])).abs().max() > 1.0


def curve(folder: Path) -> list[dict[str, float]]:
    with (folder / "dpo.csv").open() as file:
        return [{key: float(value) for key, value in row.items()} for row in csv.DictReader(file)]


def untrained(folder: Path, out: Path) -> Path:
    """A folder with what DPO reads from `folder`."""
    for name in ("sft", "dpo_tokens", "reference"):
        (out / name).symlink_to(folder / name)
    return out


def test_the_margin_is_zero_at_step_zero(tuned, model):
    settings, folder = tuned
    metrics = steps.dpo(settings, model, folder)
    assert abs(steps.measured(metrics)["held-out pairs", "reward margin"]["before"]) < 1e-5
    first = curve(folder)[0]
    assert abs(first["reward_margin"]) < 1e-4 and first["loss"] == pytest.approx(0.693147, abs=1e-4)


def test_another_reference_stops_the_stage(tuned, model, tmp_path):
    settings, folder = tuned
    for part in ("train", "held_out"):
        rows = read_parquet(folder / "reference" / f"{part}.parquet").to_pylist()
        write_parquet(
            tmp_path / f"{part}.parquet", [{key: value + 0.5 for key, value in row.items()} for row in rows]
        )
    kept = folder / "reference"
    kept.rename(folder / "kept")
    tmp_path.rename(kept)
    try:
        with pytest.raises(
            InputError,
            match=r"differs from the cached reference by 0\.[1-5]\d* nats, "
            r"divided by the square root of an answer's tokens; expected at most 0\.001",
        ):
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
    settings, folder = tuned
    before = (folder / "sft" / "adapter_model.safetensors").read_bytes()
    steps.dpo(settings, model, folder)
    assert (folder / "sft" / "adapter_model.safetensors").read_bytes() == before
    sft, dpo = (load_file(folder / name / "adapter_model.safetensors") for name in ("sft", "dpo"))
    assert sft.keys() == dpo.keys()
    moved = max(float((sft[key] - dpo[key]).abs().max()) for key in sft)
    assert 0 < moved < 1e-3, moved


def taste_rows(count: int, swapped: bool) -> list[dict]:
    """Answers that end in `sings` are preferred to those in `sleeps`; swapped, the other way round."""
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
    ratios = log_ratios(settings, model, tmp_path, "held_out")
    sings, sleeps = ("rejected", "chosen") if swapped else ("chosen", "rejected")
    rise = ratios[sings] - ratios[sleeps]
    assert (rise < 0).all() if swapped else (rise > 0).all()


def log_ratios(settings, base: Path, folder: Path, part: str) -> dict[str, torch.Tensor]:
    """Log-ratios of the saved policy to the cached reference, (pairs,) for each answer."""
    policy = loading.load_policy(base, folder / "dpo", settings.model)
    add_fused_lm_head(policies.bare(policy))
    rows = read_shards(folder / "dpo_tokens", part)
    trained = pairs.log_probs(policy, rows, pad_token_id=0, batch_size=4, label="check")
    reference = read_parquet(folder / "reference" / f"{part}.parquet").to_pydict()
    return {
        answer: torch.tensor(trained[answer]) - torch.tensor(reference[f"ref_{answer}_logps"])
        for answer in ("chosen", "rejected")
    }


LOSSES = [
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


@pytest.mark.parametrize("loss", LOSSES)
def test_every_loss_prefers_what_is_preferred(loss, tuned, model, tmp_path):
    settings, folder = tuned
    settings = changed(
        settings,
        {
            "dpo.loss": loss,
            "dpo.label_smoothing": 0.1 if loss in ("robust", "exo_pair") else 0.0,
            "dpo.learning_rate": 2e-3,
            "dpo.steps": 10,
        },
    )
    metrics = steps.dpo(settings, model, untrained(folder, tmp_path))
    margin, accuracy = (
        steps.measured(metrics)["training pairs", f"reward {key}"] for key in ("margin", "accuracy")
    )
    assert margin["after"] > margin["before"] == 0 and accuracy["after"] > 0.6


@pytest.mark.parametrize("loss", ["sigmoid", "ipo"])
def test_the_measured_loss_is_sigmoid_whichever_is_trained_on(loss, tuned, model, tmp_path):
    """In metrics and held-out curve; the training curve has the loss that is trained on."""
    settings, folder = tuned
    settings = changed(settings, {"dpo.loss": loss, "dpo.learning_rate": 2e-3, "dpo.steps": 10})
    metrics = steps.dpo(settings, model, untrained(folder, tmp_path))
    # each at a margin of zero; IPO's is (1 / (2 beta))²
    trained_on = {"sigmoid": math.log(2), "ipo": (1 / (2 * settings.dpo.beta)) ** 2}[loss]
    assert curve(tmp_path)[0]["loss"] == pytest.approx(trained_on, rel=1e-3)
    for rows in ("training pairs", "held-out pairs"):
        assert steps.measured(metrics)[rows, "loss"]["before"] == pytest.approx(math.log(2), abs=1e-5)
    after = {}
    for part, rows in (("train", "training pairs"), ("held_out", "held-out pairs")):
        ratios = log_ratios(settings, model, tmp_path, part)
        margins = settings.dpo.beta * (ratios["chosen"] - ratios["rejected"])
        after[part] = float(torch.log1p(torch.exp(-margins)).mean())
        assert steps.measured(metrics)[rows, "loss"]["after"] == pytest.approx(after[part], abs=1e-5)
    assert after["train"] < math.log(2) - 0.005
    with (tmp_path / "dpo_held_out.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    assert float(last["loss"]) == metrics["held_out_loss"] == pytest.approx(after["held_out"], abs=1e-5)


def test_every_loss_that_params_take_is_tested():
    assert set(Dpo.model_fields["loss"].annotation.__args__) == set(LOSSES)


def test_a_global_batch_has_the_same_gradients_however_it_is_split(tuned, model, tmp_path):
    settings, folder = tuned
    untrained(folder, tmp_path)
    curves = []
    for size in (1, 2, 8):
        values = {"dpo.global_batch_size": 8, "dpo.micro_batch_size": size, "dpo.steps": 5}
        steps.dpo(changed(settings, values), model, tmp_path)
        curves.append(curve(tmp_path))
    *split, whole = curves
    for rows in split:
        for row, whole_row in zip(rows, whole, strict=True):
            for key in ("loss", "grad_norm", "logps_chosen", "logps_rejected"):
                assert row[key] == pytest.approx(whole_row[key], rel=1e-4), key
            # not the accuracy: before the first update every pair is a tie, which rounding breaks
            assert row["tokens"] == whole_row["tokens"]
