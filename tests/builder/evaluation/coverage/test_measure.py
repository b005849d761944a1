"""Coverage is what its definition says, and falls with what is left out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from builder.evaluation.coverage.measure import Coverage, covered, measure_coverage, most_changed
from builder.evaluation.passes import ClipPasses
from earlytom.cells.config import CellsConfig
from earlytom.config import EarlyTomConfig
from earlytom.method import Method
from earlytom.methods.cells import Cells
from earlytom.methods.earlytom import EarlyTom
from tests.builder.evaluation.test_methods import frames, vision

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS = (2, 4, 6)


def features(count: int, cells: int = 3, width: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(count, cells, width, generator=torch.Generator().manual_seed(seed))


def cosine(one: Tensor, other: Tensor) -> float:
    return float(one @ other / one.norm() / other.norm())


def test_coverage_by_hand() -> None:
    """Cell by cell, in Python; merged frames and tokens differ from the video's own."""
    full, merged, kept = features(4), features(2, seed=1), features(1, cells=6, seed=2)[0]
    mean = full.mean((0, 1))
    by_frame, by_cell = covered(full, merged, kept)
    for f in range(4):
        best = [max(cosine(full[f, p] - mean, merged[g, p] - mean) for g in range(2)) for p in range(3)]
        assert float(by_frame[f]) == pytest.approx(sum(best) / 3, abs=1e-5)
        for p in range(3):
            wanted = max(cosine(full[f, p] - mean, token - mean) for token in kept)
            assert float(by_cell[f, p]) == pytest.approx(wanted, abs=1e-5)


def test_what_is_kept_is_covered_and_what_is_not_is_not() -> None:
    full = features(6)
    by_frame, by_cell = covered(full, full[[0, 3]], full[2:4].flatten(0, 1))
    torch.testing.assert_close(by_frame[[0, 3]], torch.ones(2))
    torch.testing.assert_close(by_cell[2:4], torch.ones(2, 3))
    assert (by_frame[[1, 2, 4, 5]] < 0.999).all()
    assert (by_cell[[0, 1, 4, 5]] < 0.999).all()


def test_the_most_changed_cells() -> None:
    """A tenth of 40; two cells jump at frame 2, by far the most, and frame 0 never counts."""
    full = features(1, cells=10, seed=3).repeat(4, 1, 1)
    full += 1e-3 * features(4, cells=10, seed=4)
    full[2, 4], full[2, 7] = -full[2, 4], -full[2, 7]
    changed = most_changed(full)
    assert changed.sum() == 4
    assert changed.nonzero().tolist() == [[2, 4], [2, 7], [3, 4], [3, 7]]
    assert not most_changed(full[:1]).any()
    still = features(1, cells=10).repeat(4, 1, 1)
    assert most_changed(still).nonzero().tolist() == [[1, 0], [1, 1], [1, 2], [1, 3]]  # ties: the earlier


def both(ratio: float, budget: float | tuple[int, ...]) -> list[tuple[str, Method]]:
    ours = CellsConfig(ratio, LAYERS, budget)
    return [("earlytom", EarlyTom(EarlyTomConfig(ratio, LAYERS, schedule="budget", frame_budget=budget))),
            ("cells", Cells(ours))]  # fmt: skip


def on_clip(ratio: float, budget: float | tuple[int, ...]) -> dict[str, Coverage]:
    found = measure_coverage(ClipPasses(vision(), frames(0), 0), both(ratio, budget))
    return {one.title: one for one in found}


def test_nothing_is_lost_where_everything_is_kept() -> None:
    for one in on_clip(1.0, 1.0).values():
        assert one.tokens == 400
        assert float(one.frames.min()) > 0.99999, one.title
        assert float(one.cells.min()) > 0.99999, one.title


def test_a_smaller_budget_covers_less() -> None:
    large, small = on_clip(0.3, 0.75), on_clip(0.05, (4, 3, 2))
    for name, stages in (("earlytom", (16, 12, 9, 7)), ("cells", (16, 12, 9, 7))):
        assert large[name].stages == stages
        assert (large[name].tokens, small[name].tokens) == (126, 20)
        for figure in ("frame_mean", "frame_worst", "cell_mean", "cell_worst_frame", "cell_changed"):
            assert large[name].to_dict()[figure] > small[name].to_dict()[figure], (name, figure)
        assert float(small[name].frames.mean()) < 0.97


def test_dropped_frames_have_as_many_tokens_and_lose_the_moments_between() -> None:
    found = on_clip(0.1, 0.75)
    uniform = found["uniform frame dropping"]
    assert (uniform.stages, uniform.tokens) == ((math.ceil(42 / 25),), 50)
    assert float(uniform.frames[0]) == pytest.approx(1, abs=1e-5)  # the first and the last frame are those kept
    assert float(uniform.frames[-1]) == pytest.approx(1, abs=1e-5)
    assert float(uniform.frames.mean()) < min(float(found[name].frames.mean()) for name in ("earlytom", "cells"))
    figures = uniform.to_dict()
    worst = figures["frame_worst_at"]
    assert figures["frame_worst"] == float(uniform.frames[worst]) == float(uniform.frames.min())
    assert 0 < worst < 15
