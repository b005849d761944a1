"""What holds for every method: the registry, its settings, the counts it promises, and who else runs it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from earlytom import EarlyTomConfig, UserError, apply_earlytom, encode_video
from earlytom.encoder import VisualTokens
from earlytom.method import Counts, Method, State
from earlytom.methods import METHODS, by_name, method_of
from earlytom.methods.controls import TopK
from earlytom.methods.earlytom import EarlyTom
from tests.earlytom.test_encoder import NoHostSync
from tests.earlytom.tiny import VIDEO_TOKEN, made_video, tiny_llava, tiny_projector, tiny_tower, video_prompt

F, P = 8, 9
BUDGET = EarlyTomConfig(retention_ratio=0.3, merge_layers=(0, 2), tau=0.3, schedule="budget")
SETTINGS: dict[str, dict[str, Any]] = {
    "earlytom": BUDGET.to_dict(),
    "cells": {
        "retention_ratio": 0.3,
        "merge_layers": [0, 2],
        "frame_budget": 0.75,
        "power": 4.0,
        "rounds": 7,
        "schedule": "budget",
    },
    "holitom": {
        "retention_ratio": 0.3,
        "faithful": False,
        "tau": 0.5,
        "beta": 0.6,
        "neighbours": 7,
        "max_window": 1024,
        "seed": None,
        "inner_layer": None,
        "inner_ratio": 0.5,
    },
    "vqtoken": {"retention_ratio": 0.2, "faithful": False, "clusters": None, "most": 32, "seed": 0},
    "tome": {"retention_ratio": 0.2, "faithful": False, "each": 2, "depth": 4},
    "tempme": {
        "retention_ratio": 0.2,
        "faithful": False,
        "each": 1,
        "depth": 4,
        "merge_layers": [1, 3],
        "groups": [2, 2],
        "across": 30,
        "within": 10,
    },
    "bvllm-style": {"retention_ratio": 0.2, "faithful": False, "threshold": 0.75, "sharpness": 20.0},
    "visionzip": {"retention_ratio": 0.3, "faithful": False},
    "fastvid": {
        "retention_ratio": 0.4,
        "faithful": False,
        "context": 0.4,
        "least": 8,
        "tau": 0.9,
        "every": 4,
        "weight": 0.6,
        "neighbours": 4,
        "seed": 0,
    },
    "dycoke": {"retention_ratio": 0.5, "faithful": False},
    "unicomp": {"retention_ratio": 0.3, "faithful": False, "same": 0.005, "near": 0.2, "most": 2.0, "own": 0.5},
    "flashvid": {
        "retention_ratio": 0.4,
        "faithful": False,
        "diverse": 0.7,
        "least": 8,
        "tau": 0.9,
        "linked": 0.8,
        "neighbours": 7,
    },
    "fastv": {"retention_ratio": 0.3, "faithful": False, "inner_layer": 1},
    "unified": {"retention_ratio": 0.3, "faithful": False, "alike": 0.7, "clustered": 0.3},
    "evs": {"retention_ratio": 0.3, "faithful": False},
    "vidcom2": {"retention_ratio": 0.3, "faithful": False, "temperature": 0.01},
    "random": {"tokens": 13, "seed": 2, "video": 1},
    "frames": {"keep": 3},
    "top-k": {"tokens": 13, "layer": 1},
    "pooling": {"tokens": 13, "keep_frames": True},
}
# What they choose, or how many tokens, depends on values that the host waits for.
WAIT = {"holitom", "bvllm-style", "fastvid", "unicomp", "flashvid", "unified"}
DRAW = {"random", "vqtoken"}
every = pytest.mark.parametrize("name", METHODS)


def test_every_method_is_tested_here() -> None:
    assert SETTINGS.keys() == METHODS.keys()


@every
def test_settings_there_and_back(name: str) -> None:
    method = by_name(name, SETTINGS[name])
    assert (method.name, method.to_dict()) == (name, SETTINGS[name])
    with pytest.raises(UserError, match=f"unknown setting 'nonsense' of method '{name}'"):
        by_name(name, SETTINGS[name] | {"nonsense": 1})


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("holitom", {"retention_ratio": 0}, r"retention_ratio must be in \(0, 1\], got 0"),
        ("holitom", {"tau": 2}, r"tau must be in \[-1, 1\], got 2"),
        ("holitom", {"beta": -0.1}, r"beta must be in \[0, 1\], got -0.1"),
        ("holitom", {"neighbours": 0}, "neighbours must be a whole number of at least 1, got 0"),
        ("holitom", {"inner_ratio": 1}, r"inner_ratio must be in \[0, 1\), got 1"),
        ("holitom", {"faithful": "yes"}, "faithful must be true or false, got 'yes'"),
        (
            "holitom",
            {"k": 7},
            "unknown setting 'k' of method 'holitom': the settings are retention_ratio, faithful, tau, beta,",
        ),
        ("cells", {"retention_ratio": 0}, r"retention_ratio must be in \(0, 1\], got 0"),
        ("cells", {"power": -1}, r"power must be in \[0, 64\], got -1"),
        ("cells", {"power": float("nan")}, r"power must be in \[0, 64\], got nan"),
        ("cells", {"rounds": 0}, "rounds must be a whole number of at least 1, got 0"),
        ("cells", {"rounds": 2.5}, "rounds must be a whole number of at least 1"),
        ("cells", {"merge_layers": (3, 1)}, "merge_layers must be different and ascending"),
        ("cells", {"frame_budget": (4, 2)}, "frame_budget names 2 frame counts for 3 merge layers"),
        ("cells", {"schedule": "none"}, "schedule must be one of adaptive, budget, got 'none'"),
        ("cells", {"threshold": -0.1}, r"threshold must be in \[0, 3\], got -0.1"),
        ("cells", {"threshold": float("nan")}, r"threshold must be in \[0, 3\], got nan"),
        ("random", {"tokens": 0}, "tokens must be"),
        ("top-k", {"tokens": 3, "layer": -1}, "layer must be"),
        ("frames", {"keep": 2.5}, "keep must be"),
        (
            "tempme",
            {"depth": 4},
            r"merge_layers must be between 1 and 3 to act inside a tower of 4 layers, got \[8, 14",
        ),
        ("tome", {"depth": 0}, "depth must be a whole number of at least 1, got 0"),
        ("vqtoken", {"clusters": 0}, "clusters must be a whole number of at least 1, got 0"),
        ("vqtoken", {"clusters": "many"}, "clusters must be one of adaptive, got 'many'"),
        ("vqtoken", {"most": 13}, "most must be a whole number of at least 14, got 13"),
        ("vqtoken", {"seed": -1}, "seed must be a whole number of at least 0, got -1"),
        ("unicomp", {"faithful": True}, "unicomp has no released form here"),
        ("unicomp", {"near": 3}, r"near must be in \[0, 2\], got 3"),
        ("unicomp", {"most": 0.5}, "most must be at least 1, got 0.5"),
        ("bvllm-style", {"threshold": 2}, r"threshold must be in \[0, 1\], got 2"),
        ("bvllm-style", {"sharpness": -1}, "sharpness must be at least 0, got -1"),
        ("fastvid", {"context": 2}, r"context must be in \[0, 1\], got 2"),
        ("fastvid", {"tau": -2}, r"tau must be in \[-1, 1\], got -2"),
        ("fastvid", {"every": 0}, "every must be a whole number of at least 1, got 0"),
        ("unified", {"faithful": True}, "unified follows a description and has no released form"),
        ("unified", {"alike": 2}, r"alike must be in \[-1, 1\], got 2"),
        ("unified", {"clustered": -1}, r"clustered must be in \[0, 1\], got -1"),
        ("flashvid", {"diverse": 2}, r"diverse must be in \[0, 1\], got 2"),
        ("flashvid", {"linked": 2}, r"linked must be in \[-1, 1\], got 2"),
        ("flashvid", {"least": 0}, "least must be a whole number of at least 1, got 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        by_name(name, settings)


@every
def test_counts_hold_for_any_video(name: str) -> None:
    method = by_name(name, SETTINGS[name])
    counts = method.counts(F, P)
    for kind in ("noise", "still", "scenes"):
        out = encode_video(tiny_tower("siglip"), tiny_projector(), made_video(kind, F), method)
        assert out.tokens.shape[0] == out.positions.shape[0] <= F * P
        assert out.sources.shape == (out.frames_per_stage[-1], F)
        assert torch.allclose(out.sources.sum(1), torch.ones(out.frames_per_stage[-1]), atol=1e-5)
        assert int(out.positions.max()) < out.frames_per_stage[-1] * P
        if counts is not None:
            assert (out.frames_per_stage, len(out.tokens)) == (counts.stages, counts.tokens)


@every
def test_no_method_asks_the_device_for_a_value(name: str) -> None:
    """What is random is drawn on the host and sent, so it is not on this device without data."""
    model, projector = tiny_tower("siglip", device="meta"), tiny_projector(device="meta")
    pixels, method = torch.empty(F, 3, 20, 20, device="meta"), by_name(name, SETTINGS[name])
    if name in DRAW:
        with pytest.raises(RuntimeError, match="copies between"), NoHostSync():
            encode_video(model, projector, pixels, method)
        return
    if name in WAIT:
        with pytest.raises((RuntimeError, NotImplementedError), match=r"meta|copies between"), NoHostSync():
            encode_video(model, projector, pixels, method)
        return
    with NoHostSync():
        out = encode_video(model, projector, pixels, method)
    counts = method.counts(F, P)
    assert counts is None or out.tokens.shape == (counts.tokens, 24)


@every
def test_a_whole_model_generates_with_every_method(name: str) -> None:
    model = tiny_llava()
    method = by_name(name, SETTINGS[name])
    prompt, pixels = video_prompt(F), made_video("scenes", F)[None]
    counts = method.counts(F, P)
    with apply_earlytom(model, method) as applied:
        ids, _, embeds = applied.shorten(prompt, None, pixels)
        assert int((ids == VIDEO_TOKEN).sum()) == embeds.shape[1] - 7
        if counts is not None:
            assert embeds.shape[1] == counts.tokens + 1 + 7  # the closing newline, and the text
        out = model.generate(input_ids=prompt, pixel_values_videos=pixels, max_new_tokens=2, do_sample=False)  # type: ignore[operator]
    assert out.shape == (1, prompt.shape[1] + 2)


def test_earlytom_counts_what_only_the_video_tells_as_unknown() -> None:
    assert EarlyTom(BUDGET).counts(F, P) == Counts((8, 6, 4), 4 * 6)  # ceil(9 * .3 * 8 / 4)
    assert EarlyTom(BUDGET.replace(schedule="adaptive")).counts(F, P) is None


def test_methods_that_run_alike_up_to_the_choice_say_so() -> None:
    ratio, layers = BUDGET.replace(retention_ratio=0.7), BUDGET.replace(merge_layers=(0,))
    assert EarlyTom(BUDGET).tower_key() == EarlyTom(ratio).tower_key() != EarlyTom(layers).tower_key()
    top_k = [TopK(tokens, layer).tower_key() for tokens, layer in ((1, 1), (2, 1), (1, 2))]
    assert top_k[0] == top_k[1] != top_k[2]
    assert by_name("frames", {"keep": 2}).tower_key() != by_name("frames", {"keep": 3}).tower_key()


def test_settings_stand_for_earlytom_and_a_method_for_itself() -> None:
    method = by_name("frames", {"keep": 2})
    assert method_of(method) is method
    made = method_of(BUDGET)
    assert isinstance(made, EarlyTom)
    assert made.config is BUDGET


def test_what_needs_training_says_so() -> None:
    trained = {"bvllm": "two Q-Formers", "vqtoken-attention": "VQ-attention", "tempme-trained": "adapters"}
    for name, said in trained.items():
        with pytest.raises(UserError, match=f"method '{name}' needs trained modules: {said}"):
            by_name(name, {})


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(UserError, match="no method named 'magic': choose one of earlytom, cells, random,"):
        by_name("magic", {})


class Halves(Method):
    """Made up: merges frames by twos after its layers, and may watch one."""

    name = "halves"

    def __init__(self, layers: tuple[int, ...], watches: int | None) -> None:
        self.layers, self.watches = layers, watches
        self.looked: list[int] = []

    @classmethod
    def from_dict(cls, settings: Any) -> Halves:
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        return {"layers": self.layers, "watches": self.watches}

    def tower_key(self) -> Any:
        return self.layers, self.watches

    def counts(self, frames: int, tokens_per_frame: int) -> Counts:
        stages = tuple(frames // 2**stage for stage in range(len(self.layers) + 1))
        return Counts(stages, stages[-1] * tokens_per_frame)

    def watched(self, depth: int) -> int | None:
        return self.watches

    def after_layer(
        self, layer: int, hidden: Tensor, received: Tensor | None, state: State, note: Any
    ) -> tuple[Tensor, Tensor | None]:
        weights = torch.eye(len(hidden) // 2).repeat_interleave(2, 1) / 2
        state.sources = weights @ state.sources
        state.stages.append(len(hidden) // 2)
        return hidden.unflatten(0, (-1, 2)).mean(1), None if received is None else weights @ received

    def look(self, hidden: Tensor, state: State) -> None:
        self.looked.append(len(hidden))

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        assert (relevance is None) == (self.watches is None)
        return features.flatten(0, 1), torch.arange(features.shape[:2].numel())


def halved(layers: tuple[int, ...], watches: int | None) -> tuple[VisualTokens, list[int]]:
    method = Halves(layers, watches)
    return encode_video(tiny_tower("clip"), tiny_projector(), made_video("drift", F), method), method.looked


def test_a_method_that_needs_no_attention_and_merges_in_its_own_way() -> None:
    out, looked = halved((1,), None)
    assert out.frames_per_stage == (8, 4)
    assert out.tokens.shape == (4 * P, 24)
    assert out.sources[1].tolist() == [0, 0, 0.5, 0.5, 0, 0, 0, 0]
    assert (out.received.shape, looked) == ((4, 0), [])
    assert out.segments.tolist() == [[0, 0], [1, 1], [2, 2], [3, 3]]  # no segments: every frame is its own


def test_received_attention_is_that_of_any_layer_and_merged_from_there_on() -> None:
    untouched, _ = halved((), 0)
    for layers, wanted in (((1, 2), [4]), ((0, 2), [4]), ((2, 3), [4])):
        out, looked = halved(layers, 0)
        merged = out.sources @ untouched.received  # of layer 0, which runs on all frames
        torch.testing.assert_close(out.received, merged)
        assert looked == wanted
        assert out.tokens.shape == (2 * P, 24)
    last, looked = halved((0, 1), 3)
    assert (last.received.shape, looked) == ((2, 25), [2])
