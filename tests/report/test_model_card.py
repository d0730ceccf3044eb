"""The model card names what the model is made of, and the metadata that the Hub reads."""

from ruamel.yaml import YAML

from reprotune import params_file
from reprotune.report.model_card import card_header
from tests.conftest import changed
from tests.report.written import make_report
from tests.tiny import ROOT


def test_the_card_says_what_the_model_is_made_of(metrics, settings, tmp_path):
    make_report(changed(settings, {"model.quantization": "nf4"}), metrics, tmp_path / "report")
    text = (tmp_path / "report" / "model_card.md").read_text()
    header, body = text.removeprefix("---\n").split("---\n", 1)
    assert YAML(typ="safe").load(header) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", "dpo", "trl"],
    }
    for part in (
        "| SFT: rows | local `tiny/alpaca.json` | CC0-1.0 |",
        "| preferences: pairs | local `tiny/preferences.json` | not stated |",
        "| base model | local `tiny/model` | Apache-2.0 |",
        "on 1,827 held-out tokens: KL divergence 0.0001 nats",
        "KL divergence 0.27 nats a token, the same likeliest token at 77.0%",
        "| seed | 42 |",
        "| gain |",
        "It needs transformers 4.57 or newer",
    ):
        assert part in body, part


def test_the_header_names_repositories_of_the_hub():
    header = card_header(params_file.load(ROOT / "recipes" / "qwen3-4b.yaml"))
    assert header["base_model"] == ["Qwen/Qwen3-4B-Base"]
    assert header["datasets"] == ["tatsu-lab/alpaca", "HuggingFaceH4/ultrafeedback_binarized"]
