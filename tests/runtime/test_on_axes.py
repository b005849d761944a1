"""A family of pairs of pictures, states of layers and positions on axes, from a folder to an answer: built, asked,
watched, served, refused where it is not known; Qwen3-VL."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor

from builder import build
from earlytom import UserError, apply_earlytom
from earlytom.cells.config import CellsConfig
from earlytom.families.qwen3_vl import QWEN3_VL
from runtime import ask, bench, cli
from runtime.checkpoint import describe, load_model, load_tokenizer
from runtime.decoder.eager import InnerMerge
from runtime.decoder.sampling import GREEDY
from runtime.engine.manifest import Manifest
from runtime.pipeline import Pipeline
from runtime.serve.backend import Asked, Local
from runtime.serve.decoding import Decoders
from runtime.serve.fetch import FetchRules
from runtime.serve.media import Media, TakenVideo, VideoPart
from runtime.text.messages import ChatMessage
from runtime.video import Clip, clip_from_frames, sample_indices
from tests.processes import HANG_SECONDS
from tests.runtime.checkpoint.family_folders import family_folder

pytestmark = pytest.mark.usefixtures("each_export_once")

F, STEPS, QUESTION, SIZE = 8, 4, "What happens?", (24, 16)
CELLS = (SIZE[0] // 8) * (SIZE[1] // 8)
ON = ["--ratio", "0.5", "--merge-layers", "0,1"]
OFF = ["--ratio", "1", "--merge-layers", "none"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_folder(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")[0]


def built(folder: Path, out: Path, *words: str) -> Path:
    arguments = ["--model", str(folder), "--frames", str(F), "--size", "24x16", "--backend", "onnx", "--fp32"]
    assert build.main([*arguments, "--out", str(out), *words]) == 0
    (engine,) = out.iterdir()
    return engine


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the gate, its text too."""
    return built(folder, tmp_path_factory.mktemp("engines"), *ON, "--verify-text")


@pytest.fixture(scope="module")
def video() -> Tensor:
    """uint8 [21, 3, 24, 16], some of them alike."""
    generator = torch.Generator().manual_seed(0)
    scenes = torch.randint(0, 256, (6, 3, *SIZE), generator=generator)
    noise = torch.randint(0, 40, (21, 3, *SIZE), generator=generator)
    return scenes[torch.arange(21) // 4].add(noise).clamp(max=255).byte()


def clip_of(video: Tensor, fps: float = 5.0) -> Clip:
    return clip_from_frames(video, F, SIZE, fps=fps, sampling="nearest")


def given(folder: Path, clip: Clip, sampled: list[int], fps: float) -> dict[str, Any]:
    """What transformers' processor makes of a clip and the question, by its own code; the whole of it needs
    torchvision."""
    tokenizer, checkpoint = load_tokenizer(folder), describe(folder)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (checkpoint.preprocessing.mean, checkpoint.preprocessing.std))
    nothing: Any = None
    patches, *grid = Qwen3VLVideoProcessor.patchify(nothing, ((clip.frames / 255 - mean) / std)[None], 4, 2, 2)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    processor: Any = SimpleNamespace(
        video_processor=SimpleNamespace(merge_size=2, temporal_patch_size=2),
        video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>",
        vision_end_token="<|vision_end|>",
        image_token="<|image_pad|>",
        all_special_multimodal_tokens=["<|video_pad|>"],
    )
    processor._calculate_timestamps = lambda *how: Qwen3VLProcessor._calculate_timestamps(processor, *how)
    videos = {
        "video_grid_thw": torch.tensor([grid]),
        "video_metadata": [SimpleNamespace(fps=fps, frames_indices=list(sampled))],
    }
    texts = Qwen3VLProcessor.replace_video_token(processor, videos, 0)
    (whole,), _ = Qwen3VLProcessor.get_text_with_replacements(processor, [text], [], [texts], [])
    ids = torch.tensor([tokenizer(whole)["input_ids"]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": patches[0],
        "video_grid_thw": videos["video_grid_thw"],
        "mm_token_type_ids": (ids == QWEN3_VL.video_token_id(checkpoint.config)).int() * 2,
        "max_new_tokens": 12,
    }


def greedy(folder: Path, video: Tensor, config: Any = None, fps: float = 5.0) -> list[int]:
    """Ids of `generate` of the untouched model, or with a method."""
    model: Any = load_model(folder)
    how = given(folder, clip_of(video, fps), sample_indices(len(video), F, "nearest").tolist(), fps)
    if config is None:
        return model.generate(**how)[0, how["input_ids"].shape[1] :].tolist()
    with apply_earlytom(model, config):
        return model.generate(**how)[0, how["input_ids"].shape[1] :].tolist()


def said(folder: Path, answer: Any) -> list[int]:
    """Its ids; `generate` returns the one that ended it, too."""
    stops = load_model(folder).generation_config.eos_token_id
    return [*answer.tokens, *([stops[0]] if answer.finish == "stop" else [])]


@pytest.mark.parametrize("count", [8, 9, 21, 100, 299])
@pytest.mark.parametrize("frames", [4, 8, 32])
def test_frames_are_sampled_as_transformers_do(count: int, frames: int) -> None:
    processor: Any = SimpleNamespace(fps=2)
    metadata: Any = SimpleNamespace(total_num_frames=count, fps=30)
    wanted = Qwen3VLVideoProcessor.sample_frames(processor, metadata, num_frames=frames)
    assert sample_indices(count, frames, "nearest").tolist() == wanted.tolist()


def test_nearest_frames_are_not_those_before() -> None:
    assert sample_indices(21, 8, "nearest").tolist() != sample_indices(21, 8).tolist()  # negative control


def test_with_all_tokens_an_engine_answers_as_transformers_do(folder: Path, tmp_path: Path, video: Tensor) -> None:
    engine = built(folder, tmp_path / "off", *OFF, "--no-verify")
    with Pipeline.load(engine) as pipeline:
        wanted = greedy(folder, video)
        assert said(folder, pipeline.ask(clip_of(video), QUESTION, max_new_tokens=12)) == wanted
        with pipeline.watch(clip_of(video)) as watched:
            assert said(folder, watched.ask(QUESTION, max_new_tokens=12)) == wanted
        assert pipeline.ask(clip_of(video, 0.5), QUESTION, max_new_tokens=1).prompt_tokens == len(
            given(folder, clip_of(video), sample_indices(21, F, "nearest").tolist(), 0.5)["input_ids"][0]
        )


def test_an_engine_answers_as_the_model_does_with_earlytom(folder: Path, engine: Path, video: Tensor) -> None:
    manifest = Manifest.read(engine)
    assert manifest.verification is not None
    assert manifest.verification["passed"]
    assert (manifest.model.family, manifest.model.preprocessing.size) == ("qwen3_vl", SIZE)
    assert (manifest.frames, manifest.tokens_full) == (F, STEPS * CELLS)
    assert manifest.frames_per_stage == (STEPS, 3, 2)
    assert manifest.dim == 3 * 32
    (graph,) = manifest.layout.graphs
    shapes = {tensor.name: tensor.shape for tensor in (*graph.inputs, *graph.outputs)}
    assert (shapes["frames"], shapes["sources"]) == ((F, 3, *SIZE), (2, STEPS))
    assert shapes["tokens"] == (manifest.tokens, 3 * 32)
    wanted = greedy(folder, video, manifest.settings)
    assert wanted != greedy(folder, video)  # negative control: what is kept matters
    with Pipeline.load(engine) as pipeline, Pipeline.load(engine, backend="torch") as reference:
        answer = pipeline.ask(clip_of(video), QUESTION, max_new_tokens=12, kept=True)
        assert (
            said(folder, answer) == wanted == said(folder, reference.ask(clip_of(video), QUESTION, max_new_tokens=12))
        )
        assert answer.visual_tokens == manifest.tokens < manifest.tokens_full
        with pipeline.watch(clip_of(video)) as watched:
            seen = watched.ask(QUESTION, max_new_tokens=12)
            assert seen.tokens == answer.tokens == watched.ask(QUESTION, max_new_tokens=12).tokens
        assert seen.cached_tokens > 0
        with pytest.raises(UserError, match="a prompt of Qwen3-VL is more than embeddings"):
            pipeline.embed(clip_of(video), QUESTION)
        assert answer.picture(engine.parent / "kept.png", clip_of(video)).is_file()


def test_cells_are_built_and_asked_with_positions_and_bias(folder: Path, tmp_path: Path, video: Tensor) -> None:
    engine = built(folder, tmp_path / "cells", "--method", "cells", *ON)
    with Pipeline.load(engine) as pipeline, Pipeline.load(engine, backend="torch") as reference:
        answer = pipeline.ask(clip_of(video), QUESTION, max_new_tokens=12)
        assert answer.tokens == reference.ask(clip_of(video), QUESTION, max_new_tokens=12).tokens
        assert answer.visual_tokens == pipeline.manifest.tokens < STEPS * CELLS
        with pipeline.watch(clip_of(video)) as watched:
            assert watched.ask(QUESTION, max_new_tokens=12).tokens == answer.tokens
    plain = Pipeline.load(engine, bias=False, positions="consecutive")
    with plain:
        wanted = greedy(folder, video, CellsConfig(retention_ratio=0.5, merge_layers=(0, 1)))
        assert said(folder, plain.ask(clip_of(video), QUESTION, max_new_tokens=12)) == wanted


def test_several_videos_at_once_are_answered_as_each_alone(
    folder: Path, engine: Path, tmp_path: Path, video: Tensor
) -> None:
    several = built(folder, tmp_path / "two", *ON, "--batch", "2")  # through the gate
    with Pipeline.load(several) as pipeline, Pipeline.load(engine) as alone:
        assert pipeline.manifest.batch == 2
        answers = []
        for clip in (clip_of(video), clip_of(video.flip(0))):
            answer = pipeline.ask(clip, QUESTION, max_new_tokens=12)
            assert answer.tokens == alone.ask(clip, QUESTION, max_new_tokens=12).tokens
            answers.append(answer.tokens)
    assert answers[0] != answers[1]  # negative control


def test_an_engine_of_several_counts_answers_as_that_of_one(
    folder: Path, engine: Path, tmp_path: Path, video: Tensor
) -> None:
    several = built(folder, tmp_path / "counts", *ON, "--frames", f"4,{F}")  # through the gate
    fewer = clip_from_frames(video, 4, SIZE, fps=5.0, sampling="nearest")
    with Pipeline.load(several) as pipeline, Pipeline.load(engine) as alone:
        answer = pipeline.ask(clip_of(video), QUESTION, max_new_tokens=12)
        assert answer.tokens == alone.ask(clip_of(video), QUESTION, max_new_tokens=12).tokens
        less = pipeline.ask(fewer, QUESTION, max_new_tokens=12)
        assert less.visual_tokens == 4 // 2 * CELLS // 2 < answer.visual_tokens  # half of two frames


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--int8"], "--int8 knows the products of LLaVA-OneVision, not of Qwen3-VL: leave it out"),
        (["--frames", "8,7"], "Qwen3-VL takes 2 pictures for a frame: --frames must be a multiple, got 7,8"),
        (["--frames", "7"], "Qwen3-VL takes 2 pictures for a frame: --frames must be a multiple, got 7"),
        (["--schedule", "adaptive"], "--schedule adaptive does not know Qwen3-VL's frames"),
        (["--chunk", "4"], "--chunk does not know Qwen3-VL's frames"),
        (["--method", "tome"], "method 'tome' does not know Qwen3-VL's tokens"),
        (["--size", "20x16"], "frames are 20x16, expected multiples of 8 pixels"),
        (["--size", "big"], "--size 'big' is not HEIGHTxWIDTH"),
    ],
)
def test_a_build_that_cannot_be_is_refused(folder: Path, words: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line):
        build.main(["--model", str(folder), "--frames", str(F), "--backend", "onnx", "--dry-run", *words])


def test_another_family_takes_its_own_size() -> None:
    with pytest.raises(UserError, match="--size 64x64: LLaVA-OneVision of micro takes frames of "):
        build.main(["--size", "64x64", "--dry-run", "--backend", "onnx"])


@pytest.mark.parametrize("how", [{"decoder": "http://127.0.0.1:1/v1"}, {"inner": InnerMerge(1, 0.5)}])
def test_decoders_that_do_not_know_states_are_refused(engine: Path, how: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="use --decoder torch, without --inner-layer"):
        Pipeline.load(engine, **how)


def test_the_commands_ask_and_bench_take_it(
    folder: Path, engine: Path, drawn_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(drawn_clip), QUESTION, "--engine", str(engine), "--device", "cpu", "--max-new-tokens", "8"]
    assert cli.run(ask.main, [*words, "--json"]) == 0
    asked = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert asked["visual_tokens_full"] == STEPS * CELLS
    words = ["--model", str(folder), "--engine", str(engine), "--video", str(drawn_clip)]
    words += f"--frames {F} --device cpu --ratio 0.5 --merge-layers 0,1 --requests 1 --warmup 0".split()
    words += f"--concurrency none --repeats 1 --scale-repeats 1 --max-new-tokens {CELLS} --json".split()
    assert cli.run(bench.main, words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokens = {one["name"].split()[0]: one["visual_tokens"] for one in found["variants"]}
    assert list(tokens) == ["full", "adaptive", "budget", "onnxruntime"]
    assert tokens["onnxruntime"] == tokens["budget"] < tokens["full"] == STEPS * CELLS


def test_a_server_answers_as_the_pipeline_does(engine: Path, drawn_clip: Path) -> None:
    """Twice about one video, which is read once."""

    async def decoded(taken: TakenVideo, counts: Any, size: tuple[int, int]) -> Clip:
        return await decoders.clip(taken, counts, size, pipeline.manifest.model.preprocessing.sampling)

    async def answer(text: str) -> Any:
        message, deadline = ChatMessage("user", text), time.monotonic() + HANG_SECONDS
        asked = Asked((message,), GREEDY, (), None, 12, 12, True, "k", deadline)
        url = "data:video/mp4;base64," + base64.b64encode(drawn_clip.read_bytes()).decode()
        taken = await Media(FetchRules()).take(VideoPart(url=url))
        return [delta async for delta in backend.deltas(asked, taken)][-1].answer

    async def both() -> Any:
        await decoders.start()
        try:
            return [await answer(QUESTION), await answer("Who is it?")]
        finally:
            await decoders.close()

    decoders = Decoders()
    with Pipeline.load(engine, device="cpu") as pipeline:
        backend = Local(pipeline, decoded, videos=2)
        first, second = asyncio.run(both())
        backend.close()
        assert first.tokens == pipeline.ask(drawn_clip, QUESTION, max_new_tokens=12).tokens
        assert second.tokens == pipeline.ask(drawn_clip, "Who is it?", max_new_tokens=12).tokens
        assert second.cached_tokens > 0
