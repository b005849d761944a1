"""Parts about the device: its peak rates, the compression stage's kernels against the reference, and the runtime's
other work on a GPU (uploads, resizing, CUDA graphs)."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from builder.doctor.isolated import Wrong
from builder.operators.sizes import SIZES
from builder.operators.times import Case, Clock, cases, measure_limits, vision_tower
from earlytom.config import EarlyTomConfig
from earlytom.encoder import encode
from earlytom.families import DEFAULT_FAMILY
from earlytom.methods.earlytom import EarlyTom
from runtime.drawing.clips import draw_clip, draw_frames
from runtime.engine.dtypes import DTYPES
from runtime.gpu.staging import Upload
from runtime.video import load_clip, resize_frames

_NEAR = 2e-3  # of the largest value: a sum in half precision against one in fp32
_GREY = 1.0  # mean difference, of 255: two libraries resize


def limits(device: str, dtype: str) -> dict[str, Any]:
    """Copy bandwidth and the rate of a matrix product."""
    with torch.inference_mode():
        found = measure_limits(Clock(torch.device(device), 10), DTYPES[dtype])
    return {"copies_gb_s": round(found.bandwidth / 1e9, 1), f"{dtype}_tflop_s": round(found.matmul / 1e12, 3)}


def kernels(device: str, size: str, dtype: str) -> dict[str, Any]:
    """Compare each kernel with the PyTorch reference on the same inputs; on a CPU in Triton's interpreter."""
    config = EarlyTomConfig(retention_ratio=0.1, merge_layers=SIZES[size].merge_layers, schedule="budget")
    figures: dict[str, Any] = {}
    with torch.inference_mode():
        for case in cases(SIZES[size], DTYPES[dtype], torch.device(device), config):
            if case.name in _KERNELS:
                figures[case.name] = _compared(case, device, config)
    return figures


_KERNELS = ("frame_similarity", "frame_plan", "received_attention", "select_tokens", "select_greedy")


def _compared(case: Case, device: str, config: EarlyTomConfig) -> str:
    """Compare a kernel with the reference; returns how near it is, in words."""
    ours = case.ours if device == "cuda" else _interpreted(case, config)
    worst = 0.0
    for inputs in case.inputs:
        got, wanted = _tensors(ours(*inputs)), _tensors(case.plain(*inputs))
        if case.name == "frame_plan":  # its other outputs follow from the first, in other forms
            got, wanted = got[:1], wanted[:1]
        for mine, theirs in zip(got, wanted, strict=True):
            if not mine.is_floating_point() or case.name.startswith("select"):
                if not torch.equal(mine, theirs):
                    raise Wrong(f"{case.name} {case.shape} chose other tokens than the reference")
                continue
            scale = float(theirs.float().abs().max()) or 1.0
            error = float((mine.float() - theirs.float()).abs().max()) / scale
            worst = max(worst, error if error == error else float("inf"))
    if worst > _NEAR:
        raise Wrong(f"{case.name} {case.shape} is off by {worst:.2g} of the largest value, at most {_NEAR} is expected")
    return "equal" if worst == 0 else f"within {worst:.1e}"


def _interpreted(case: Case, config: EarlyTomConfig) -> Callable[..., Any]:
    """The kernel itself, as the operator uses the reference on a CPU."""
    kernel = getattr(importlib.import_module(f"earlytom.kernels.{case.name}"), case.name)
    if case.name == "frame_plan":
        settings = {name: getattr(config, name) for name in ("tau", "max_window", "ema", "trailing")}
        return lambda c, kept: kernel(c, kept, **settings)
    if case.name == "received_attention":
        return lambda q, k: kernel(q, k, q.shape[-1] ** -0.5)
    return lambda *inputs: kernel(*inputs)


def _tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [one for one in value if isinstance(one, Tensor)]


def encoder_graph() -> dict[str, Any]:
    """The budget encoder in PyTorch, captured as one CUDA graph, must follow its input."""
    size, cuda = SIZES["tiny"], torch.device("cuda")
    config = EarlyTomConfig(retention_ratio=0.4, merge_layers=size.merge_layers, schedule="budget")
    tower, projector = vision_tower(size, torch.float32, cuda)

    def whole(pixels: Tensor) -> tuple[Tensor, Tensor]:
        visual = encode(DEFAULT_FAMILY.vision(tower, projector), pixels, EarlyTom(config))
        return visual.tokens, visual.positions

    with torch.inference_mode():
        pixels = _pixels(0, size.frames, size.size).to(cuda)
        for _ in range(2):
            whole(pixels)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            tokens, positions = whole(pixels)
        for seed in range(1, 5):
            pixels.copy_(_pixels(seed, size.frames, size.size))
            graph.replay()
            wanted, where = whole(pixels.clone())
            if not (torch.equal(positions, where) and torch.allclose(tokens, wanted, atol=1e-5)):
                raise Wrong(f"replayed on other frames (seed {seed}) the graph gives other tokens than a call")
    return {"replays": "equal"}


def _pixels(seed: int, frames: int, size: tuple[int, int]) -> Tensor:
    return torch.from_numpy(draw_frames(frames, *size, seed=seed)).float() / 127.5 - 1


def uploads() -> dict[str, Any]:
    """Frames overwritten on the host during their upload must arrive unchanged."""
    upload, frames = Upload(torch.device("cuda")), torch.zeros(8, 3, 384, 384, dtype=torch.uint8)
    arriving = [upload(frames.fill_(value)) for value in range(6)]
    with torch.cuda.stream(torch.cuda.Stream()):
        taken = [one.take() for one in arriving]
        found = [(int(one.min()), int(one.max())) for one in taken]
    if found != [(value, value) for value in range(6)]:
        raise Wrong(f"frames 0 to 5, uploaded one after the other, arrived as {found}")
    return {"uploads": "equal"}


def resizing(work: str) -> dict[str, Any]:
    """Frames resized on the GPU must equal those of the host, within `_GREY`."""
    clip = draw_clip(Path(work) / "resized.mp4")
    figures = {}
    for size in ((72, 72), (384, 384)):
        there, here = (load_clip(clip, 8, size, device=device).frames for device in ("cuda", "cpu"))
        off = float((there.cpu().float() - here.float()).abs().mean())
        if off >= _GREY or not torch.equal(resize_frames(there[:1], size, "cuda"), there[:1]):
            raise Wrong(f"frames of {size[0]} x {size[1]} resized on the GPU are off by {off:.2f} of 255 in the mean")
        figures[f"off_{size[0]}"] = round(off, 4)
    return figures
