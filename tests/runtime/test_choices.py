"""The table of the options that set a method: what their words mean, and that settings and options belong together."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

import pytest

from earlytom.errors import UserError
from earlytom.settings import SETTINGS
from runtime.choices import METHOD_OPTIONS, add_method_options, budget, given_settings, in_options, layers, rounds


def parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_method_options(parser, *METHOD_OPTIONS)
    return parser.parse_args(words)


@pytest.mark.parametrize(
    ("read", "words", "value"),
    [
        (layers, "6,14,20", (6, 14, 20)),
        (layers, "None", ()),
        (budget, "0.75", 0.75),
        (budget, "1", 1.0),  # a share: all frames
        (budget, "13", (13,)),  # no share
        (budget, "12,9,7", (12, 9, 7)),
        (rounds, "7", 7),
        (rounds, "greedy", None),
    ],
)
def test_words(read: Any, words: str, value: Any) -> None:
    found = read(words)
    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    ("flag", "words"),
    [("--merge-layers", "6;14"), ("--merge-layers", ""), ("--frame-budget", "half"), ("--rounds", "7.0")],
)
def test_words_that_are_none(flag: str, words: str) -> None:
    options = parsed(flag, words)
    with pytest.raises(UserError, match=f"^{flag} '{words}': give ") as caught:
        given_settings(options, *METHOD_OPTIONS)
    assert "\n" not in str(caught.value)


def test_what_is_not_given_is_left_to_the_method() -> None:
    assert given_settings(parsed(), *METHOD_OPTIONS) == {"retention_ratio": 0.1}
    given = given_settings(parsed("--tau", "0", "--rounds", "greedy", "--merge-layers", "none"), *METHOD_OPTIONS)
    assert given == {"retention_ratio": 0.1, "tau": 0.0, "rounds": None, "merge_layers": ()}


def test_options_are_of_settings_that_there_are() -> None:
    fields = {name: {field.name for field in dataclasses.fields(kind)} for name, kind in SETTINGS.items()}
    for name, option in METHOD_OPTIONS.items():
        having = {method for method, of in fields.items() if name in of}
        assert having
        assert option.method is None or having == {option.method}
        assert "%" not in option.help  # which argparse formats


def test_an_error_names_options_in_the_place_of_settings() -> None:
    given = UserError("retention_ratio and tau, not --tau nor status nor frame_budgets")
    assert str(in_options(given)) == "--ratio and --tau, not --tau nor status nor frame_budgets"
