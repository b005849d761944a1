"""What generation_config.json asks for and an answer here does without, in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from earlytom.errors import UserError
from earlytom.micro.random_model import random_model
from runtime.checkpoint import describe, load_decoder
from runtime.checkpoint.generation import left_out
from tests.runtime.checkpoint.tiny_checkpoint import answering, edit_json, one_line, tiny_config, write


@pytest.mark.parametrize(
    "raw",
    [
        {},
        {"eos_token_id": [1, 2], "bos_token_id": 3, "pad_token_id": 0, "transformers_version": "5"},
        {"do_sample": False, "temperature": 0.7, "top_k": 20, "top_p": 0.8, "min_p": 0.1},  # of a sampling that is off
        {"repetition_penalty": 1.0, "no_repeat_ngram_size": 0, "num_beams": 1, "length_penalty": 2.0},
        {"repetition_penalty": None, "suppress_tokens": [], "bad_words_ids": None, "use_cache": True},
    ],
)
def test_what_changes_nothing_is_not_mentioned(raw: dict[str, Any]) -> None:
    assert left_out(raw) is None


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("repetition_penalty", 1.05), ("no_repeat_ngram_size", 3), ("min_new_tokens", 5), ("min_length", 1),
        ("suppress_tokens", [7]), ("begin_suppress_tokens", [7]), ("bad_words_ids", [[7, 8]]), ("num_beams", 4),
        ("penalty_alpha", 0.6), ("guidance_scale", 2), ("forced_eos_token_id", 3), ("sequence_bias", [[[1], 2.0]]),
        ("exponential_decay_length_penalty", [1, 1.2]), ("stop_strings", ["x"]), ("max_new_tokens", 64),
    ],
)  # fmt: skip
def test_what_would_change_answers_is_named(name: str, value: Any) -> None:
    text = left_out({name: value})
    assert text is not None
    assert f"{name} {value}" in text
    assert "leaves out" in text


@pytest.mark.parametrize(
    ("raw", "flags", "call"),
    [
        ({}, "--temperature 1 --top-k 50 --top-p 1", "Sampling(temperature=1, top_k=50, top_p=1)"),
        (
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8},
            "--temperature 0.7 --top-k 20 --top-p 0.8",
            "Sampling(temperature=0.7, top_k=20, top_p=0.8)",
        ),
    ],
)
def test_sampling_names_the_equivalent_flags(raw: dict[str, Any], flags: str, call: str) -> None:
    text = left_out({"do_sample": True, **raw})
    assert text is not None
    assert flags in text
    assert call in text


def test_a_long_list_is_cut() -> None:
    text = left_out({"suppress_tokens": list(range(10_000)), **dict.fromkeys(("min_length", "min_new_tokens"), 4)})
    assert text is not None
    assert len(text) < 400


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return answering(write(tmp_path / "c", random_model(tiny_config(), torch.float32)))


def test_stop_tokens_are_those_of_the_file_else_of_the_configuration(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[7, 9])
    assert load_decoder(folder).generation_config.eos_token_id == [7, 9]  # type: ignore[union-attr]
    (folder / "generation_config.json").unlink()
    assert load_decoder(folder).generation_config.eos_token_id == 1292  # type: ignore[union-attr]
    assert describe(folder).generation_note is None


@pytest.mark.parametrize("stops", ["x", [1, None, "2"], -1, 10**9, True, {}, [1.5]])
def test_stop_tokens_of_no_sense_are_one_line(folder: Path, stops: Any) -> None:
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": stops}))
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id") as error:
        load_decoder(folder)
    one_line(error)
