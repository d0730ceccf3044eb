"""Every text has a translation, with the same fields; a report in Chinese has the same numbers."""

import ast
import re
from string import Formatter

import pytest
from ruamel.yaml import YAML

from reprotune.errors import InputError
from reprotune.report import translation
from tests.conftest import changed
from tests.report.written import TEMPLATES, make_report
from tests.tiny import ROOT

FROM_METRICS = {
    "loss", "reward margin", "reward accuracy", "chosen log-prob", "rejected log-prob",
    "training pairs", "held-out pairs", "held-out rows", "pairs", "tokens", "SFT", "DPO",
}  # fmt: skip
"""Texts that the report takes from metrics, stages' names in capitals among them."""


def said() -> set[str]:
    """Every text in a call of `say`, and those from metrics."""
    calls = [
        node
        for file in (ROOT / "reprotune" / "report").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "say"
    ]
    texts = {call.args[0].value for call in calls if isinstance(call.args[0], ast.Constant)}
    return FROM_METRICS | texts


def fields(text: str) -> set[tuple[str, str]]:
    """Names and formats of what stands in braces."""
    return {(name, form) for _, name, form, _ in Formatter().parse(text) if name}


def test_every_text_is_translated():
    translations = YAML(typ="safe").load(TEMPLATES / "zh.yaml")
    assert translations.keys() == said()
    for text, translated in translations.items():
        assert fields(text) == fields(translated), text


def test_a_report_in_chinese(metrics, settings, tmp_path):
    """The same numbers in the same places, and a font that has every character of the figures."""
    make_report(settings, metrics, tmp_path / "en")
    make_report(changed(settings, {"report.language": "zh"}), metrics, tmp_path / "zh")
    english, chinese = ((tmp_path / name / "report.md").read_text() for name in ("en", "zh"))
    assert "## 结果" in chinese and "未显示出差异" in chinese and "no difference" not in chinese
    assert '<html lang="zh">' in (tmp_path / "zh" / "report.html").read_text()
    numbers_in_english, numbers_in_chinese = (
        [re.findall(r"-?[\d.]+", line) for line in text.splitlines() if line.startswith("| ") and "[" in line]
        for text in (english, chinese)
    )
    assert numbers_in_english == numbers_in_chinese and len(numbers_in_english) > 10
    assert "NotoSansSC" in (tmp_path / "zh" / "comparison_bar.svg").read_text()
    assert "NotoSansSC" not in (tmp_path / "en" / "comparison_bar.svg").read_text()


def test_a_text_without_a_translation_is_named():
    translation.use("zh", TEMPLATES)
    with pytest.raises(InputError, match="found no translation of 'never said'"):
        translation.say("never said")
    translation.use("en", TEMPLATES)
