"""A checkpoint in the original layout from its folder to an answer: built with the gate, asked, by the commands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from earlytom.families import family_named, geometry
from runtime import ask, cli
from runtime.engine.manifest import Manifest
from runtime.pipeline import Pipeline
from runtime.text.prompt import build_prompt
from tests.runtime.checkpoint.original_layout import original_folder
from tests.runtime.families.cases import CASES, QUESTION, said

CASE = CASES["llava_qwen"]

pytestmark = pytest.mark.usefixtures("each_export_once")


def test_an_engine_answers_as_the_model_does(
    tmp_path: Path, drawn_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how = {"mm_spatial_pool_mode": "average", "mm_newline_position": "grid"}
    folder, model, _ = original_folder(tmp_path / "model", **how)
    engine = CASE.built(folder, tmp_path / "engines", *CASE.on, "--verify-text")
    manifest, video = Manifest.read(engine), CASE.video()
    clip = CASE.clip(video)
    assert manifest.verification is not None
    assert manifest.verification["passed"]
    assert family_named(manifest.model.family).cells((5, 5)) == geometry(model.config).cells == (2, 2)
    with Pipeline.load(engine) as pipeline:
        answer = pipeline.ask(clip, QUESTION, max_new_tokens=12, kept=True)
        assert said(folder, answer) == CASE.greedy(folder, video, manifest.settings) != CASE.greedy(folder, video)
        assert answer.visual_tokens == manifest.tokens < manifest.tokens_full == CASE.frames * 4
        assert answer.kept is not None
        words = build_prompt(pipeline._core.tokenizer, QUESTION, family=family_named(manifest.model.family))
        rows = len(set((answer.kept.positions // 2).tolist()))  # each closed by a newline
        assert answer.prompt_tokens == words.length(manifest.tokens + rows)
        with pipeline.watch(clip) as watched:
            seen = watched.ask(QUESTION, max_new_tokens=12)
            assert (seen.tokens, seen.prompt_tokens) == (answer.tokens, answer.prompt_tokens)
    capsys.readouterr()
    asked = [str(drawn_clip), QUESTION, "--engine", str(engine), "--device", "cpu", "--max-new-tokens", "4", "--json"]
    assert cli.run(ask.main, asked) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["visual_tokens_full"] == CASE.frames * 4


def test_a_sentence_says_when_the_frames_were(tmp_path: Path) -> None:
    """Ids are those of the release's prompt: the video, a line that names every frame shown, the question."""
    how = {"mm_newline_position": "grid", "add_time_instruction": True}
    folder, _, _ = original_folder(tmp_path / "model", **how)
    engine = CASE.built(folder, tmp_path / "engines", *CASE.on, "--no-verify")
    clip = CASE.clip(CASE.video(), 3.0)
    located = ",".join(f"{number / 3:.2f}s" for number in (0, 2, 5, 8, 11, 14))
    sentence = (
        f"The video lasts for 5.00 seconds, and 6 frames are uniformly sampled from it. These frames are located at "
        f"{located}.Please answer the following questions related to this video."
    )
    with Pipeline.load(engine) as pipeline:
        words = build_prompt(pipeline._core.tokenizer, QUESTION, family=family_named(pipeline.manifest.model.family))
        before = pipeline._core.tokenizer.decode(words.prefix_ids)
        told = pipeline._core.tokenizer(f"\n{sentence}\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        assert words.at(clip.times()).suffix_ids == tuple(told)
        assert before.endswith("<|im_start|>user\n")
        answer = pipeline.ask(clip, QUESTION, max_new_tokens=12, kept=True)
        assert answer.kept is not None
        visual = answer.visual_tokens + len(set((answer.kept.positions // 3).tolist()))
        assert answer.prompt_tokens == len(words.prefix_ids) + visual + len(told)
        assert answer.prompt_tokens < words.room(visual, 2, CASE.frames)  # what is checked before the times are known
        with pipeline.watch(clip) as watched:
            seen = watched.ask(QUESTION, max_new_tokens=12)
            assert (seen.tokens, seen.prompt_tokens) == (answer.tokens, answer.prompt_tokens)
        later = CASE.clip(CASE.video(), 0.5)
        assert pipeline.ask(later, QUESTION, max_new_tokens=12).prompt_tokens > answer.prompt_tokens
        assert pipeline.ask(later, QUESTION, max_new_tokens=12).tokens != answer.tokens  # negative control
