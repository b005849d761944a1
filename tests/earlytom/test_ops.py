"""The operators: their schemas and shape functions, equality with the reference, and graphs made of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from earlytom import merge, ops, select
from earlytom.attention import attention_matrix, column_means
from earlytom.cells import select as diverse
from earlytom.cells.config import CellsConfig
from earlytom.config import EarlyTomConfig
from earlytom.encoder import encode
from earlytom.families import LLAVA_ONEVISION
from earlytom.method import Method
from earlytom.methods import method_of
from earlytom.methods.cells import Cells
from tests.earlytom.tiny import made_video, tiny_projector, tiny_tower

PLAN = {"tau": 0.8, "max_window": 6, "ema": 0.9, "trailing": "released"}


def similarity(frames: int, seed: int = 0) -> Tensor:
    """[F, F] of a slow drift with a cut in the middle."""
    generator = torch.Generator().manual_seed(seed)
    hidden = 0.3 * torch.randn(frames, 4, 16, generator=generator).cumsum(0) + torch.randn(4, 16, generator=generator)
    hidden[frames // 2 :] *= -1
    return merge.frame_similarity(hidden)


def arguments(device: str) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for each operator."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(3, 9, 8, generator=generator, dtype=torch.float64).half()
    received = torch.rand(3, 9, generator=generator)
    static = torch.tensor([False, True, False])
    hidden = torch.randn(5, 4, 16, generator=generator)
    query, key = torch.randn(2, 2, 3, 7, 8, generator=generator)
    plan = tuple(PLAN.values())
    calls: dict[str, list[tuple[Any, ...]]] = {
        "frame_similarity": [(hidden,), (hidden.half()[:, 1:],)],
        "frame_plan": [(similarity(8), 6, *plan), (similarity(8), None, *plan), (similarity(1), 1, *plan)],
        "received_attention": [(query, key, 0.35), (query.transpose(1, 2), key.transpose(1, 2), 0.35)],
        "select_tokens": [(features, received, static, 4), (features.float(), received, static, 9)],
        "select_greedy": [(received.flatten(), received.flatten()[:, None] * received.flatten(), 5)],
    }
    return {
        name: [tuple(x.to(device) if isinstance(x, Tensor) else x for x in call) for call in row]
        for name, row in calls.items()
    }


NAMES = ("frame_similarity", "frame_plan", "received_attention", "select_tokens", "select_greedy")


@pytest.mark.parametrize("name", NAMES)
def test_schema_and_shape_function_are_right(name: str, device: str) -> None:
    operator: Any = getattr(torch.ops.earlytom, name).default
    for call in arguments(device)[name]:
        opcheck(operator, call, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))


def test_opcheck_notices_a_wrong_shape_function() -> None:
    @torch.library.custom_op("earlytom_test::wrong", mutates_args=())
    def wrong(x: Tensor) -> Tensor:
        return x + 1

    wrong.register_fake(lambda x: x.new_empty(x.shape[0] + 1))
    with pytest.raises(Exception, match=r"(?i)shape"):
        opcheck(torch.ops.earlytom_test.wrong.default, (torch.zeros(3),), test_utils="test_faketensor")


def test_operators_give_what_the_reference_gives(device: str) -> None:
    calls = arguments(device)
    for (hidden,) in calls["frame_similarity"]:
        assert torch.allclose(ops.frame_similarity(hidden), merge.frame_similarity(hidden), atol=3e-6)
    for query, key, scale in calls["received_attention"]:
        expected = column_means(attention_matrix(query, key, scale))
        assert torch.allclose(ops.received_attention(query, key, scale), expected, atol=1e-5)
    for call in calls["select_tokens"]:
        for mine, theirs in zip(ops.select_tokens(*call), select.select_fixed(*call), strict=True):
            assert torch.equal(mine, theirs)
    for call in calls["select_greedy"]:
        assert torch.equal(ops.select_greedy(*call), diverse.select_greedy(*call))
    for matrix, frames_out, *_ in calls["frame_plan"]:
        weights, static, start, count = ops.frame_plan(matrix, frames_out, *PLAN.values())
        expected, first, last = merge.plan_similarity(matrix, frames_out, **PLAN)
        assert torch.allclose(weights[: int(count)], expected, atol=1e-6)
        assert not weights[int(count) :].any()
        assert weights.shape[0] == (frames_out or len(matrix))
        assert torch.equal(start, first)
        assert torch.equal(static, merge.static_frames(first, last))


def test_the_adaptive_plan_drops_frames_of_the_example() -> None:
    assert int(ops.frame_plan(similarity(8), None, *PLAN.values())[3]) < 8


class Encoder(nn.Module):
    """`encode` as a module, so that it can be exported and compiled."""

    def __init__(self, method: EarlyTomConfig | Method, device: str) -> None:
        super().__init__()
        self.tower, self.projector = tiny_tower("siglip", device=device), tiny_projector(device=device)
        self.method = method_of(method)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = encode(LLAVA_ONEVISION.vision(self.tower, self.projector), pixels, self.method)
        return out.tokens, out.positions, out.sources


BUDGET = EarlyTomConfig(retention_ratio=0.4, merge_layers=(0, 2), tau=0.5, schedule="budget")


def called(program: torch.fx.GraphModule) -> set[str]:
    """Names of the operators of this project that a graph and the graphs inside it call."""
    graphs = (module.graph for module in program.modules() if isinstance(module, torch.fx.GraphModule))
    return {str(node.target) for graph in graphs for node in graph.nodes if "earlytom" in str(node.target)}


def same_on_other_videos(run: Callable[..., Any], encoder: Encoder, device: str) -> None:
    """A program made on one video gives the reference's tokens on others: no branch was frozen in."""
    for kind in ("noise", "scenes", "drift", "still"):
        video = made_video(kind, 8, seed=9).to(device)
        for mine, theirs in zip(run(video), encoder(video), strict=True):
            assert torch.allclose(mine.float(), theirs.float(), atol=1e-5)


def test_the_budget_encoder_exports_as_one_graph_of_operators(device: str) -> None:
    encoder = Encoder(BUDGET, device).eval()
    program = torch.export.export(encoder, (made_video("still", 8).to(device),))
    used = ("frame_similarity", "frame_plan", "select_tokens")
    assert called(program.graph_module) >= {f"earlytom.{name}.default" for name in used}
    same_on_other_videos(program.module(), encoder, device)


def test_the_budget_encoder_compiles_as_one_graph(device: str) -> None:
    encoder = Encoder(BUDGET, device).eval()
    same_on_other_videos(torch.compile(encoder, fullgraph=True, backend="aot_eager"), encoder, device)


@pytest.mark.parametrize("rounds", [None, 7])
def test_the_encoder_of_cells_exports_as_one_graph(device: str, rounds: int | None) -> None:
    config = CellsConfig(retention_ratio=0.4, merge_layers=(0, 2), rounds=rounds)
    encoder = Encoder(Cells(config), device).eval()
    program = torch.export.export(encoder, (made_video("still", 8).to(device),))
    assert called(program.graph_module) == (set() if rounds else {"earlytom.select_greedy.default"})
    same_on_other_videos(program.module(), encoder, device)


def test_the_adaptive_encoder_cannot_be_one_graph() -> None:
    adaptive = EarlyTomConfig(retention_ratio=0.4, merge_layers=(0, 2), tau=0.5, schedule="adaptive")
    encoder = Encoder(adaptive, "cpu").eval()
    with pytest.raises(Exception, match=r"(?i)data.?dependent|unsupported|Tensor\.item|nonzero"):
        torch.compile(encoder, fullgraph=True, backend="eager")(made_video("scenes", 8))
