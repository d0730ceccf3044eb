"""Packed rows: no example attends to another one, and a row without a label is refused."""

import datasets
import pytest
import torch
from transformers import AttentionInterface, AutoModelForCausalLM
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from reprotune.data.shards import read_shards
from reprotune.errors import InputError
from reprotune.model import loading
from reprotune.model.attention import BY_SEGMENT
from reprotune.training import row_checks
from tests import steps
from tests.conftest import changed
from tests.tiny import alpaca_rows


@pytest.mark.parametrize(
    ("quantization", "attention"),
    [("none", "sdpa"), ("nf4", "sdpa"), ("none", "eager"), ("none", BY_SEGMENT)],
)
def test_packed_logits_equal_unpacked_logits(quantization, attention, settings, model, tmp_path):
    settings = changed(settings, {"model.quantization": quantization})
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    base = loading.load_base(model, settings.model)
    base.set_attn_implementation(attention)
    for row in read_shards(tmp_path / "sft_tokens", "train"):
        batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)([row])
        with torch.no_grad():
            packed = base(
                input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False
            ).logits[0]
            alone = [
                base(torch.tensor([ids.tolist()]), use_cache=False).logits[0]
                for ids in batch["input_ids"][0].split(row["seq_lengths"])
            ]
            leaking = base(input_ids=batch["input_ids"], use_cache=False).logits[0]
        assert len(row["seq_lengths"]) > 1
        assert (packed - torch.cat(alone)).abs().max() < 1e-4
        assert (leaking - torch.cat(alone)).abs().max() > 1e-2, "the test would miss a leak"


def leaky(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **_):
    """Causal attention without masks and positions: right for one example, and wrong for two in a row."""
    key, value = (part.repeat_interleave(module.num_key_value_groups, dim=1) for part in (key, value))
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling
    )
    return attended.transpose(1, 2).contiguous(), None


def test_an_attention_that_cannot_keep_examples_apart_is_refused(settings, model, tmp_path):
    steps.tokenize_sft(settings, model, alpaca_rows(), tmp_path)
    rows = read_shards(tmp_path / "sft_tokens", "train")
    AttentionInterface.register("leaky", leaky)
    for attention, expected in (
        ("sdpa", None),
        ("eager", None),
        (
            "leaky",
            r"model\.attention: found sdpa, under which packed examples attend to the ones before them: "
            r"a logit differs by \d+\.?\d*, expected at most 0\.001",
        ),
    ):
        base = AutoModelForCausalLM.from_pretrained(model, attn_implementation=attention).eval()
        if expected is None:
            row_checks.check_isolation(base, rows, settings.model)
            continue
        with pytest.raises(InputError, match=expected):
            row_checks.check_isolation(base, rows, settings.model)


def test_a_row_without_labels_stops_the_run():
    rows = [{"labels": [-100, 5]}, {"labels": [-100, -100, -100]}, {"labels": [-100, 7, -100]}]
    with pytest.raises(InputError, match="row 1 has no label to train on"):
        row_checks.check_labels(datasets.Dataset.from_list(rows))
    row_checks.check_labels(datasets.Dataset.from_list([rows[0], rows[2]]))
