"""The operators' kernels against the reference at the size of LLaVA-OneVision-7B, and their capture in a CUDA graph."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from earlytom import merge, ops, select
from earlytom.attention import attention_matrix, column_means
from earlytom.cells import select as diverse
from tests.earlytom.tiny import made_video, tiny_projector, tiny_tower

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use"),
]
FRAMES, TOKENS, WIDTH, HEADS = 32, 729, 1152, 16
CELLS, LLM_WIDTH = 196, 3584
HALVES = (torch.float16, torch.bfloat16, torch.float32)
PLAN = {"tau": 0.8, "max_window": 6, "ema": 0.9, "trailing": "released"}


def hidden_states(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """[F, S, D] of a slow drift with cuts."""
    generator = torch.Generator("cuda").manual_seed(seed)
    noise = torch.randn(FRAMES, TOKENS, WIDTH, generator=generator, device="cuda")
    scene = torch.randn(4, TOKENS, WIDTH, generator=generator, device="cuda").repeat_interleave(FRAMES // 4, 0)
    return (scene + 0.15 * noise.cumsum(0)).to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_similarity_and_plan(dtype: torch.dtype) -> None:
    similarity = ops.frame_similarity(hidden_states(dtype))
    expected = merge.frame_similarity(hidden_states(dtype).double().float())
    assert torch.allclose(similarity, expected, atol=4e-6)
    for frames_out in (None, 1, 24, 31, 32):
        weights, static, start, count = ops.frame_plan(similarity, frames_out, *PLAN.values())
        want, first, last = merge.plan_similarity(similarity.cpu(), frames_out, **PLAN)
        assert int(count) == len(want)
        assert torch.equal(weights[: int(count)].cpu() > 0, want > 0)
        assert torch.allclose(weights[: int(count)].cpu(), want, atol=1e-6)
        assert torch.equal(start.cpu(), first)
        assert torch.equal(static.cpu(), merge.static_frames(first, last))


@pytest.mark.parametrize(("dtype", "tolerance"), [*zip(HALVES, (2e-3, 2e-2, 1e-4), strict=True)], ids=str)
def test_received_attention(dtype: torch.dtype, tolerance: float) -> None:
    """Relative to the largest entry, against fp32 arithmetic on the same numbers, a few frames at a time."""
    generator = torch.Generator("cuda").manual_seed(1)
    shape = (2, 18, TOKENS, HEADS, WIDTH // HEADS)
    query, key = torch.randn(shape, generator=generator, device="cuda").to(dtype).transpose(2, 3)
    scale = (WIDTH // HEADS) ** -0.5
    got = ops.received_attention(query, key, scale)
    for frame in range(0, 18, 6):
        expected = column_means(
            attention_matrix(query[frame : frame + 1].float(), key[frame : frame + 1].float(), scale)
        )
        assert float((got[frame : frame + 1] - expected).abs().max() / expected.max()) < tolerance
    assert torch.allclose(got.sum(1), torch.ones(18, device="cuda"), atol=1e-3)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("places", [1, 46, 195, 196])
def test_selection(dtype: torch.dtype, places: int) -> None:
    generator = torch.Generator("cuda").manual_seed(2)
    features = torch.randn(14, CELLS, LLM_WIDTH, generator=generator, device="cuda").to(dtype)
    received = (torch.rand(14, CELLS, generator=generator, device="cuda") * 50).round()  # many ties
    static = torch.arange(14, device="cuda") % 3 == 1
    got = ops.select_tokens(features, received, static, places)
    for mine, theirs in zip(got, select.select_fixed(features, received, static, places), strict=True):
        assert torch.equal(mine, theirs)


def test_greedy_selection_of_real_sizes() -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    tokens = torch.randn(14 * CELLS, 64, generator=generator, device="cuda")
    affine = diverse.affinity(tokens, torch.arange(14.0, device="cuda").repeat_interleave(CELLS), 32)
    choice = (diverse.saliency(tokens), diverse.likeness(affine), 630)
    assert torch.equal(ops.select_greedy(*choice), diverse.select_greedy(*choice))


def test_the_budget_encoder_is_one_cuda_graph_that_follows_its_input() -> None:
    from earlytom import EarlyTomConfig, encode_video

    config = EarlyTomConfig(retention_ratio=0.4, merge_layers=(0, 2), tau=0.5, schedule="budget")
    tower, projector = tiny_tower("siglip", device="cuda"), tiny_projector(device="cuda")
    pixels = made_video("scenes", 8).cuda()
    for _ in range(2):
        encode_video(tower, projector, pixels, config)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = encode_video(tower, projector, pixels, config)
    for kind in ("noise", "drift", "scenes"):
        pixels.copy_(made_video(kind, 8, seed=4))
        graph.replay()
        expected = encode_video(tower, projector, pixels.clone(), config)
        assert torch.equal(out.positions, expected.positions)
        assert torch.allclose(out.tokens, expected.tokens, atol=1e-5)
