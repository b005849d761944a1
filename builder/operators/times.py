"""Times of the compression stage's operators, beside hardware limits and plain PyTorch, for `builder.kernels`.

Each time is the median over calls, which take several inputs in turn (CUDA graphs: one input). On a GPU it is taken
with CUDA events, and before each call a buffer larger than the L2 cache is written, so that inputs come from memory as
inside an encoder.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from builder.operators.sizes import KernelSize
from earlytom import attention, merge, ops, select
from earlytom.budget import dynamic_tokens, effective_ratio, frames_per_stage
from earlytom.cells import select as diverse
from earlytom.config import EarlyTomConfig
from earlytom.encoder import encode
from earlytom.families import DEFAULT_FAMILY
from earlytom.methods.earlytom import EarlyTom
from runtime.measure.clock import timed

INPUTS = 3  # sets that take turns


@dataclass(frozen=True)
class Case:
    """One operator at one size.

    Attributes:
        ours, plain: the operator and the PyTorch reference, called with one input set.
        inputs: input sets.
        bytes, flops: the least that it must move and compute.
    """

    name: str
    shape: str
    ours: Callable[..., Any]
    plain: Callable[..., Any]
    inputs: Sequence[tuple[Any, ...]]
    bytes: int
    flops: int = 0


class Clock:
    """Times calls on a device; on a GPU each with a cold L2 cache."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats
        cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
        self._flush = torch.empty(4 * cache, dtype=torch.uint8, device=device)

    def __call__(self, run: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> float:
        """Median seconds of `run(*inputs[i])`."""
        for arguments in inputs:  # compiles and warms up
            run(*arguments)
        return statistics.median(self._once(run, inputs[i % len(inputs)]) for i in range(self.repeats))

    def _once(self, run: Callable[..., Any], arguments: tuple[Any, ...]) -> float:
        if self.device.type != "cuda":
            return timed(self.device, lambda: run(*arguments))[1]
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._flush.zero_()  # long enough for the host to run ahead, so that launches are not what is timed
        start.record()
        run(*arguments)
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def cases(size: KernelSize, dtype: torch.dtype, device: torch.device, config: EarlyTomConfig) -> list[Case]:
    """Every operator at the largest size with which the encoder calls it."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator, device=device).to(of)

    stages = frames_per_stage(size.frames, merges=len(config.merge_layers), frame_budget=config.frame_budget)
    first, last, receiving = stages[0], stages[-1], stages[-2]
    width = dtype.itemsize
    settings = (config.tau, config.max_window, config.ema, config.trailing)
    hidden = [(normal(first, size.tokens, size.width).cumsum(0),) for _ in range(INPUTS)]
    similarity = [(merge.frame_similarity(x), stages[1]) for (x,) in hidden]
    plans = (merge.plan_similarity(*one, **_named(config))[0] for one in similarity)
    weights = [(plan, x) for plan, (x,) in zip(plans, hidden, strict=True)]
    head = size.width // size.heads
    heads = (receiving, size.tokens, size.heads, head)
    pairs = [tuple(normal(*heads).transpose(1, 2) for _ in range(2)) for _ in range(INPUTS)]
    places = dynamic_tokens(size.cells, effective_ratio(config.retention_ratio, first, last))
    static = torch.arange(last, device=device) % 3 == 1
    chosen = [
        (normal(last, size.cells, size.llm_width), normal(last, size.cells, of=torch.float32), static, places)
        for _ in range(INPUTS)
    ]
    salient = [(diverse.saliency(x.flatten(0, 1)), x.flatten(0, 1)) for x, *_ in chosen]
    moment = torch.arange(float(last), device=device).repeat_interleave(size.cells)
    total, count = last * size.cells, last * places
    greedy = [(s, diverse.likeness(diverse.affinity(x, moment, last)), count) for s, x in salient]
    scale = head**-0.5
    return [
        Case(
            "frame_similarity",
            f"[{first}, {size.tokens}, {size.width}]",
            ops.frame_similarity,
            merge.frame_similarity,
            hidden,
            first * size.tokens * size.width * width,
            2 * first * first * size.tokens * size.width,
        ),
        Case(
            "frame_plan",
            f"[{first}, {first}] to {stages[1]}",
            lambda c, kept: ops.frame_plan(c, kept, *settings),
            lambda c, kept: merge.plan_similarity(c, kept, **_named(config)),
            similarity,
            4 * (first * first + stages[1] * first) + 9 * first,
        ),
        Case(
            "merge (matrix product)",
            f"[{stages[1]}, {first}] x [{first}, {size.tokens * size.width}]",
            merge.apply_weights,
            merge.apply_weights,
            weights,
            (first + stages[1]) * size.tokens * size.width * width,
            2 * first * stages[1] * size.tokens * size.width,
        ),
        Case(
            "received_attention",
            f"[{receiving}, {size.heads}, {size.tokens}, {head}]",
            lambda q, k: ops.received_attention(q, k, scale),
            lambda q, k: attention.column_means(attention.attention_matrix(q, k, scale)),
            pairs,
            2 * receiving * size.tokens * size.width * width + 4 * receiving * size.tokens,
            4 * receiving * size.tokens**2 * size.width,
        ),
        Case(
            "select_tokens",
            f"[{last}, {size.cells}, {size.llm_width}] to {places} each",
            ops.select_tokens,
            select.select_fixed,
            chosen,
            last * (size.cells * 4 + places * (2 * size.llm_width * width + 8)),
        ),
        Case(
            "select_greedy",
            f"[{total}] to {count}",
            ops.select_greedy,
            diverse.select_greedy,
            greedy,
            4 * total * (count + 1) + 8 * count,
        ),
    ]


def _named(config: EarlyTomConfig) -> dict[str, Any]:
    return {"tau": config.tau, "max_window": config.max_window, "ema": config.ema, "trailing": config.trailing}


@dataclass(frozen=True)
class DeviceLimits:
    """Measured peak rates: bytes a second of a copy (read and written), flops a second of a matrix product."""

    bandwidth: float
    matmul: float

    def floor(self, case: Case) -> float:
        """The least seconds of a case at these rates."""
        return max(case.bytes / self.bandwidth, case.flops / self.matmul)


def measure_limits(clock: Clock, dtype: torch.dtype) -> DeviceLimits:
    """Copy bandwidth on a large tensor, and the rate of a square matrix product."""
    gpu = clock.device.type == "cuda"
    source = torch.ones(2**28 if gpu else 2**24, dtype=torch.float32, device=clock.device)
    target = torch.empty_like(source)
    side = 8192 if gpu else 512
    matrix = torch.randn(side, side, device=clock.device).to(dtype)
    copied = clock(target.copy_, [(source,)])
    return DeviceLimits(2 * source.nbytes / copied, 2 * side**3 / clock(torch.matmul, [(matrix, matrix)]))


def vision_tower(size: KernelSize, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """A tower and a projector of a size, with random weights."""
    from transformers import AutoConfig, AutoModel

    with torch.device(device):
        torch.manual_seed(0)
        tower: Any = AutoModel.from_config(
            AutoConfig.for_model(
                DEFAULT_FAMILY.towers[0],
                hidden_size=size.width,
                intermediate_size=size.intermediate,
                num_hidden_layers=size.layers,
                num_attention_heads=size.heads,
                image_size=size.size[0],
                patch_size=size.patch,
                vision_use_head=False,
            )
        )
        middle = torch.nn.Linear(size.width, size.llm_width), torch.nn.GELU()
        projector = torch.nn.Sequential(*middle, torch.nn.Linear(size.llm_width, size.llm_width))
    return tower.to(dtype).eval(), projector.to(dtype).eval()


class Path:
    """The whole compression path of the budget schedule without the model: called with the hidden states at every merge
    layer, query and key of the last one, and pooled features."""

    def __init__(self, size: KernelSize, config: EarlyTomConfig) -> None:
        self.size, self.decisions = size, EarlyTom(config)
        self.stages = frames_per_stage(size.frames, merges=len(config.merge_layers), frame_budget=config.frame_budget)
        effective = effective_ratio(config.retention_ratio, size.frames, self.stages[-1])
        self.places = dynamic_tokens(size.cells, effective)

    def inputs(self, dtype: torch.dtype, device: torch.device, seed: int) -> tuple[Tensor, ...]:
        """One input set."""
        size, generator = self.size, torch.Generator(device).manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        hidden = [normal(frames, size.tokens, size.width) for frames in self.stages[:-1]]
        heads = (self.stages[-2], size.tokens, size.heads, size.width // size.heads)
        query, key = (normal(*heads).transpose(1, 2) for _ in range(2))
        return *hidden, query, key, normal(self.stages[-1], size.cells, size.llm_width)

    def __call__(self, *inputs: Tensor) -> Tensor:
        *hidden, query, key, features = inputs
        for x, kept in zip(hidden, self.stages[1:], strict=True):
            weights, _, _ = self.decisions.plan(self.decisions.similarity(x), kept)
            merged = merge.apply_weights(weights, x)
        received = merge.apply_weights(weights, ops.received_attention(query, key, query.shape[-1] ** -0.5))
        _, _, static = self.decisions.plan(self.decisions.similarity(merged), self.stages[-1])
        relevance = DEFAULT_FAMILY.pool(received[:, :, None])[:, :, 0]
        return self.decisions.select(features, relevance, static, self.places)[0]


def graphed(run: Callable[..., Any], inputs: Sequence[tuple[Any, ...]]) -> Callable[..., Any]:
    """`run` as one CUDA graph, always on the first input set, so that host launches are not timed."""
    for _ in range(2):
        run(*inputs[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run(*inputs[0])
    return lambda *_: graph.replay()


def measure_path(size: KernelSize, config: EarlyTomConfig, dtype: torch.dtype, clock: Clock) -> tuple[float, float]:
    """Seconds of the compression path and of the vision encoder that contains it, on a GPU both as CUDA graphs."""
    path = Path(size, config)
    inputs = [path.inputs(dtype, clock.device, seed) for seed in range(INPUTS)]
    tower, projector = vision_tower(size, dtype, clock.device)
    pixels = [(torch.randn(size.frames, 3, *size.size, device=clock.device).to(dtype),) for _ in range(INPUTS)]

    def whole(x: Tensor) -> Tensor:
        return encode(DEFAULT_FAMILY.vision(tower, projector), x, EarlyTom(config)).tokens

    if clock.device.type == "cuda":
        return clock(graphed(path, inputs), inputs), clock(graphed(whole, pixels), pixels)
    return clock(path, inputs), clock(whole, pixels)


def measured(case: Case, clock: Clock, limits: DeviceLimits) -> dict[str, Any]:
    """The figures of one operator, times in seconds."""
    floor, ours = limits.floor(case), clock(case.ours, case.inputs)
    return {
        "name": case.name,
        "shape": case.shape,
        "bytes": case.bytes,
        "flops": case.flops,
        "floor": floor,
        "ours": ours,
        "of_floor": floor / ours,
        "pytorch": clock(case.plain, case.inputs),
    }
