"""Several videos at once are what each of them is alone, and a clip in pieces is the whole clip."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from earlytom import EarlyTomConfig, UserError, encode_video
from earlytom.encoder import checked_depth, encode, head, rest
from earlytom.families import LLAVA_ONEVISION
from earlytom.methods.earlytom import EachVideo, EarlyTom
from tests.earlytom.tiny import FAMILIES, made_video, tiny_projector, tiny_tower

CONFIGS = {
    "three merges": EarlyTomConfig(retention_ratio=0.3, merge_layers=(0, 1, 2), tau=0.3, schedule="budget"),
    "one merge": EarlyTomConfig(retention_ratio=0.3, merge_layers=(1,), tau=0.3, schedule="budget"),
    "no merge": EarlyTomConfig(retention_ratio=0.3, merge_layers=(), schedule="budget"),
    "nothing left out": EarlyTomConfig(retention_ratio=1.0, merge_layers=(), schedule="budget"),
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}  # products over other numbers of rows round otherwise


def clips() -> list[Tensor]:
    """Three videos of six frames that differ in what they show and in when it changes."""
    scenes = made_video("scenes", 6)
    return [scenes, scenes.flip(0), scenes.roll(2, 0) * 0.5]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_each_of_several_videos_is_encoded_as_if_it_were_alone(family: str, name: str) -> None:
    config, tower, projector = CONFIGS[name], tiny_tower(family), tiny_projector()
    videos = clips()
    trace: dict[str, Tensor] = {}
    method = EachVideo(EarlyTom(config), len(videos))
    together = encode(LLAVA_ONEVISION.vision(tower, projector), torch.cat(videos), method, trace=trace)
    for index, video in enumerate(videos):
        alone = encode_video(tower, projector, video, config)
        assert torch.equal(together.positions[index], alone.positions)
        assert torch.allclose(together.tokens[index], alone.tokens, **CLOSE)
        assert torch.allclose(together.sources.expand(3, -1, -1)[index], alone.sources)
        assert together.frames_per_stage == alone.frames_per_stage
        assert torch.allclose(together.hidden.unflatten(0, (3, -1))[index], alone.hidden, **CLOSE)
        assert torch.allclose(together.received.unflatten(0, (3, -1))[index], alone.received, **CLOSE)
    assert trace["positions"].shape == together.positions.shape == (3, together.tokens.shape[1])


@torch.no_grad()
def test_the_videos_of_the_test_above_do_not_decide_alike() -> None:
    config = CONFIGS["three merges"]
    seen = [encode_video(tiny_tower("siglip"), tiny_projector(), video, config) for video in clips()]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert not torch.equal(seen[one].sources, seen[other].sources)
        assert not torch.equal(seen[one].tokens, seen[other].tokens)


def test_several_videos_need_the_budget_schedule() -> None:
    with pytest.raises(UserError, match="schedule must be budget, not adaptive"):
        EachVideo(EarlyTom(CONFIGS["one merge"].replace(schedule="adaptive")), 2)


@pytest.mark.parametrize("schedule", ["budget", "adaptive"])
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_a_clip_in_pieces_is_the_whole_clip(name: str, schedule: str) -> None:
    config = CONFIGS[name].replace(schedule=schedule)
    method, vision, video = EarlyTom(config), LLAVA_ONEVISION.vision(tiny_tower("siglip"), tiny_projector()), clips()[0]
    depth = checked_depth(vision.tower, method, None)
    pieces = [head(vision.tower, piece, method, depth) for piece in video.split((1, 3, 2))]
    hidden = torch.cat([piece[0] for piece in pieces])
    columns = [piece[1] for piece in pieces if piece[1] is not None]
    assert bool(columns) == (len(config.merge_layers) < 2)
    received = torch.cat(columns) if columns else None
    out = rest(vision, hidden, received, method, depth)
    whole = encode(vision, video, method)
    assert torch.equal(out.positions, whole.positions)
    assert torch.allclose(out.tokens, whole.tokens, **CLOSE)
