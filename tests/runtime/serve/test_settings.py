"""Settings and the flags that they come from; the refusals of the command are in tests/test_light.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from earlytom.errors import UserError
from runtime.serve import loading
from runtime.serve.__main__ import parser, settings_of
from runtime.serve.settings import Settings, flags, option, settings_from, size, told_of


def read(*words: str) -> Settings:
    return settings_of(parser().parse_args(["engines/x", *words]))


def test_no_flags_are_the_defaults() -> None:
    assert read() == Settings(Path("engines/x"))


def test_every_setting_has_a_flag() -> None:
    options = {name for action in parser()._actions for name in action.option_strings}
    names = {field.name for field in dataclasses.fields(Settings)} - {"engine"}
    assert names == set(flags())
    assert {option(name) for name in names} <= options


def test_flags_arrive() -> None:
    found = read(
        *("--host", "0.0.0.0", "--port", "0", "--name", "m", "--allow-domain", "a.org", "--allow-domain", "*.b.org"),
        *("--allow-private", "--max-body", "1MiB", "--waiting", "0", "--cors", "https://a.org", "--no-page"),
        *("--deadline", "2.5", "--metrics-prefix", "vllm:", "--watch-bytes", "1 GB"),
    )
    assert (found.host, found.port, found.name) == ("0.0.0.0", 0, "m")
    assert (found.allow_domain, found.allow_private, found.cors) == (("a.org", "*.b.org"), True, ("https://a.org",))
    assert (found.max_body, found.watch_bytes, found.waiting, found.deadline) == (1 << 20, 10**9, 0, 2.5)
    assert (found.page, found.metrics_prefix) == (False, "vllm:")


def test_video_decoders_are_those_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "Decoders", lambda limits, **how: (limits.max_frames, how))
    found = loading.decoders_of(read("--video-decoders", "2", "--decode-seconds", "5", "--max-frames", "9"))
    assert found == (9, {"workers": 2, "seconds": 5.0})


def test_what_the_decoder_is_told_is_as_the_method_has_it_or_as_asked() -> None:
    for words, bias in (([], None), (["--bias"], True), (["--no-bias"], False)):
        assert read(*words).bias is bias
    assert read("--positions", "original").positions == "original"


@pytest.mark.parametrize(
    ("text", "wanted"), [("0", 0), ("4096", 4096), ("64MiB", 64 << 20), ("2 gib", 2 << 30), ("1kb", 1000)]
)
def test_sizes(text: str, wanted: int) -> None:
    assert size(text) == wanted


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5MiB", "1TiB", "1 M", "9" * 20])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no size"):
        size(text)


# Settings by name, as a configuration of Ray has them


def test_settings_by_name_are_those_of_the_command_line() -> None:
    words = "engines/x --ray --replicas 2 --max-body 1MiB --allow-domain a.org --deadline 5 --no-page"
    found = settings_of(parser().parse_args(words.split()))
    assert settings_from(told_of(found)) == found
    named = {"engine": "engines/x", "ray": True, "replicas": "2", "max_body": "1MiB", "allow_domain": ["a.org"]}
    assert settings_from(named | {"deadline": "5", "page": False}) == found


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({}, "there is no setting engine"),
        ({"engine": "x", "replica": 2}, "there is no setting 'replica'; known are engine, model, "),
        ({"engine": "x", "max_body": "much"}, "'much' is no size"),
        ({"engine": "x", "ray": True, "replicas": 0}, "--replicas must be"),
        ({"engine": "x", "video_decoders": 0}, "--video-decoders must be"),
        ({"engine": "x", "decode_seconds": "0"}, "--decode-seconds must be"),
        ({"engine": "x", "ray": True, "replicas": 3, "max_replicas": 2}, "--max-replicas must be"),
        ({"engine": "x", "replicas": 2}, "--replicas and --max-replicas are Ray's: give --ray, too"),
        ({"engine": "x", "decoder": "tensorrt"}, "unknown decoder 'tensorrt'"),
        ({"engine": "x", "decoder_key_file": "y"}, "--decoder-key-file is about a vLLM server"),
    ],
)
def test_a_name_or_a_value_that_makes_no_sense_is_refused(told: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        settings_from(told)
