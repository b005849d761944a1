"""Which frames are shown is what transformers' own code says, of every kind of sampling."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.video_utils import VideoMetadata

from runtime.video import sample_indices
from tests.runtime.families.cases import qwen2_processor

COUNTS, FRAMES = (6, 7, 8, 9, 15, 21, 32, 100, 299, 1000), (4, 6, 8, 16, 32)


def middles(count: int, frames: int) -> torch.Tensor:
    step = count / frames
    return torch.arange(step / 2, count, step).int()  # as it is written there


def nearest(count: int, frames: int) -> Any:
    processor: Any = SimpleNamespace(fps=2)
    metadata: Any = SimpleNamespace(total_num_frames=count, fps=30)
    return Qwen3VLVideoProcessor.sample_frames(processor, metadata, num_frames=frames)


def begins(count: int, frames: int) -> Any:
    limits: Any = SimpleNamespace(fps=None, num_frames=None, temporal_patch_size=2, min_frames=4, max_frames=768)
    return qwen2_processor().sample_frames(limits, VideoMetadata(total_num_frames=count, fps=30), num_frames=frames)


@pytest.mark.parametrize("rule", [middles, nearest, begins])
@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("frames", FRAMES)
def test_frames_are_sampled_as_transformers_do(rule: Any, count: int, frames: int) -> None:
    chosen = sample_indices(count, frames, rule.__name__).tolist()
    if frames <= count:
        assert chosen == rule(count, frames).tolist()
    assert len(chosen) == frames
    assert chosen == sorted(chosen)
    assert 0 <= chosen[0] <= chosen[-1] < count


@pytest.mark.parametrize("kind", ["middles", "nearest", "begins"])
def test_they_are_not_those_from_the_first_to_the_last(kind: Any) -> None:
    assert sample_indices(21, 8, kind).tolist() != sample_indices(21, 8).tolist()
