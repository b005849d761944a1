"""Families from a folder to an answer: built, asked, watched, embedded, served; InternVL, whose frames have spans of
their own, most of all."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from builder import build
from earlytom import apply_earlytom
from earlytom.families import INTERNVL, family_of, geometry
from earlytom.standing import FrameSpan, frame_spans
from runtime import ask, bench, cli
from runtime.checkpoint import Checkpoint, Preprocessing, describe, load_model, load_tokenizer
from runtime.decoder.eager import InnerMerge
from runtime.decoder.sampling import GREEDY
from runtime.engine.manifest import Manifest
from runtime.pipeline import Pipeline
from runtime.serve.backend import Asked, Local
from runtime.serve.decoding import Decoders
from runtime.serve.fetch import FetchRules
from runtime.serve.media import Media, TakenVideo, VideoPart
from runtime.text.messages import ChatMessage
from runtime.text.prompt import build_prompt
from runtime.video import Clip, load_clip, resize_frames, sample_indices
from runtime.video.sample import times_of_sample
from tests.processes import HANG_SECONDS
from tests.runtime.checkpoint.family_folders import family_folder

pytestmark = pytest.mark.usefixtures("each_export_once")

F, CELLS, QUESTION = 6, 4, "What happens?"
ON = ["--ratio", "0.5", "--merge-layers", "0,1,2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_folder(tmp_path_factory.mktemp("internvl"), "internvl")[0]


def built(folder: Path, out: Path, *words: str) -> Path:
    arguments = ["--model", str(folder), "--frames", str(F), "--backend", "onnx", "--fp32", "--out", str(out), *words]
    assert build.main(arguments) == 0
    (engine,) = out.iterdir()
    return engine


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the gate, its text too."""
    return built(folder, tmp_path_factory.mktemp("engines"), *ON, "--verify-text")


@pytest.fixture(scope="module")
def frames() -> Tensor:
    """uint8 [15, 3, 16, 16], some of them alike."""
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randint(0, 256, (4, 3, 16, 16), generator=generator)
    return (
        scenes[torch.arange(15) // 4]
        .add(torch.randint(0, 40, (15, 3, 16, 16), generator=generator))
        .clamp(max=255)
        .byte()
    )


def pixels_of(checkpoint: Checkpoint, frames: Tensor) -> Tensor:
    """What transformers' processor makes of the frames: its sample, the documented arithmetic."""
    step = len(frames) / F
    prepared: Preprocessing = checkpoint.preprocessing
    if prepared.sampling == "middles":
        chosen = torch.arange(step / 2, len(frames), step).int()  # as it is written there
    else:
        chosen = torch.linspace(0, len(frames) - 1, F).int()
    frames = resize_frames(frames, prepared.size)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (prepared.mean, prepared.std))
    return (frames[chosen.long()] / 255 - mean) / std


def greedy(folder: Path, frames: Tensor, *, on: bool) -> list[int]:
    """Ids of `generate` with EarlyTom as in the engine, or of the untouched model."""
    model: Any = load_model(folder)
    family, each = family_of(model.config), geometry(model.config).tokens_per_frame
    words = build_prompt(load_tokenizer(folder), QUESTION, family=family)
    words = words.at(times_of_sample(len(frames), F, family.sampling))
    spans = [FrameSpan(number, each) for number in range(F)]
    ids = words.input_ids(sum(family.spans(model.config, F * family.step)), spans)
    pixels = pixels_of(describe(folder), frames)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "max_new_tokens": 12}
    given[family.pixels_name] = pixels if family is INTERNVL else pixels[None]
    if not on:
        return model.generate(**given)[0, ids.shape[1] :].tolist()
    with apply_earlytom(model, _settings(folder)):
        return model.generate(**given)[0, ids.shape[1] :].tolist()


def _settings(folder: Path) -> Any:
    from builder.settings.arguments import parse

    return parse(["--model", str(folder), "--frames", str(F), "--backend", "onnx", *ON])[1].earlytom


def said(folder: Path, answer: Any) -> list[int]:
    """Its ids; `generate` returns the one that ended it, too."""
    stops = load_model(folder).generation_config.eos_token_id
    assert answer.finish in ("length", "stop")
    return [*answer.tokens, *([stops[0]] if answer.finish == "stop" else [])]


def test_a_watched_answer_is_that_of_one_prompt_where_tokens_keep_their_places(engine: Path, frames: Tensor) -> None:
    with Pipeline.load(engine, positions="original") as pipeline, pipeline.watch(frames) as watched:
        for question in (QUESTION, "Who is it?", "And then?", "When?"):
            wanted = pipeline.ask(frames, question, max_new_tokens=12).tokens
            assert watched.ask(question, max_new_tokens=12).tokens == wanted


def test_an_engine_answers_as_the_model_does_with_earlytom(folder: Path, engine: Path, frames: Tensor) -> None:
    manifest = Manifest.read(engine)
    assert manifest.model.family == "internvl"
    assert manifest.model.preprocessing.sampling == "middles"
    assert manifest.verification is not None
    assert manifest.verification["passed"]
    assert Manifest.from_dict(manifest.to_dict()) == manifest
    wanted = greedy(folder, frames, on=True)
    with Pipeline.load(engine) as pipeline:
        answer = pipeline.ask(frames, QUESTION, max_new_tokens=12, kept=True)
        assert said(folder, answer) == wanted
        assert wanted != greedy(folder, frames, on=False)  # negative control: what is kept matters
        assert answer.visual_tokens == manifest.tokens < manifest.tokens_full == F * CELLS
        assert answer.kept is not None
        spans = frame_spans(answer.kept.positions, answer.kept.sources, CELLS)
        words = build_prompt(load_tokenizer(folder), QUESTION, family=INTERNVL)
        assert answer.prompt_tokens == words.length(manifest.tokens, spans)

        again = pipeline.ask(frames, QUESTION, max_new_tokens=12)
        with pipeline.watch(frames) as watched:
            seen = watched.ask(QUESTION, max_new_tokens=12)
        assert seen.tokens == again.tokens == answer.tokens
        assert answer.sampling == "middles"
        assert seen.prompt_tokens == answer.prompt_tokens
        assert seen.cached_tokens == answer.prompt_tokens - len(words.suffix_ids)
        assert pipeline.embed(frames, QUESTION).shape == (1, answer.prompt_tokens, 32)
    with Pipeline.load(engine, inner=InnerMerge(1, 0.5)) as merging:
        merged = merging.ask(frames, QUESTION, max_new_tokens=12)
        assert merged.prompt_tokens == answer.prompt_tokens


@pytest.mark.parametrize("name", ["internvl", "llava_next_video", "smolvlm"])
def test_with_all_tokens_an_engine_answers_as_transformers_do(name: str, tmp_path: Path, frames: Tensor) -> None:
    folder, _ = family_folder(tmp_path / "model", name)
    engine = built(folder, tmp_path / "off", "--ratio", "1", "--merge-layers", "none", "--no-verify")
    with Pipeline.load(engine) as pipeline:
        assert said(folder, pipeline.ask(frames, QUESTION, max_new_tokens=12)) == greedy(folder, frames, on=False)


@pytest.mark.parametrize("name", ["internvl", "llava_next_video", "llava_qwen", "smolvlm"])
def test_cells_are_built_and_asked_with_positions_and_bias(name: str, tmp_path: Path, frames: Tensor) -> None:
    folder, model = family_folder(tmp_path / "model", name)
    engine = built(folder, tmp_path / "cells", "--method", "cells", *ON)
    with Pipeline.load(engine) as pipeline, Pipeline.load(engine, backend="torch") as reference:
        answer = pipeline.ask(frames, QUESTION, max_new_tokens=12)
        assert answer.tokens == reference.ask(frames, QUESTION, max_new_tokens=12).tokens
        assert answer.visual_tokens == pipeline.manifest.tokens < F * geometry(model.config).tokens_per_frame


@pytest.mark.parametrize("count", [6, 7, 15, 32, 100, 299, 1000])
@pytest.mark.parametrize("frames", [6, 8, 16, 32])
def test_frames_are_sampled_as_transformers_do(count: int, frames: int) -> None:
    chosen = sample_indices(count, frames, "middles").tolist()
    if frames <= count:
        step = count / frames
        assert chosen == torch.arange(step / 2, count, step).int().tolist()
    assert len(chosen) == frames
    assert chosen == sorted(chosen)
    assert 0 <= chosen[0] <= chosen[-1] < count
    assert sample_indices(100, 8, "middles").tolist() != sample_indices(100, 8).tolist()  # negative control


def test_the_commands_ask_and_bench_take_it(
    folder: Path, engine: Path, drawn_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(drawn_clip), QUESTION, "--engine", str(engine), "--device", "cpu", "--max-new-tokens", "8"]
    assert cli.run(ask.main, [*words, "--json"]) == 0
    asked = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert asked["visual_tokens_full"] == F * CELLS
    words = ["--model", str(folder), "--engine", str(engine), "--video", str(drawn_clip)]
    words += f"--frames {F} --device cpu --ratio 0.5 --merge-layers 0,1,2 --requests 1 --warmup 0".split()
    words += f"--concurrency none --repeats 1 --scale-repeats 1 --max-new-tokens {CELLS} --json".split()
    assert cli.run(bench.main, words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokens = {one["name"].split()[0]: one["visual_tokens"] for one in found["variants"]}
    assert list(tokens) == ["full", "adaptive", "budget", "onnxruntime"]
    assert "naive: EarlyTom was not released for InternVL" in found["left_out"]
    assert tokens["onnxruntime"] == tokens["budget"] < tokens["full"] == F * CELLS


def test_a_server_samples_its_videos_as_the_family_does(engine: Path, drawn_clip: Path) -> None:
    """The same answer as the pipeline gives to the file; frames from the first to the last give another clip."""
    shown: list[Tensor] = []

    async def decoded(taken: TakenVideo, counts: Any, size: tuple[int, int]) -> Clip:
        sampling = pipeline.manifest.model.preprocessing.sampling
        clip = await decoders.clip(taken, counts, size, sampling)
        shown.append(clip.frames)
        return clip

    async def answer() -> Any:
        await decoders.start()
        try:
            message, deadline = ChatMessage("user", QUESTION), time.monotonic() + HANG_SECONDS
            asked = Asked((message,), GREEDY, (), None, 12, 12, True, "k", deadline)
            url = "data:video/mp4;base64," + base64.b64encode(drawn_clip.read_bytes()).decode()
            taken = await Media(FetchRules()).take(VideoPart(url=url))
            return [delta async for delta in backend.deltas(asked, taken)][-1].answer
        finally:
            await decoders.close()

    decoders = Decoders()
    with Pipeline.load(engine, device="cpu") as pipeline:
        backend = Local(pipeline, decoded, videos=2)
        found = asyncio.run(answer())
        backend.close()
        assert found.tokens == pipeline.ask(drawn_clip, QUESTION, max_new_tokens=12).tokens
    size = shown[0].shape[2:]
    assert torch.equal(shown[0], load_clip(drawn_clip, F, size, sampling="middles").frames)
    assert not torch.equal(shown[0], load_clip(drawn_clip, F, size).frames)
