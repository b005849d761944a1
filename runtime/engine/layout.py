"""The layout of an engine, shared by builder and runtime: its graphs, tensors, counts, and the files of its folder.

An engine maps one clip to the visual tokens that reach the LLM; in the budget schedule all shapes are static:

    frames     uint8 [F, 3, H, W]   RGB at the model's resolution; scaling and normalising happen inside the engine
    tokens     dtype [N, D]         D is the width of the LLM; dtype is that of the graph
    positions  int64 [N]            ascending; position = f * P + cell, f the index among the F' frames that are left
    sources    fp32 [F', F]         weight of each frame of the clip in each frame that is left
    place      int64 [N]            where a token is in the video: frame of the video * P + cell
    bias       fp32 [N]             log of the number of the video's tokens that it stands for

For a model whose tower makes one frame of several pictures (`Sizes.step`), `frames` has F pictures and all else F /
step frames. For one whose LLM also gets states of earlier layers, these are concatenated to each token, so that D is a
multiple of the LLM's width.

An engine for B > 1 videos has a leading B everywhere: frames [B, F, 3, H, W], tokens [B, N, D], positions [B, N], ...;
each video is processed as if it were alone.

The budget schedule is one graph, `vision.onnx` or `vision.engine`. A folder for several frame counts has a graph for
each, `vision.f8.onnx`, `vision.f16.onnx`, ..., and likewise its other files; their ONNX weights share `vision.data`.
The adaptive schedule is a chain of graphs, `vision.0.onnx`, `vision.1.onnx`, ..., each with the layers up to a merge
and the merge itself; n <= F frames arrive:

    hidden           [n, T, D]       input of all stages but the first: `merged_hidden` of the stage before
    received         fp32 [n, S]     input of the last stage: received attention
    made_of          fp32 [n, F]     input of all stages but the first: `sources` of the stage before
    sources          fp32 [n, F]     output of all stages: as above, after its merge; rows from `count` on are zero
    merged_hidden    [n, T, D]       output of all stages but the last; rows from `count` on are zero
    merged_received  fp32 [n, S]     output of the last stage but one; likewise
    count            int64 [1]       frames left; from the last stage the number of tokens N: tokens, positions, place
                                     and bias have M = `places` * n rows, the most for n frames, of which the first N
                                     count

A method that merges cell by cell passes on other tensors than `received` and `made_of`: inputs of all stages but the
first, outputs of all but the last (as `merged_cell_size`, ...); only the last stage has `sources`:

    cell_size        fp32 [n, S]      number of the video's cells merged into each
    cell_time        fp32 [n, S]      the frame of the video that it shows
    cell_made_of     fp32 [n, S, F]   weight of each frame of the clip in it

An engine for chunks of C frames (budget schedule, C divides F) is two graphs, `vision.0.onnx` with the layers up to the
first merge, which runs once for each chunk, and `vision.1.onnx` with everything after them:

    hidden           [C, T, D], [F, T, D]     output of the first for a chunk, input of the second for a clip
    received         fp32 [C, S], [F, S]      likewise, with at most one merge: received attention

What closes a video's tokens in a prompt is not part of an engine: the runtime appends it. These names are spelt here
and nowhere else. A `Layout` has the graphs of one engine in their order, and derives every count from the settings.
Needs no PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from earlytom.budget import frames_per_stage, most_tokens, token_count
from earlytom.settings import MethodSettings
from earlytom.spans import OF_MERGES, layer_spans, trace_names
from earlytom.untouched import UntouchedConfig

FRAMES = "frames"
TOKENS = "tokens"
POSITIONS = "positions"
SOURCES = "sources"
PLACE = "place"
BIAS = "bias"
OUTPUTS = (TOKENS, POSITIONS, SOURCES, PLACE, BIAS)
OF_TOKENS = (TOKENS, POSITIONS, PLACE, BIAS)  # the outputs with a row for each token
HIDDEN, RECEIVED = "hidden", "received"
MERGED_HIDDEN, MERGED_RECEIVED = "merged_hidden", "merged_received"
MADE_OF = "made_of"
CELL_SIZE, CELL_TIME, CELL_MADE_OF = "cell_size", "cell_time", "cell_made_of"
COUNT = "count"

# Input of a stage of a chain -> the output of the stage before it.
BETWEEN = {HIDDEN: MERGED_HIDDEN, RECEIVED: MERGED_RECEIVED, MADE_OF: SOURCES}
BETWEEN |= {name: f"merged_{name}" for name in (CELL_SIZE, CELL_TIME, CELL_MADE_OF)}

# The dtypes of a graph, of its tokens and hidden states, as named in folder names, manifests and flags (--fp16, --bf16,
# --fp32). `runtime.engine.dtypes` has the libraries' own names.
DTYPE_NAMES = ("fp16", "bf16", "fp32")

MANIFEST_FILE = "manifest.json"
ONNX_FILE = "vision.onnx"
ENGINE_FILE = "vision.engine"
REPORT_FILE = "report.json"
LAYERS_FILE = "layers.json"
DATA_FILE = "vision.data"
REFERENCE_INPUTS_FILE = "reference_inputs.json"
REFERENCE_OUTPUTS_FILE = "reference_outputs.json"

VARIES = -1  # a dimension that depends on the video
Mode = Literal["whole", "adaptive", "chunked"]


def stage_file(name: str, stage: int) -> str:
    """The file of one stage of a chain: "vision.onnx", 2 to "vision.2.onnx"."""
    stem, suffix = name.rsplit(".", maxsplit=1)
    return f"{stem}.{stage}.{suffix}"


def count_file(name: str, frames: int) -> str:
    """The file of one of several frame counts: "vision.onnx", 8 to "vision.f8.onnx"."""
    stem, suffix = name.rsplit(".", maxsplit=1)
    return f"{stem}.f{frames}.{suffix}"


@dataclass(frozen=True)
class Tensor:
    """An input or output of a graph.

    Attributes:
        shape: `VARIES` for a dimension that depends on the video, None for one that the layout does not know.
        dtypes: names of the allowed dtypes.
    """

    name: str
    shape: tuple[int | None, ...]
    dtypes: tuple[str, ...]


@dataclass(frozen=True)
class Graph:
    """One graph of an engine.

    Attributes:
        stage: its index among several graphs; None for an engine's single graph.
        span: its encoder layers; None where their number is not known.
        inputs, outputs: in their order.
        calls: runs for one clip.
        taps: values inside that are compared with PyTorch's, in the order of computation.
        count: the frame count in its files' names, where the folder has graphs for several.
    """

    stage: int | None
    span: range | None
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    calls: int = 1
    taps: tuple[str, ...] = ()
    count: int | None = None

    @property
    def names(self) -> frozenset[str]:
        """Names of the inputs and outputs."""
        return frozenset(tensor.name for tensor in (*self.inputs, *self.outputs))

    def file(self, name: str) -> str:
        """Its file `name`: "vision.onnx", or "vision.2.onnx" for a stage, "vision.f8.onnx" for a frame count."""
        if self.stage is not None:
            return stage_file(name, self.stage)
        return name if self.count is None else count_file(name, self.count)


@dataclass(frozen=True)
class Sizes:
    """Sizes fixed by the model; None where they are not known.

    Attributes:
        tokens_per_frame: P, tokens of a whole frame after pooling.
        image: (H, W) of a frame.
        width: D, width of a token.
        layers: encoder layers that run.
        step: pictures per frame of the tower.
    """

    tokens_per_frame: int | None = None
    image: tuple[int, int] | None = None
    width: int | None = None
    layers: int | None = None
    step: int = 1


@dataclass(frozen=True)
class Layout:
    """One engine.

    Attributes:
        earlytom: the method's settings.
        frames: F, pictures of a clip, `sizes.step` of them per frame. With several frame counts the largest, and all
            other counts are those for it.
        batch: B, videos per call; counts and tokens are those of one video.
        chunk: C, frames of a chunk; None for an engine that takes whole clips.
        dtype: "fp16", "bf16" or "fp32".
        frame_counts: the frame counts, ascending, where there are several; the result of `at` has one of them.
    """

    earlytom: MethodSettings
    frames: int
    batch: int = 1
    chunk: int | None = None
    dtype: str = "fp32"
    sizes: Sizes = Sizes()
    frame_counts: tuple[int, ...] | None = None

    @property
    def mode(self) -> Mode:
        """How the graphs run: one for a whole clip, a chain of stages, or one for each chunk and one for the rest."""
        if self.earlytom.schedule == "adaptive":
            return "adaptive"
        return "whole" if self.chunk is None else "chunked"

    @property
    def adaptive(self) -> bool:
        """Whether the number of remaining frames depends on the video, so that the engine is a chain of stages."""
        return self.mode == "adaptive"

    @property
    def in_stages(self) -> bool:
        """Whether a clip runs through several graphs: a chain, or a graph for its chunks and one for the rest."""
        return self.mode != "whole"

    @property
    def counts(self) -> tuple[int, ...]:
        """The frame counts that the engine takes, ascending."""
        return self.frame_counts or (self.frames,)

    def at(self, frames: int) -> Layout:
        """The layout for one of `counts`."""
        return self if self.counts == (frames,) else replace(self, frames=frames, frame_counts=(frames,))

    @property
    def steps(self) -> int:
        """Frames of a clip in the tower, `frames / step`."""
        return self.frames // self.sizes.step

    @property
    def merges(self) -> int:
        return len(self.earlytom.merge_layers)

    @property
    def watches(self) -> bool:
        """Whether the method uses received attention."""
        return self.earlytom.watches

    @property
    def stages(self) -> tuple[int, ...]:
        """Frames before the first merge and after each one; adaptive schedule: the most, which is all of them."""
        if self.adaptive:
            return (self.steps,) * (self.merges + 1)
        return frames_per_stage(self.steps, merges=self.merges, frame_budget=self.earlytom.frame_budget)

    @property
    def tokens_per_frame(self) -> int:
        """P, tokens of a whole frame."""
        assert self.sizes.tokens_per_frame is not None
        return self.sizes.tokens_per_frame

    @property
    def tokens(self) -> int:
        """N, tokens that reach the LLM; adaptive schedule: the most that any video gives."""
        if self.adaptive:
            ratio = self.earlytom.retention_ratio
            return most_tokens(self.steps, self.tokens_per_frame, ratio, merges=self.merges)
        return self.tokens_of(self.stages[-1])

    @property
    def tokens_full(self) -> int:
        """`steps * P`, what the uncompressed model would send to the LLM."""
        return self.steps * self.tokens_per_frame

    def tokens_of(self, frames_left: int) -> int:
        """Tokens of `frames_left` frames, none of them static: the rows that a chain's last stage writes for them."""
        if isinstance(self.earlytom, UntouchedConfig):  # all frames are left
            return self.earlytom.tokens(self.steps, self.tokens_per_frame)
        return token_count(self.steps, self.tokens_per_frame, self.earlytom.retention_ratio, frames_out=frames_left)

    @property
    def taps(self) -> tuple[str, ...]:
        """Values inside the graphs that are compared with PyTorch's, in the order of computation: those of every layer
        if the number of layers is known, else of the merge layers.
        """
        return tuple(trace_names(self.earlytom, self.sizes.layers))

    @property
    def graphs(self) -> tuple[Graph, ...]:
        """The graphs that a clip of `frames` runs through, in their order."""
        if self.mode == "whole":
            return (self._graph(None, (FRAMES,), OUTPUTS, rows=self.frames),)
        if self.mode == "chunked":
            between = (HIDDEN, RECEIVED) if self.merges <= 1 and self.watches else (HIDDEN,)
            assert self.chunk is not None
            calls = self.frames // self.chunk
            head = self._graph(0, (FRAMES,), between, rows=self.chunk, calls=calls)
            return head, self._graph(1, between, OUTPUTS, rows=self.frames)
        rows = (self.frames, *[VARIES] * self.merges)
        tensors = _stage_tensors if self.watches else _cell_stage_tensors
        return tuple(self._graph(n, *tensors(n, len(rows)), rows=count) for n, count in enumerate(rows))

    @property
    def files(self) -> tuple[Graph, ...]:
        """The graphs of every frame count."""
        return tuple(graph for count in self.counts for graph in self.at(count).graphs)

    def _graph(
        self, stage: int | None, inputs: Iterable[str], outputs: Iterable[str], *, rows: int, calls: int = 1
    ) -> Graph:
        return Graph(
            stage,
            self._span(stage),
            tuple(self._tensor(name, rows) for name in inputs),
            tuple(self._tensor(name, rows) for name in outputs),
            calls,
            self._taps(stage),
            None if self.frame_counts is None else self.frames,
        )

    def _tensor(self, name: str, rows: int) -> Tensor:
        videos = () if self.batch == 1 else (self.batch,)
        tokens = VARIES if self.adaptive else None if self.sizes.tokens_per_frame is None else self.tokens
        left = rows if self.adaptive else self.stages[-1]
        shapes: dict[str, tuple[int | None, ...]] = {
            FRAMES: (*videos, rows, 3, *(self.sizes.image or (None, None))),
            HIDDEN: (rows, None, None),
            RECEIVED: (rows, None),
            TOKENS: (*videos, tokens, self.sizes.width),
            POSITIONS: (*videos, tokens),
            SOURCES: (*videos, left, self.steps),
            CELL_SIZE: (rows, None),
            CELL_TIME: (rows, None),
            CELL_MADE_OF: (rows, None, self.steps),
            PLACE: (*videos, tokens),
            BIAS: (*videos, tokens),
            COUNT: (1,),
        }
        dtypes = {FRAMES: "uint8"} | dict.fromkeys((POSITIONS, PLACE, COUNT), "int64")
        dtypes |= dict.fromkeys((RECEIVED, SOURCES, BIAS, CELL_SIZE, CELL_TIME, CELL_MADE_OF), "fp32")
        kinds = {made: taken for taken, made in BETWEEN.items()} | {MADE_OF: SOURCES, SOURCES: SOURCES}
        kind = kinds.get(name, name)
        return Tensor(name, shapes[kind], (dtypes[kind],) if kind in dtypes else DTYPE_NAMES)

    def _span(self, stage: int | None) -> range | None:
        """Encoder layers of one graph."""
        if self.sizes.layers is None:
            return None
        spans = layer_spans(self.earlytom.merge_layers, self.sizes.layers)
        if self.mode == "adaptive":
            return spans[stage or 0]
        if self.mode == "whole":
            return range(self.sizes.layers)
        return range(spans[0].stop, self.sizes.layers) if stage else spans[0]

    def _taps(self, stage: int | None) -> tuple[str, ...]:
        """The `taps` of one graph."""
        span = self._span(stage)
        if span is None or self.mode == "whole":
            return self.taps
        if self.mode == "chunked":  # the first merge is part of the rest
            head = {f"hidden_{layer}" for layer in range(layer_spans(self.earlytom.merge_layers, span.stop)[0].stop)}
            return tuple(name for name in self.taps if (name in head) == (stage == 0))
        of_layers = {f"{what}_{layer}" for what in ("hidden", *OF_MERGES) for layer in span}
        last = stage == self.merges
        return tuple(n for n in self.taps if n in of_layers or (last and not n.rpartition("_")[2].isdigit()))


def _stage_tensors(stage: int, stages: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Inputs and outputs of one stage of a chain of `stages`, by name."""
    last = stages - 1
    inputs: tuple[str, ...] = (HIDDEN, MADE_OF) if stage else (FRAMES,)
    if 0 < stage == last:
        inputs = (HIDDEN, RECEIVED, MADE_OF)
    if stage == last:
        return inputs, (*OUTPUTS, COUNT)
    return inputs, (MERGED_HIDDEN, SOURCES, COUNT, *([MERGED_RECEIVED] * (stage == last - 1)))


def _cell_stage_tensors(stage: int, stages: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The same for a method that merges cell by cell."""
    between = (HIDDEN, CELL_SIZE, CELL_TIME, CELL_MADE_OF)
    inputs = between if stage else (FRAMES,)
    if stage == stages - 1:
        return inputs, (*OUTPUTS, COUNT)
    return inputs, (*(BETWEEN[name] for name in between), COUNT)
