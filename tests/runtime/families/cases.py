"""What the tests of this folder ask of every family: a folder, a video, what transformers' own code makes of both, and
what `generate` then says."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen3_vl.processing_qwen3_vl import Qwen3VLProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from builder import build
from earlytom import apply_earlytom
from earlytom.families import FAMILIES, INTERNVL, Family, family_of, geometry
from earlytom.standing import FrameSpan
from runtime.checkpoint import Preprocessing, describe, load_model, load_tokenizer
from runtime.text.prompt import build_prompt
from runtime.video import Clip, clip_from_frames, resize_frames
from tests.runtime.checkpoint.family_folders import family_folder

QUESTION, OTHER = "What happens?", "Who is it?"
OFF = ("--ratio", "1", "--merge-layers", "none")


@dataclass(frozen=True)
class Case:
    """One family.

    Attributes:
        name: its model type.
        frames: of an engine.
        size: (height, width) of a frame; where the family takes any, the one that is asked for.
        merge: `--merge-layers` of an engine.
        many: frames of a video.
        rates: frames a second at which it is shown; at which makes a difference where there are two.
    """

    name: str
    frames: int = 6
    size: tuple[int, int] = (16, 16)
    merge: str = "0,1,2"
    many: int = 15
    rates: tuple[float, ...] = (5.0,)

    @property
    def family(self) -> Family:
        return FAMILIES[self.name]

    @property
    def on(self) -> tuple[str, ...]:
        """Settings with which tokens are left out."""
        return "--ratio", "0.5", "--merge-layers", self.merge

    def folder(self, place: Path) -> Path:
        return family_folder(place / self.name, self.name)[0]

    def built(self, folder: Path, out: Path, *words: str) -> Path:
        """An engine of that folder."""
        asked = ["--model", str(folder), "--frames", str(self.frames), "--backend", "onnx", "--fp32", *words]
        if self.family.any_size:
            asked += ["--size", "{}x{}".format(*self.size)]
        assert build.main([*asked, "--out", str(out)]) == 0
        (engine,) = out.iterdir()
        return engine

    def video(self) -> Tensor:
        """uint8 [many, 3, height, width], some frames alike; resized for some families, on the way."""
        generator = torch.Generator().manual_seed(0)
        size = self.size if self.family.any_size else (16, 16)
        scenes = torch.randint(0, 256, (self.many // 4 + 1, 3, *size), generator=generator)
        noise = torch.randint(0, 40, (self.many, 3, *size), generator=generator)
        return scenes[torch.arange(self.many) // 4].add(noise).clamp(max=255).byte()

    def clip(self, video: Tensor, fps: float = 5.0, frames: int | None = None) -> Clip:
        return clip_from_frames(video, frames or self.frames, self.size, fps=fps, sampling=self.family.sampling)

    def given(self, folder: Path, video: Tensor, fps: float) -> dict[str, Any]:
        """What `generate` takes of the video and the question, made as transformers' processor does it."""
        made = {"qwen2_5_vl": _one_span, "qwen3_vl": _on_axes, "qwen3_5": _on_axes}.get(self.name, _by_prompt)
        found = made(self, folder, video, fps)
        return found | {"attention_mask": torch.ones_like(found["input_ids"]), "max_new_tokens": 12}

    def greedy(self, folder: Path, video: Tensor, method: Any = None, fps: float = 5.0) -> list[int]:
        """Ids of `generate` of the untouched model, or with a method."""
        model: Any = load_model(folder)
        given = self.given(folder, video, fps)
        with apply_earlytom(model, method) if method is not None else nullcontext():
            return model.generate(**given)[0, given["input_ids"].shape[1] :].tolist()


def said(folder: Path, answer: Any) -> list[int]:
    """Its ids; `generate` returns the one that ended it, too."""
    stops = load_model(folder).generation_config.eos_token_id
    assert answer.finish in ("length", "stop")
    return [*answer.tokens, *([stops[0]] if answer.finish == "stop" else [])]


def qwen2_processor() -> Any:
    """transformers' class for frames; its module imports torchvision, and what is used of it does not."""
    names = ["torchvision", "torchvision.transforms", "torchvision.transforms.v2"]
    names += ["torchvision.transforms.v2.functional"]
    with patch.dict(sys.modules, {name: ModuleType(name) for name in names}):
        from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

        return Qwen2VLVideoProcessor


def _by_prompt(case: Case, folder: Path, video: Tensor, fps: float) -> dict[str, Any]:
    """Its sample and the documented arithmetic; ids of our prompt, which the contract holds to the processor's."""
    checkpoint = describe(folder)
    config, prepared = checkpoint.config, checkpoint.preprocessing
    family, each = family_of(config), geometry(config).tokens_per_frame
    words = build_prompt(load_tokenizer(folder), QUESTION, family=family).at(case.clip(video, fps).times())
    spans = [FrameSpan(number, each) for number in range(case.frames)]
    ids = words.input_ids(sum(family.spans(config, case.frames)), spans)
    step = len(video) / case.frames
    if prepared.sampling == "middles":
        chosen = torch.arange(step / 2, len(video), step).int()  # as it is written there
    else:
        chosen = torch.linspace(0, len(video) - 1, case.frames).int()
    pixels = _normalised(prepared, resize_frames(video, prepared.size)[chosen.long()])
    return {"input_ids": ids, family.pixels_name: pixels if family is INTERNVL else pixels[None]}


def _normalised(prepared: Preprocessing, frames: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (prepared.mean, prepared.std))
    return (frames / 255 - mean) / std


def _asked(folder: Path) -> str:
    messages = [{"role": "user", "content": [{"type": "video"}, {"type": "text", "text": QUESTION}]}]
    text = load_tokenizer(folder).apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert isinstance(text, str)
    return text


def _patched(folder: Path, patches: Tensor, grid: Any, text: str) -> dict[str, Any]:
    ids = torch.tensor([load_tokenizer(folder)(text)["input_ids"]])
    checkpoint = describe(folder)
    return {
        "input_ids": ids,
        "pixel_values_videos": patches[0],
        "video_grid_thw": torch.tensor([grid]),
        "mm_token_type_ids": (ids == family_of(checkpoint.config).video_token_id(checkpoint.config)).int() * 2,
    }


def _on_axes(case: Case, folder: Path, video: Tensor, fps: float) -> dict[str, Any]:
    """By the code of Qwen3-VL's processor; the whole of it needs torchvision."""
    nothing: Any = None
    sampled = Qwen3VLVideoProcessor.sample_frames(
        SimpleNamespace(fps=2),  # type: ignore[arg-type]
        SimpleNamespace(total_num_frames=len(video), fps=30),  # type: ignore[arg-type]
        num_frames=case.frames,
    )
    pixels = _normalised(describe(folder).preprocessing, video[torch.as_tensor(sampled)])
    patches, *grid = Qwen3VLVideoProcessor.patchify(nothing, pixels[None], 4, 2, 2)
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
    (whole,), _ = Qwen3VLProcessor.get_text_with_replacements(processor, [_asked(folder)], [], [texts], [])
    return _patched(folder, patches, grid, whole)


def _one_span(case: Case, folder: Path, video: Tensor, fps: float) -> dict[str, Any]:
    """By the code of Qwen2.5-VL's processor; the whole of it needs torchvision."""
    nothing: Any = None
    about = VideoMetadata(total_num_frames=len(video), fps=fps)
    limits: Any = SimpleNamespace(fps=None, temporal_patch_size=2, min_frames=4, max_frames=768)
    about.frames_indices = qwen2_processor().sample_frames(limits, about, num_frames=case.frames)
    pixels = _normalised(describe(folder).preprocessing, video[torch.as_tensor(about.frames_indices)])
    patches, *grid = qwen2_processor().patchify(nothing, pixels[None], 4, 2, 2)
    frames: Any = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    processor: Any = SimpleNamespace(video_processor=frames, video_token="<|video_pad|>", image_token="<|image_pad|>")
    processor.all_special_multimodal_tokens = ["<|video_pad|>"]
    texts = Qwen2_5_VLProcessor.replace_video_token(processor, {"video_grid_thw": torch.tensor([grid])}, 0)
    (whole,), _ = Qwen2_5_VLProcessor.get_text_with_replacements(processor, [_asked(folder)], [], [texts], [])
    seconds = torch.tensor([frames.temporal_patch_size / about.sampled_fps])
    return _patched(folder, patches, grid, whole) | {"second_per_grid_ts": seconds}


def _pairs(name: str, size: tuple[int, int], rates: tuple[float, ...]) -> Case:
    return Case(name, frames=8, size=size, merge="0,1", many=21, rates=rates)


CASES = {
    case.name: case
    for case in (
        Case("internvl"),
        Case("llava_next_video", size=(20, 20)),
        Case("llava_qwen", size=(20, 20)),
        Case("smolvlm", size=(32, 32), rates=(5.0, 0.25)),
        _pairs("qwen3_vl", (24, 16), (5.0, 0.25)),
        _pairs("qwen3_5", (24, 16), (5.0, 0.25)),
        _pairs("qwen2_5_vl", (24, 40), (5.0, 0.25)),  # windows of two cells: two whole ones, and rests on both sides
    )
}
