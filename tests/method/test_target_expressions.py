"""Regular expressions of users: each one ends, and an invalid one is an error with the candidates."""

import pytest

from hf_featreuse.errors import BlockError
from hf_featreuse.method import targets
from hf_featreuse.method.targets import match_targets

NAMES = [f"vit.encoder.layers.{index}" for index in range(12)]


@pytest.mark.parametrize("text", ["(.|.)*[xyz]", "((.|.)|(.|.))*[xyz]"])
def test_an_expression_that_would_take_years_ends(text, monkeypatch):
    monkeypatch.setattr(targets, "_TIMEOUT_SECONDS", 0.05)
    with pytest.raises(BlockError, match=r"takes too long.*repeats inside repeats.*Candidates: vit\.encoder"):
        match_targets(NAMES, text, "ViT")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("(", "missing \\)"),
        ("a{9999999999}", "too large|too big"),
        ("(" * 9_000, "recursion"),
        ("((a{1000}){1000}){1000}", "repeats its parts too often"),
        ("(?R)", "unknown extension"),
    ],
)
def test_an_invalid_expression_is_refused(text, why):
    with pytest.raises(BlockError, match=f"not a regular expression: .*({why}).*Candidates"):
        match_targets(NAMES, text, "ViT")


@pytest.mark.parametrize("text", [r".*\.[02]", r"(?i)VIT\.encoder\.layers\.(0|2)", r"(.*)*\.[02]", r".{19}[02]"])
def test_other_expressions_match_whole_names_as_before(text):
    assert match_targets(NAMES, text, "ViT") == {NAMES[0], NAMES[2]}


def test_no_control_character_of_an_expression_is_in_the_message():
    with pytest.raises(BlockError) as error:
        match_targets(NAMES, "(\x1b[31m", "ViT")
    assert str(error.value).isprintable()
