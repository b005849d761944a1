"""Engines on a GPU, where there is one: the numbers, with frames here and there and on several streams.

What they are is checked without one, too, so that the tests fail for what they are about.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime import trt as seam
from runtime.checkpoint import describe
from runtime.engine.manifest import Manifest
from runtime.video import clip_from_frames, load_clip
from runtime.vision import open_backend
from runtime.vision.chunked import Chunked
from runtime.vision.live import LiveClip
from runtime.vision.open import open_tensorrt
from runtime.vision.torch import open_torch
from tests.runtime.gpu.gpu_flavour import FLAVOUR, WHY_NOT
from tests.runtime.vision.stand_ins import LAYOUTS

MATRIX = np.random.default_rng(0).standard_normal((768, 64)).astype(np.float32)


def compile_products(folder: Path, flavour: str, *videos: int, target: Any) -> Any:
    """An engine for `videos` (none: one) at once. A frame's token is its pixels, as one row, times `MATRIX`, which is
    large enough for a kernel that shows as a matrix product; its position is its largest pixel."""
    onnx = pytest.importorskip("onnx")
    from builder.compile.engine import compile_engine

    helper, proto, rank = onnx.helper, onnx.TensorProto, len(videos)
    nodes = [
        helper.make_node("Cast", ["frames"], ["pixels"], to=proto.FLOAT),
        helper.make_node("Reshape", ["pixels", "sizes"], ["rows"]),
        helper.make_node("MatMul", ["rows", "matrix"], ["tokens"], "product"),
        helper.make_node("ReduceMax", ["rows", "last"], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["positions"], to=proto.INT64),
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("frames", proto.UINT8, (*videos, 4, 3, 16, 16))],
        [
            helper.make_tensor_value_info("tokens", proto.FLOAT, (*videos, 4, 64)),
            helper.make_tensor_value_info("positions", proto.INT64, (*videos, 4)),
        ],
        [
            onnx.numpy_helper.from_array(MATRIX, "matrix"),
            helper.make_tensor("sizes", proto.INT64, (rank + 2,), (*videos, 4, 768)),
            helper.make_tensor("last", proto.INT64, (1,), (rank + 1,)),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, folder / "vision.onnx")
    return compile_engine(
        folder / "vision.onnx", folder / "vision.engine", flavour=flavour, dtype="fp32", target=target
    )


def check_products(clip: Tensor, tokens: Tensor, positions: Tensor) -> None:
    rows = clip.flatten(1).double()
    torch.testing.assert_close(tokens.double(), rows @ torch.from_numpy(MATRIX).double(), rtol=1e-4, atol=0.1)
    assert positions.tolist() == rows.max(1).values.long().tolist()


@pytest.mark.parametrize("videos", [(), (3,)])
def test_the_engines_of_the_tests_on_a_gpu_can_be_built(tmp_path: Path, videos: tuple[int, ...]) -> None:
    """As far as a machine without one can tell: their precision is proved, and the products are right."""
    if "tensorrt-rtx" not in seam.flavours():
        pytest.skip("tensorrt-rtx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime")
    report = compile_products(tmp_path, "tensorrt-rtx", *videos, target=(8, 0))
    assert report.layers.flop_shares == {"fp32": 1.0}
    clips = torch.randint(0, 256, (*videos, 4, 3, 16, 16), dtype=torch.uint8)
    tokens, positions = onnxruntime.InferenceSession(tmp_path / "vision.onnx").run(None, {"frames": clips.numpy()})
    each = (clips.view(-1, 4, 3, 16, 16), tokens.reshape(-1, 4, 64), positions.reshape(-1, 4))
    for clip, *found in zip(*each, strict=True):
        check_products(clip, *map(torch.from_numpy, found))


@pytest.mark.gpu
@pytest.mark.skipif(FLAVOUR is None, reason=WHY_NOT)
def test_on_a_gpu(tmp_path: Path) -> None:
    """Calls on several streams, of frames here and there, do not disturb each other."""
    compile_products(tmp_path, FLAVOUR, target=torch.cuda.get_device_capability())
    vision = open_tensorrt(tmp_path, LAYOUTS["whole"], FLAVOUR)
    assert vision.runner.unreplayed is None
    generator = torch.Generator().manual_seed(0)
    for call in range(20):
        clip = torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
        with torch.cuda.stream(torch.cuda.Stream()):
            tokens, positions, *_ = vision.encode(clip if call % 2 else clip.cuda(non_blocking=True))
            got = (tokens.cpu(), positions.cpu())
        check_products(clip, *got)
    vision.close()


@pytest.mark.gpu
@pytest.mark.skipif(FLAVOUR is None, reason=WHY_NOT)
def test_several_clips_on_a_gpu(tmp_path: Path) -> None:
    """Each clip has its own tokens, whatever lies beside it in the batch."""
    compile_products(tmp_path, FLAVOUR, 3, target=torch.cuda.get_device_capability())
    vision = open_tensorrt(tmp_path, LAYOUTS["batch"], FLAVOUR)
    assert vision.batch == 3
    generator = torch.Generator().manual_seed(0)
    for call in range(12):
        clips = list(torch.randint(0, 256, (1 + call % 3, 4, 3, 16, 16), generator=generator, dtype=torch.uint8))
        where = [clip.cuda() if (call + place) % 2 else clip for place, clip in enumerate(clips)]
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [(tokens.cpu(), positions.cpu()) for tokens, positions, *_ in vision.encode_several(where)]
        assert len(found) == len(clips)
        for clip, (tokens, positions) in zip(clips, found, strict=True):
            check_products(clip, tokens, positions)
    vision.close()


FRAMES = 8


def sampled(frames: Tensor) -> Tensor:
    return clip_from_frames(frames, FRAMES, (72, 72)).frames


@pytest.mark.gpu
@pytest.mark.skipif(FLAVOUR is None, reason=WHY_NOT)
@pytest.mark.parametrize("merges", ["2,5", "4"])
def test_clips_in_chunks_on_a_gpu(tmp_path: Path, drawn_clip: Path, merges: str) -> None:
    """Tokens are PyTorch's within half precision; streamed, and with frames on the GPU, they are exactly the same."""
    from builder import build

    frames = load_clip(drawn_clip, 40, (120, 160)).frames
    target = ".".join(map(str, torch.cuda.get_device_capability()))
    words = f"--frames {FRAMES} --ratio 0.3 --fp16 --merge-layers {merges} --chunk 4 --backend {FLAVOUR}".split()
    build.main([*words, "--target", target, "--no-verify", "--out", str(tmp_path)])
    (folder,) = tmp_path.iterdir()
    manifest = Manifest.read(folder)
    vision = open_backend(str(FLAVOUR), folder, manifest)
    assert isinstance(vision, Chunked)
    clip = sampled(frames)
    wanted, where, *_ = (value.clone() for value in vision.encode(clip))
    reference = open_torch(describe(None), manifest, device=torch.device("cpu"), dtype=torch.float32)
    tokens, positions, *_ = reference.encode(clip)
    kept = torch.isin(where.cpu(), positions)
    assert kept.float().mean() > 0.85
    ours, theirs = wanted.cpu().float()[kept], tokens[torch.isin(positions, where.cpu())]
    assert torch.nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0) > 0.99
    assert torch.equal(vision.encode(clip.cuda())[0], wanted)
    with torch.cuda.stream(torch.cuda.Stream()):
        for total in (len(frames), None):
            with LiveClip(vision, total=total, limit=len(frames)) as live:
                for some in frames.split(7):
                    live.push(some)
                (tokens, positions, *_), _ = live.finish()
            assert torch.equal(tokens, wanted)
            assert torch.equal(positions, where)
    vision.close()
