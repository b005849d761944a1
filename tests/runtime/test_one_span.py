"""A family with one span a video, whose frames stand at their times, from a folder to an answer: built, asked, watched,
measured, refused where it is not known; Qwen2.5-VL."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.video_utils import VideoMetadata

from builder import build
from earlytom import UserError, apply_earlytom
from earlytom.cells.config import CellsConfig
from earlytom.families.qwen2_5_vl import QWEN2_5_VL
from runtime import bench, cli
from runtime.checkpoint import describe, load_model, load_tokenizer
from runtime.decoder.eager import InnerMerge
from runtime.engine.manifest import Manifest
from runtime.pipeline import Pipeline
from runtime.video import Clip, clip_from_frames, sample_indices
from tests.runtime.checkpoint.family_folders import family_folder
from tests.runtime.test_on_axes import OFF, ON, QUESTION, STEPS, F, said, video

__all__ = ["video"]
pytestmark = pytest.mark.usefixtures("each_export_once")

SIZE, CELLS = (24, 40), 15  # windows of two cells: two whole ones, and rests on both sides
OTHER = "Who is it?"


def processor() -> Any:
    """transformers' class for frames; its module imports torchvision, and what is used of it does not."""
    names = [
        "torchvision",
        "torchvision.transforms",
        "torchvision.transforms.v2",
        "torchvision.transforms.v2.functional",
    ]
    with patch.dict(sys.modules, {name: ModuleType(name) for name in names}):
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

        return Qwen2VLVideoProcessor


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return family_folder(tmp_path_factory.mktemp("qwen2_5_vl"), "qwen2_5_vl")[0]


def built(folder: Path, out: Path, *words: str) -> Path:
    arguments = ["--model", str(folder), "--frames", str(F), "--size", "24x40", "--backend", "onnx", "--fp32"]
    assert build.main([*arguments, "--out", str(out), *words]) == 0
    (engine,) = out.iterdir()
    return engine


@pytest.fixture(scope="module")
def engine(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the gate, its text too."""
    return built(folder, tmp_path_factory.mktemp("engines"), *ON, "--verify-text")


def clip_of(video: Tensor, fps: float = 5.0) -> Clip:
    return clip_from_frames(video, F, SIZE, fps=fps, sampling="begins")


def given(folder: Path, video: Tensor, fps: float) -> dict[str, Any]:
    """What transformers' processor makes of a video and the question, by its own code; the whole needs torchvision."""
    tokenizer, checkpoint, nothing = load_tokenizer(folder), describe(folder), SimpleNamespace()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (checkpoint.preprocessing.mean, checkpoint.preprocessing.std))
    pixels = (clip_of(video, fps).frames / 255 - mean) / std
    patches, *grid = processor().patchify(nothing, pixels[None], 4, 2, 2)
    about = VideoMetadata(total_num_frames=len(video), fps=fps)
    limits: Any = SimpleNamespace(fps=None, temporal_patch_size=2, min_frames=4, max_frames=768)
    about.frames_indices = processor().sample_frames(limits, about, num_frames=F)
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    frames: Any = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    whole: Any = SimpleNamespace(video_processor=frames, video_token="<|video_pad|>", image_token="<|image_pad|>")
    whole.all_special_multimodal_tokens = ["<|video_pad|>"]
    texts = Qwen2_5_VLProcessor.replace_video_token(whole, {"video_grid_thw": torch.tensor([grid])}, 0)
    (full,), _ = Qwen2_5_VLProcessor.get_text_with_replacements(whole, [text], [], [texts], [])
    ids = torch.tensor([tokenizer(full)["input_ids"]])
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": patches[0],
        "video_grid_thw": torch.tensor([grid]),
        "mm_token_type_ids": (ids == QWEN2_5_VL.video_token_id(checkpoint.config)).int() * 2,
        "second_per_grid_ts": torch.tensor([frames.temporal_patch_size / about.sampled_fps]),
        "max_new_tokens": 12,
    }


def greedy(folder: Path, video: Tensor, config: Any = None, fps: float = 5.0) -> list[int]:
    """Ids of `generate` of the untouched model, or with a method."""
    model: Any = load_model(folder)
    how = given(folder, video, fps)
    if config is None:
        return model.generate(**how)[0, how["input_ids"].shape[1] :].tolist()
    with apply_earlytom(model, config):
        return model.generate(**how)[0, how["input_ids"].shape[1] :].tolist()


@pytest.mark.parametrize("count", [8, 9, 21, 100, 299, 1000])
@pytest.mark.parametrize("frames", [4, 6, 8, 32])
def test_frames_are_sampled_as_transformers_do(count: int, frames: int) -> None:
    limits: Any = SimpleNamespace(fps=None, num_frames=None, temporal_patch_size=2, min_frames=4, max_frames=768)
    chosen = sample_indices(count, frames, "begins").tolist()
    if frames <= count:
        metadata = VideoMetadata(total_num_frames=count, fps=30)
        assert chosen == processor().sample_frames(limits, metadata, num_frames=frames).tolist()
    assert (len(chosen), chosen[0]) == (frames, 0)
    assert chosen == sorted(chosen)
    assert chosen[-1] < count
    assert sample_indices(21, 8, "begins").tolist() != sample_indices(21, 8).tolist()  # negative control


def test_with_all_tokens_an_engine_answers_as_transformers_do(folder: Path, tmp_path: Path, video: Tensor) -> None:
    """At two rates: of the slow video, frames stand later than the question behind them."""
    engine = built(folder, tmp_path / "off", *OFF, "--no-verify")
    with Pipeline.load(engine) as pipeline:
        for fps in (5.0, 0.25):
            wanted = greedy(folder, video, fps=fps)
            answer = pipeline.ask(clip_of(video, fps), QUESTION, max_new_tokens=12)
            assert said(folder, answer) == wanted
            assert answer.prompt_tokens == given(folder, video, fps)["input_ids"].shape[1]
            with pipeline.watch(clip_of(video, fps)) as watched:
                for _ in range(2):
                    assert said(folder, watched.ask(QUESTION, max_new_tokens=12)) == wanted
    assert greedy(folder, video, fps=5.0) != wanted  # negative control: when frames were matters


def test_an_engine_answers_as_the_model_does_with_earlytom(folder: Path, engine: Path, video: Tensor) -> None:
    manifest = Manifest.read(engine)
    assert manifest.verification is not None
    assert manifest.verification["passed"]
    assert (manifest.model.family, manifest.dim, manifest.tokens_full) == ("qwen2_5_vl", 32, STEPS * CELLS)
    assert manifest.model.preprocessing.sampling == "begins"
    wanted = greedy(folder, video, manifest.settings)
    assert wanted != greedy(folder, video)  # negative control
    with Pipeline.load(engine) as pipeline, Pipeline.load(engine, backend="torch") as reference:
        answer = pipeline.ask(clip_of(video), QUESTION, max_new_tokens=12, kept=True)
        assert said(folder, answer) == wanted
        assert reference.ask(clip_of(video), QUESTION, max_new_tokens=12).tokens == answer.tokens
        assert answer.picture(engine.parent / "kept.png", clip_of(video)).is_file()
        with pytest.raises(UserError, match=r"a prompt of Qwen2\.5-VL is more than embeddings"):
            pipeline.embed(clip_of(video), QUESTION)
        with pipeline.watch(clip_of(video)) as watched:
            other = watched.ask(OTHER, max_new_tokens=12)
            seen = watched.ask(QUESTION, max_new_tokens=12)
            assert (seen.tokens, seen.cached_tokens > 0) == (answer.tokens, True)
        assert other.tokens == pipeline.ask(clip_of(video), OTHER, max_new_tokens=12).tokens
    with Pipeline.load(engine, positions="original") as original:  # frames keep their times in both
        assert original.ask(clip_of(video), QUESTION, max_new_tokens=12).tokens == answer.tokens


def test_cells_are_built_and_asked_with_positions_and_bias(folder: Path, tmp_path: Path, video: Tensor) -> None:
    engine = built(folder, tmp_path / "cells", "--method", "cells", *ON)
    with Pipeline.load(engine) as pipeline, Pipeline.load(engine, backend="torch") as reference:
        answer = pipeline.ask(clip_of(video), QUESTION, max_new_tokens=12)
        assert answer.tokens == reference.ask(clip_of(video), QUESTION, max_new_tokens=12).tokens
        with pipeline.watch(clip_of(video)) as watched:
            assert watched.ask(QUESTION, max_new_tokens=12).tokens == answer.tokens
    with Pipeline.load(engine, bias=False) as plain:
        wanted = greedy(folder, video, CellsConfig(retention_ratio=0.5, merge_layers=(0, 1)))
        assert said(folder, plain.ask(clip_of(video), QUESTION, max_new_tokens=12)) == wanted


def test_several_videos_at_once_are_answered_as_each_alone(
    folder: Path, engine: Path, tmp_path: Path, video: Tensor
) -> None:
    several = built(folder, tmp_path / "two", *ON, "--batch", "2", "--no-verify")
    with Pipeline.load(several) as pipeline, Pipeline.load(engine) as alone:
        assert pipeline.manifest.batch == 2
        answers = []
        for clip in (clip_of(video), clip_of(video.flip(0))):
            answer = pipeline.ask(clip, QUESTION, max_new_tokens=12)
            assert answer.tokens == alone.ask(clip, QUESTION, max_new_tokens=12).tokens
            answers.append(answer.tokens)
    assert answers[0] != answers[1]  # negative control


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--frames", "7"], r"Qwen2\.5-VL takes 2 pictures for a frame: --frames must be a multiple, got 7"),
        (["--schedule", "adaptive"], r"--schedule adaptive does not know Qwen2\.5-VL's frames"),
        (["--chunk", "4"], r"--chunk does not know Qwen2\.5-VL's frames"),
        (["--method", "tome"], r"method 'tome' does not know Qwen2\.5-VL's tokens"),
        (["--int8"], r"--int8 knows the products of LLaVA-OneVision, not of Qwen2\.5-VL"),
        (["--merge-layers", "0"], "layer 0 of this tower attends within windows.* end with one of 1, 2"),
        (["--size", "20x16"], "frames are 20x16, expected multiples of 8 pixels"),
    ],
)
def test_a_build_that_cannot_be_is_refused(folder: Path, words: list[str], line: str) -> None:
    with pytest.raises(UserError, match=line) as error:
        build.main(["--model", str(folder), "--frames", str(F), "--backend", "onnx", "--dry-run", *words])
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", [{"decoder": "http://127.0.0.1:1/v1"}, {"inner": InnerMerge(1, 0.5)}])
def test_decoders_that_do_not_know_it_are_refused(engine: Path, how: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="use --decoder torch, without --inner-layer"):
        Pipeline.load(engine, **how)


def test_the_bench_takes_it(folder: Path, drawn_clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", str(folder), "--video", str(drawn_clip), "--ratio", "0.5", "--json"]
    words += f"--frames {F} --device cpu --requests 1 --warmup 0 --concurrency none --repeats 1".split()
    words += f"--scale-repeats 1 --max-new-tokens {CELLS}".split()
    with pytest.raises(UserError, match="layer 0 of this tower attends within windows"):
        bench.main([*words, "--merge-layers", "0"])
    assert cli.run(bench.main, words) == 0
    assert "budget" in capsys.readouterr().out
