"""The field's methods as rows of the table: what they are and cost, and how a decoder that leaves out is asked."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch

from builder.evaluation.bench import EvaluationBench, EvaluationJob, Setting
from builder.evaluation.methods import chosen, methods
from builder.evaluation.results import _pairs
from builder.evaluation.timing import Prefill
from builder.evaluation.ways.compared import compared_rows, ways
from builder.micro.packing import Standing
from earlytom import encode_video, flops
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.inner import InnerSettings
from earlytom.inner_decoder import apply_inner
from earlytom.methods import by_name
from earlytom.methods.published import PUBLISHED
from runtime.text.places import Placing

BASE = EarlyTomConfig(merge_layers=(2, 4, 6))
DEPTH, TEXT, F, P, PATCHES = 8, 4, 16, 25, 81


@lru_cache
def bench() -> EvaluationBench:
    return EvaluationBench(EvaluationJob("micro", BASE, ("compared", "cells-rounds"), (0.05, 0.1, 0.15, 0.2)))


def one(name: str, ratio: float | None = 0.1) -> Setting:
    return next(found for found in bench().settings if (found.method.name, found.ratio) == (name, ratio))


def test_every_published_method_is_a_row() -> None:
    assert {way.method for way in ways(DEPTH, TEXT).values()} == PUBLISHED.keys()
    rows = {row.name: row for row in compared_rows(DEPTH, TEXT)}
    assert rows.keys() == ways(DEPTH, TEXT).keys()
    assert {row.group for row in rows.values()} == {"compared"}
    assert [name for name, row in rows.items() if not row.scaled] == ["vqtoken-adaptive", "dycoke-least", "dycoke"]
    assert [name for name, row in rows.items() if row.told != Placing()] == ["fastvid", "evs"]


def test_they_are_measured_at_few_ratios_and_only_when_asked_for() -> None:
    found = [(setting.method.name, setting.ratio) for setting in bench().settings]
    assert [ratio for name, ratio in found if name == "holitom"] == [0.05, 0.1, 0.2]
    assert [ratio for name, ratio in found if name == "cells-rounds"] == [0.05, 0.1, 0.15, 0.2]
    assert [ratio for name, ratio in found if name == "dycoke"] == [None]
    known = methods(BASE, DEPTH)
    assert not [row for row in chosen(known, ["all"]) if row.group == "compared"]
    assert [row.name for row in chosen(known, ["fastv"])] == ["full", "fastv"]


@pytest.mark.parametrize("name", ["bvllm", "vqtoken-attention", "tempme-trained"])
def test_what_needs_training_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"--methods {name}: it needs "):
        chosen(methods(BASE, DEPTH), [name])


def test_released_forms_are_never_beside_corrected_ones() -> None:
    """Of a method both forms exist, and a table has one of them; those without a released form are not in its table."""
    corrected, released = (
        {row.name: row.title for row in methods(BASE, DEPTH, faithful=faithful).values() if row.group == "compared"}
        for faithful in (False, True)
    )
    assert corrected.keys() - released.keys() == {"fastv", "unicomp", "unified", "evs", "vidcom2"}
    assert all(title.endswith(", released form") for title in released.values())
    assert not any("released form" in title for title in corrected.values())
    assert not set(corrected.values()) & set(released.values())


@pytest.mark.parametrize("name", ["holitom", "tempme", "tome-tower", "visionzip", "vqtoken", "dycoke-least"])
def test_a_row_is_its_method(name: str) -> None:
    """The tokens that the method gives by itself; at another ratio there are others."""
    way = ways(DEPTH, TEXT)[name]
    clip, _ = bench().clip(0)
    setting = one(name, None if way.ratio else 0.2)
    got = setting.visual(clip)
    settings = {"retention_ratio": way.ratio or 0.2} | way.settings(clip, 0.2)
    part = bench().vision._vision
    pixels = clip.frames.float() * bench().vision._scale + bench().vision._shift
    wanted = encode_video(part.tower.model, part.projector, pixels, by_name(way.method, settings), depth=DEPTH)  # type: ignore[attr-defined]
    torch.testing.assert_close(got.tokens, wanted.tokens, rtol=1e-4, atol=1e-4)
    assert got.place is not None
    assert torch.equal(got.place, wanted.place)
    if not way.ratio:
        assert len(one(name, 0.1).visual(clip).tokens) < len(got.tokens)


def test_what_merging_inside_the_tower_costs() -> None:
    config = bench().checkpoint.config
    clip, _ = bench().clip(0)
    cost = {name: bench().cost(one(name, ratio).visual(clip)) for name, ratio in (("full", None), ("tempme", 0.1))}
    assert one("tome-tower").visual(clip).ran == tuple((F, PATCHES - 5 * layer) for layer in range(DEPTH))
    ran = one("tempme").visual(clip).ran
    assert [count for count, _ in ran] == [16, 16, 8, 8, 4, 4, 2, 2]
    assert cost["tempme"][2] < 0.7 * cost["full"][2]
    vision = config.vision_config
    whole = flops.merged_encoder(vision, PATCHES, F, [(F, PATCHES)] * DEPTH)
    assert whole == flops.vision_encoder(vision, PATCHES, (F,), (), DEPTH)
    saved = whole - flops.merged_encoder(vision, PATCHES, F, ran)
    assert cost["full"][2] - cost["tempme"][2] == saved


def test_what_leaving_out_inside_the_decoder_costs() -> None:
    clip, _ = bench().clip(0)
    tokens, _, vision, prefill = bench().cost(one("fastv").visual(clip))
    full, _, whole, most = bench().cost(one("full", None).visual(clip))
    assert (tokens, vision) == (full, whole) == (F * P, whole)
    assert prefill == flops.prefill(bench().model.config.text_config, F * P, inner_layer=2, inner_ratio=0.9) < most


@pytest.mark.parametrize("name", ["fastv", "holitom-inner"])
def test_questions_to_a_decoder_that_leaves_out(name: str) -> None:
    """As the decoder begins each answer by itself: every question decides for itself."""
    setting, prefill = one(name, 0.05), Prefill(bench().model, bench().tokenizer)
    differs = False
    for index in range(3):
        clip, known = bench().clip(index)
        visual = setting.visual(clip)
        assert visual.inner is not None
        (found,) = bench()._inside([visual.tokens], [known.questions], [setting.standing(clip, visual)], visual.inner)
        first = [prefill(visual.tokens, question.text, None, visual.inner) for question in known.questions]
        assert [outcome.said[0] for outcome in found] == first
        plain = bench().scorer.score([visual.tokens], [bench().scorer.pack(known.questions)])[0]
        differs |= found != plain
    assert differs == (name == "fastv")  # a twentieth of 400 tokens, not half of 26, says something else
    assert "_earlytom_inner" not in vars(bench().model.get_decoder())


def test_leaving_nothing_out_changes_no_answer() -> None:
    """Negative control: with nearly all left out, answers differ."""
    clip, known = bench().clip(1)
    visual = one("full", None).visual(clip)
    told = [Standing(F * P)]
    plain = bench().scorer.score([visual.tokens], [bench().scorer.pack(known.questions)])[0]
    nearly = bench()._inside([visual.tokens], [known.questions], told, InnerSettings(3, 1e-9, fold=False))[0]
    assert nearly == plain
    least = bench()._inside([visual.tokens], [known.questions], told, InnerSettings(1, 0.995, fold=False))[0]
    assert least != plain


def test_a_pack_of_several_questions_goes_by_no_question() -> None:
    clip, known = bench().clip(0)
    pack = bench().scorer.pack(known.questions)
    with apply_inner(bench().model.get_decoder(), 2) as inner, pytest.raises(ValueError, match="one question each"):
        bench().scorer.score([one("full", None).visual(clip).tokens], [pack], None, inner)


def test_ours_are_compared_with_each_of_them() -> None:
    settings = bench().settings
    named = [(settings[a].method.name, settings[b].method.name, settings[b].ratio) for a, b in _pairs(settings)]
    for name in ("holitom", "fastv", "unified"):
        assert ("cells-rounds", name, 0.2) in named
    assert ("holitom", "fastv", 0.2) not in named
