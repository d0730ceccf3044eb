"""The sample browser's data."""

import pytest

from reprotune.report import samples


@pytest.mark.parametrize(
    ("gold", "choices", "expected"),
    [
        ("1", [" a", " b"], "b"),
        ("B", [" A", " B"], "B"),
        ("2", [" 1", " 2"], "2"),
        ("was bigger.", ["it was bigger.", "he was bigger."], "was bigger."),
        ("42", None, "42"),
    ],
)
def test_the_expected_answer_is_shown_as_the_choices_have_it(gold, choices, expected):
    assert samples.expected({"gold": gold, "choices": choices}) == expected
