"""Products of int8: their words, and what they cost."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given as drawn
from hypothesis import strategies as st

from builder.precision import products
from builder.precision.islands import DEFAULT, Costs, Islands
from builder.precision.products import LAYERED, PRODUCTS, Product
from builder.settings.arguments import parse
from builder.settings.config import BuildConfig
from earlytom.errors import UserError
from tests.builder.conftest import FRAMES

DEPTH = 6
ANY = st.frozensets(st.sampled_from(products.every(DEPTH, DEFAULT)))


@drawn(ANY)
def test_words_come_back_as_the_products_they_name(chosen: frozenset[Product]) -> None:
    assert products.parse(",".join(products.words(chosen)) or products.NONE, DEPTH) == chosen


def test_words() -> None:
    found = products.parse("fc2:0-2, fc2:4,projector-out,QKV:5", DEPTH)
    assert products.words(found) == ("qkv:5", "fc2:0-2", "fc2:4", "projector-out")
    assert len(products.parse("out", DEPTH)) == DEPTH
    assert products.choice("none", DEPTH) == ()
    assert products.choice(None, DEPTH) == products.choice("auto", DEPTH) == ("auto",)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("fc3", r"'fc3' is no product; choose among qkv"),
        ("auto,fc2", r"'auto' is no product"),
        ("projector-in:2", r"only qkv, out, fc1, fc2 are chosen by layer"),
        ("fc2:6", r"--int8-keep 'fc2:6': give a layer, or a range such as fc2:0-5"),
        ("", r"'' is no product"),
    ],
)
def test_other_words_are_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        products.parse(text, DEPTH)
    assert "\n" not in str(caught.value)


def test_what_is_inside_an_fp32_island_is_not_int8() -> None:
    found = products.every(4, Islands(frozenset({"projector"}), frozenset({1}), frozenset({2})))
    assert products.words(found) == ("qkv:0", "qkv:2-3", "out:0", "out:2-3", "fc1:0-1", "fc1:3", "fc2:0-1", "fc2:3")
    assert products.words(products.every(1, DEFAULT)) == (*(f"{name}:0" for name in LAYERED), *list(PRODUCTS)[4:])


@pytest.fixture
def config_of(small_checkpoint: Path) -> object:
    def make(*words: str) -> BuildConfig:
        given = ["--model", str(small_checkpoint), "--frames", str(FRAMES), "--ratio", "0.3", "--backend", "onnx"]
        return parse([*given, *words])[1]

    return make


def test_costs_are_those_of_the_islands_without_attention_itself(config_of: object) -> None:
    config: BuildConfig = config_of("--int8")  # type: ignore[operator]
    costs, every = Costs(config), config.may_be_int8
    assert costs.of("mlp").products == sum(products.flops_of(costs, p) for p in every if p.name in ("fc1", "fc2"))
    assert costs.projector_flops == sum(products.flops_of(costs, p) for p in every if p.layer < 0)
    own = sum(4 * frames * costs.tokens**2 * costs.width for frames in costs.frames)  # logits and values
    assert costs.of("attention").products - own == sum(
        products.flops_of(costs, p) for p in every if p.name in ("qkv", "out")
    )
    assert 0.5 < config.int8_share() < config.half_share


@pytest.mark.parametrize(
    "given", [("--schedule", "adaptive"), ("--chunk", "4"), ("--chunk", "4", "--merge-layers", "none")]
)
def test_shares_of_stages_add_up(config_of: object, given: tuple[str, ...]) -> None:
    config: BuildConfig = config_of("--int8", *given)  # type: ignore[operator]
    shares = config.stage_int8_shares()
    assert len(shares) == len(config.stage_half_shares)
    assert all(0 <= share <= half for share, half in zip(shares, config.stage_half_shares, strict=True))
    if config.chunk is not None:
        parts = [whole for whole, _ in Costs(config).chunk_products(config.islands)]
        assert sum(s * p for s, p in zip(shares, parts, strict=True)) / sum(parts) == pytest.approx(config.int8_share())
    assert all(share == 0 for share in config.stage_int8_shares(config.may_be_int8))


def test_the_key_and_the_name_tell_what_was_asked_for(config_of: object) -> None:
    asked = ([], ["--int8"], ["--int8", "--int8-keep", "none"], ["--int8", "--int8-keep", "fc2:0"])
    configs = [config_of(*words) for words in asked]  # type: ignore[operator]
    assert len({config.key() for config in configs}) == len(asked)
    assert "int8_keep" not in configs[0].key_parts()  # what was built before is still found
    assert ["-int8-" in config.name(config.key()) for config in configs] == [False, True, True, True]
    weights = [config.expected_bytes["weights"] for config in configs]
    assert weights[1] == weights[2] < weights[3] < weights[0]


def test_keeping_without_int8_is_refused() -> None:
    with pytest.raises(UserError, match="--int8-keep is for --int8: add it"):
        parse(["--int8-keep", "fc2"])


def test_a_family_whose_products_are_not_known_is_refused() -> None:
    with pytest.raises(UserError, match=r"--int8 knows the products of LLaVA-OneVision, not of InternVL.*leave it out"):
        parse(["--int8", "--model", "random:internvl3-1b", "--backend", "onnx"])
