"""The configuration: released presets, refusals, round trips."""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

import pytest

from earlytom import EarlyTomConfig, UserError
from earlytom.families import FAMILIES

# The table of released settings: benchmark -> ratio -> tau, merge layers.
RELEASED: list[tuple[str, float, float, tuple[int, int, int]]] = [
    ("mvbench", 0.10, 0.65, (8, 14, 20)),
    ("mvbench", 0.15, 0.8, (6, 14, 20)),
    ("mvbench", 0.20, 0.8, (6, 14, 20)),
    ("mvbench", 0.25, 0.8, (6, 14, 20)),
    ("videomme", 0.10, 0.3, (10, 21, 23)),
    ("videomme", 0.15, 0.4, (8, 21, 23)),
    ("videomme", 0.20, 0.5, (8, 21, 23)),
    ("videomme", 0.25, 0.7, (10, 21, 23)),
    ("longvideobench", 0.10, 0.3, (10, 21, 23)),
    ("longvideobench", 0.15, 0.5, (10, 21, 23)),
    ("longvideobench", 0.20, 0.6, (10, 21, 23)),
    ("longvideobench", 0.25, 0.8, (4, 14, 24)),
    ("egoschema", 0.10, 0.3, (10, 21, 23)),
    ("egoschema", 0.15, 0.5, (10, 21, 23)),
    ("egoschema", 0.20, 0.6, (10, 21, 23)),
    ("egoschema", 0.25, 0.7, (10, 21, 23)),
]


def test_the_defaults_are_the_released_ones() -> None:
    config = EarlyTomConfig()
    assert (config.retention_ratio, config.merge_layers, config.tau) == (0.1, (6, 14, 20), 0.8)
    assert (config.max_window, config.ema, config.trailing) == (6, 0.9, "released")
    assert (config.schedule, config.frame_budget) == ("adaptive", 0.75)
    assert (config.inner_layer, config.inner_ratio) == (None, 0.5)


@pytest.mark.parametrize(("benchmark", "ratio", "tau", "layers"), RELEASED)
def test_presets(benchmark: str, ratio: float, tau: float, layers: tuple[int, ...]) -> None:
    want = EarlyTomConfig(retention_ratio=ratio, tau=tau, merge_layers=layers)
    assert EarlyTomConfig.preset(benchmark, ratio) == want
    video = EarlyTomConfig.preset(benchmark, ratio, own=FAMILIES["llava_qwen"].presets)
    others = {("videomme", 0.25): (0.6, (10, 21, 23)), ("longvideobench", 0.25): (0.8, (6, 21, 23))}
    assert (video.tau, video.merge_layers) == others.get((benchmark, ratio), (tau, layers))


def test_presets_take_other_spellings_and_changes() -> None:
    want = EarlyTomConfig.preset("videomme", 0.2)
    assert EarlyTomConfig.preset("Video-MME", 0.20) == want
    assert EarlyTomConfig.preset("VIDEO_MME", 0.1 + 0.1) == want
    changed = EarlyTomConfig.preset("videomme", 0.2, schedule="budget", merge_layers=(1, 2))
    assert changed == want.replace(schedule="budget", merge_layers=(1, 2))


@pytest.mark.parametrize(
    ("benchmark", "ratio", "message"),
    [
        ("imagenet", 0.1, "preset 'imagenet' is not known: choose one of mvbench, videomme"),
        ("", 0.1, "preset '' is not known"),
        (None, 0.1, "preset None is not known"),
        ("videomme", 0.3, "not released at retention ratio 0.3: choose one of 0.1, 0.15, 0.2, 0.25, or give --merge-l"),
        ("videomme", math.nan, "retention_ratio must be in .* got nan"),
        ("videomme", "0.2", "retention_ratio must be a number .* got '0.2'"),
        ("videomme", 20, "retention_ratio must be in .* got 20"),
    ],
)
def test_unknown_presets_are_refused(benchmark: Any, ratio: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EarlyTomConfig.preset(benchmark, ratio)


NONSENSE: list[tuple[str, Any, str]] = [
    ("retention_ratio", 0, r"retention_ratio must be in \(0, 1\], got 0"),
    ("retention_ratio", -0.1, "got -0.1"),
    ("retention_ratio", 1.0001, "got 1.0001"),
    ("retention_ratio", 10, "got 10"),
    ("retention_ratio", math.nan, r"in \(0, 1\], got nan"),
    ("retention_ratio", math.inf, "got inf"),
    ("retention_ratio", "0.1", r"a number in \(0, 1\], got '0.1'"),
    ("retention_ratio", None, "got None"),
    ("retention_ratio", True, "got True"),
    ("retention_ratio", 10**400, r"in \(0, 1\], got 10000"),
    ("tau", 1.5, r"tau must be in \[-1, 1\], got 1.5"),
    ("tau", -1.5, "got -1.5"),
    ("tau", math.nan, "got nan"),
    ("tau", "0.8", "got '0.8'"),
    ("tau", False, "got False"),
    ("tau", [0.8], r"got \[0.8\]"),
    ("ema", 0, r"ema must be in \(0, 1\], got 0"),
    ("ema", 1.1, "got 1.1"),
    ("ema", math.nan, "got nan"),
    ("ema", True, "got True"),
    ("max_window", 0, "max_window must be a whole number of at least 1, got 0"),
    ("max_window", -1, "got -1"),
    ("max_window", 6.0, "got 6.0"),
    ("max_window", "6", "got '6'"),
    ("max_window", True, "got True"),
    ("max_window", math.nan, "got nan"),
    ("merge_layers", 6, "merge_layers must be a list of layer numbers, got 6"),
    ("merge_layers", "6,14", "got '6,14'"),
    ("merge_layers", None, "got None"),
    ("merge_layers", {6, 14}, "list of layer numbers"),
    ("merge_layers", (6, -1), "each of merge_layers must be a whole number of at least 0, got -1"),
    ("merge_layers", (6, 14.0), "got 14.0"),
    ("merge_layers", (True, 14), "got True"),
    ("merge_layers", ("6",), "got '6'"),
    ("merge_layers", (14, 6), r"different and ascending, got \(14, 6\)"),
    ("merge_layers", (6, 6), r"different and ascending, got \(6, 6\)"),
    ("trailing", "drop", "trailing must be one of released, keep, got 'drop'"),
    ("trailing", None, "got None"),
    ("schedule", "fixed", "schedule must be one of adaptive, budget, got 'fixed'"),
    ("schedule", True, "got True"),
    ("frame_budget", 0, r"frame_budget must be in \(0, 1\], got 0"),
    ("frame_budget", 24, "got 24"),
    ("frame_budget", math.nan, "got nan"),
    ("frame_budget", "0.75", "got '0.75'"),
    ("frame_budget", True, "got True"),
    ("frame_budget", (24, 18), "names 2 frame counts for 3 merge layers: give one count per merge layer, or one share"),
    ("frame_budget", (), "names 0 frame counts for 3 merge layers"),
    ("frame_budget", (24, 18, 0), "each of frame_budget must be a whole number of at least 1, got 0"),
    ("frame_budget", (24, 18, 14.5), "got 14.5"),
    ("inner_layer", 0, "inner_layer must be a whole number of at least 1, got 0"),
    ("inner_layer", 18.0, "got 18.0"),
    ("inner_layer", True, "got True"),
    ("inner_layer", "18", "got '18'"),
    ("inner_ratio", 1, r"inner_ratio must be in \[0, 1\), got 1"),
    ("inner_ratio", -0.1, "got -0.1"),
    ("inner_ratio", math.nan, "got nan"),
    ("inner_ratio", None, r"inner_ratio must be a number in \[0, 1\), got None"),
    ("frame_budget", (18, 24, 14), r"must not grow from one merge layer to the next, got \[18, 24, 14\]"),
]


@pytest.mark.parametrize(("name", "value", "message"), NONSENSE, ids=lambda x: repr(x)[:24])
def test_nonsense_is_refused_with_value_and_remedy(name: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        EarlyTomConfig(**{name: value})
    line = str(caught.value)
    assert name in line
    assert "\n" not in line
    assert " must " in line or ": give " in line  # what is accepted
    with pytest.raises(UserError, match=message):
        EarlyTomConfig().replace(**{name: value})


EDGES: list[tuple[str, Any]] = [
    ("retention_ratio", 1),
    ("retention_ratio", 1e-9),
    ("tau", -1),
    ("tau", 1),
    ("ema", 1),
    ("max_window", 1),
    ("merge_layers", ()),
    ("merge_layers", [0]),
    ("trailing", "keep"),
    ("schedule", "budget"),
    ("frame_budget", 1),
    ("frame_budget", [24, 24, 1]),
    ("inner_layer", 1),
    ("inner_layer", None),
    ("inner_ratio", 0),
    ("inner_ratio", 0.999),
]


@pytest.mark.parametrize(("name", "value"), EDGES)
def test_the_edges_of_what_makes_sense_are_accepted(name: str, value: Any) -> None:
    """Negative control of the refusals: they do not refuse everything."""
    got = getattr(EarlyTomConfig(**{name: value}), name)
    assert got == (tuple(value) if isinstance(value, list) else value)


def test_values_are_normalised() -> None:
    config = EarlyTomConfig(retention_ratio=1, tau=0, merge_layers=[1, 2], frame_budget=[3, 2])  # type: ignore[arg-type]
    assert [type(config.retention_ratio), type(config.tau)] == [float, float]
    assert config.merge_layers == (1, 2)
    assert config.frame_budget == (3, 2)
    assert config == EarlyTomConfig(retention_ratio=1.0, tau=0.0, merge_layers=(1, 2), frame_budget=(3, 2))
    assert len({config, config.replace()}) == 1  # hashable, by value


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(EarlyTomConfig)])
def test_it_is_frozen(name: str) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(EarlyTomConfig(), name, 0.5)


@pytest.mark.parametrize(
    "config",
    [
        EarlyTomConfig(),
        EarlyTomConfig.preset("mvbench", 0.1),
        EarlyTomConfig(merge_layers=(), frame_budget=()),
        EarlyTomConfig(
            retention_ratio=0.3, schedule="budget", frame_budget=(24, 18, 14), trailing="keep", max_window=9
        ),
        EarlyTomConfig(inner_layer=18),
        EarlyTomConfig(inner_layer=18, inner_ratio=0.25),
        EarlyTomConfig(inner_layer=18, inner_ratio=0),
        EarlyTomConfig(inner_ratio=0.25),
    ],
)
def test_dict_round_trip_through_json(config: EarlyTomConfig) -> None:
    assert EarlyTomConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_a_dict_has_every_setting_but_those_of_an_inner_merge_that_is_off() -> None:
    """Engines and records are found by the digest of this dict: it must stay what it was before there was one."""
    inner = {"inner_layer", "inner_ratio"}
    every = {field.name for field in dataclasses.fields(EarlyTomConfig)}
    assert set(EarlyTomConfig().to_dict()) == every - inner
    assert set(EarlyTomConfig(inner_layer=18).to_dict()) == every
    assert set(EarlyTomConfig(inner_layer=18).replace(inner_layer=None).to_dict()) == every - inner


@pytest.mark.parametrize(
    ("config", "on"),
    [
        (EarlyTomConfig(), False),
        (EarlyTomConfig(inner_layer=18), True),
        (EarlyTomConfig(inner_layer=18, inner_ratio=0), False),
        (EarlyTomConfig(inner_ratio=0.9), False),
    ],
)
def test_merging_inside_takes_a_layer_and_a_ratio(config: EarlyTomConfig, on: bool) -> None:
    assert config.merges_inside is on


def test_from_dict_fills_in_defaults_and_validates() -> None:
    assert EarlyTomConfig.from_dict({}) == EarlyTomConfig()
    assert EarlyTomConfig.from_dict({"tau": 0.5}) == EarlyTomConfig(tau=0.5)
    with pytest.raises(UserError, match="tau must be in"):
        EarlyTomConfig.from_dict({"tau": 5})
    with pytest.raises(UserError, match="unknown setting 'ratio' of method 'earlytom': the settings are retention_"):
        EarlyTomConfig.from_dict({"ratio": 0.1})


@pytest.mark.parametrize(
    ("depth", "layers"), [(26, (6, 14, 20)), (27, (6, 15, 21)), (8, (2, 4, 6)), (4, (1, 2)), (2, (0,)), (1, ())]
)
def test_default_layers_of_another_depth(depth: int, layers: tuple[int, ...]) -> None:
    assert EarlyTomConfig.layers_for(depth) == layers


@pytest.mark.parametrize("depth", range(1, 60))
def test_default_layers_can_be_used(depth: int) -> None:
    EarlyTomConfig(merge_layers=EarlyTomConfig.layers_for(depth)).check_layers(depth)


@pytest.mark.parametrize(
    ("depth", "message"),
    [
        (
            20,
            "merge layer 20 does not exist: .* layers 0 to 19; choose others with --merge-layers, for example 5,11,15",
        ),
        (8, "merge layer 14 does not exist: .* layers 0 to 7; .* for example 2,4,6"),
        (1, "merge layer 6 does not exist: .* layers 0 to 0; .* for example 0$"),
    ],
)
def test_layers_that_the_tower_lacks_are_refused(depth: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        EarlyTomConfig().check_layers(depth)
    EarlyTomConfig().check_layers(21)  # negative control
