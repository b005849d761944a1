"""Right and wrong answers about clips: the measurement, and its distribution over processes.

An `EvaluationJob` holds the settings and can be sent to another process; an `EvaluationBench` has the model loaded and
measures some clips; `run` measures all clips, a few at a time, on several single-threaded processes (the bundled model
is too small for more threads). A clip's figures do not depend on their distribution.

Notation: C clips, Q questions of all clips, S settings (a setting is a method at a ratio).
"""

from __future__ import annotations

import hashlib
import multiprocessing
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits
from torch import Tensor

from builder.compile.child import end_with_parent
from builder.evaluation.engine import ENGINE, TWIN, engine_methods
from builder.evaluation.methods import chosen, methods
from builder.evaluation.options import Merging
from builder.evaluation.passes import ClipPasses, VisionPass
from builder.evaluation.ways.row import Row, Visual
from builder.micro.labels import object_cells
from builder.micro.packing import Standing
from builder.micro.scoring import Outcome, Scorer
from earlytom import flops
from earlytom.cells.config import CellsConfig
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.families import family_of
from earlytom.inner import InnerSettings
from earlytom.inner_decoder import apply_inner
from earlytom.micro.data import KINDS, LabelledClip, Question, labelled_clip
from earlytom.micro.data.scene import FRAMES, SIDE
from runtime.checkpoint import Checkpoint, VisionPart, describe, load_model, load_tokenizer
from runtime.text.places import Placing, fitted

CLIPS_AT_ONCE = 8


@dataclass(frozen=True)
class EvaluationJob:
    """The settings of a measurement.

    Attributes:
        source: the model, as for `runtime.checkpoint.describe`.
        config: EarlyTom's settings; ratio and schedule are ignored.
        methods: names or groups, see `methods.chosen`.
        ratios: retention ratios.
        split, seed: of the task's clips; the seed is also that of random tokens.
        engine: an engine folder to measure, too, or None.
        cells, budgets, bias, original, frames, faithful: as in `methods.methods`.
    """

    source: str
    config: EarlyTomConfig
    methods: tuple[str, ...]
    ratios: tuple[float, ...]
    split: str = "test"
    seed: int = 0
    engine: str | None = None
    cells: CellsConfig | None = None
    budgets: tuple[Merging, ...] = ()
    bias: bool | None = None
    original: bool | None = None
    frames: int = FRAMES
    faithful: bool = False

    def rows(self, depth: int, text_layers: int) -> list[Row]:
        """The rows for a tower of `depth` layers and a language model of `text_layers`."""
        known = methods(
            self.config,
            depth,
            seed=self.seed,
            cells=self.cells,
            budgets=self.budgets,
            bias=self.bias,
            original=self.original,
            frames=self.frames,
            text_layers=text_layers,
            faithful=self.faithful,
        )
        return chosen(known, self.methods)


@dataclass(frozen=True)
class Setting:
    """A method at a ratio (None if it does not depend on one)."""

    method: Row
    ratio: float | None

    def visual(self, clip: ClipPasses) -> Visual:
        """The visual tokens of a clip."""
        return self.method.visual(clip, 1.0 if self.ratio is None else self.ratio)

    def standing(self, clip: ClipPasses, visual: Visual) -> Standing:
        """The visual tokens' positions and bias for the decoder."""
        told = self.method.told
        full, most = len(clip.frames) * clip.cells, FRAMES * clip.cells
        span = Placing(most=most).span(full)
        place = fitted(visual.place, full, span) if told.original and visual.place is not None else None
        return Standing(span, place, visual.bias if told.bias else None)


@dataclass(frozen=True)
class Answers:
    """Results on some clips.

    Attributes:
        clip: [Q] index of the question's clip, from 0. kind: [Q] index into `KINDS`.
        right: [S, Q] bool. same: [Q] bool, whether the engine answered as its twin in PyTorch; empty without engine.
        tokens: [S, C] visual tokens, without the newline. frames: [S, C] frames at the tower's end.
        vision, prefill: [S, C] flops.
        objects: [C] share of the clip's uncompressed tokens that show an object.
    """

    clip: NDArray[np.int64]
    kind: NDArray[np.int64]
    right: NDArray[np.bool_]
    same: NDArray[np.bool_]
    tokens: NDArray[np.int64]
    frames: NDArray[np.int64]
    vision: NDArray[np.int64]
    prefill: NDArray[np.int64]
    objects: NDArray[np.float64]

    def asked(self, kind: int | None = None) -> NDArray[np.float64]:
        """[C] number of questions about each clip, of one kind or of all."""
        return self._count(np.ones(len(self.clip)), kind)

    def correct(self, setting: int, kind: int | None = None) -> NDArray[np.float64]:
        """[C] number of right answers about each clip."""
        return self._count(self.right[setting], kind)

    def _count(self, weights: NDArray[Any], kind: int | None) -> NDArray[np.float64]:
        these = slice(None) if kind is None else self.kind == kind
        counted = np.bincount(self.clip[these], weights[these], minlength=self.tokens.shape[1])
        return counted.astype(np.float64)

    @classmethod
    def joined(cls, parts: Sequence[Answers]) -> Answers:
        """The answers about all clips, in the order of the parts."""
        before = np.cumsum([0, *(part.tokens.shape[1] for part in parts)])
        values = {
            name: np.concatenate([getattr(part, name) for part in parts], axis=-1) for name in cls.__dataclass_fields__
        }
        values["clip"] = np.concatenate([part.clip + start for part, start in zip(parts, before, strict=False)])
        return cls(**values)


@dataclass
class EvaluationBench:
    """A model loaded for a job.

    Attributes:
        settings: in the order of the rows of `Answers`.
    """

    job: EvaluationJob
    checkpoint: Checkpoint = field(init=False)
    model: Any = field(init=False)
    settings: tuple[Setting, ...] = field(init=False)

    def __post_init__(self) -> None:
        self.checkpoint = task_checkpoint(self.job.source)
        self.model = load_model(self.checkpoint)
        self.tokenizer = load_tokenizer(self.checkpoint)
        self.scorer = Scorer(self.model, self.tokenizer)
        self.vision = VisionPass(VisionPart.from_model(self.model), self.checkpoint)
        found = self.job.rows(self.vision.depth, self.model.config.text_config.num_hidden_layers)
        if self.job.engine is not None:
            found += engine_methods(self.job.engine)
        self.settings = tuple(Setting(method, ratio) for method in found for ratio in method.ratios(self.job.ratios))

    def clip(self, index: int) -> tuple[ClipPasses, LabelledClip]:
        """A clip of the job's split, to be encoded, and its labels and questions."""
        clip = labelled_clip(self.job.split, index, seed=self.job.seed, length=self.job.frames)
        return ClipPasses(self.vision, torch.from_numpy(clip.frames), index), clip

    def measure(self, indices: Sequence[int]) -> Answers:
        """Ask the questions about some clips in every setting."""
        clips, known_clips = zip(*map(self.clip, indices), strict=True)
        questions = [clip.questions for clip in known_clips]
        packs = [self.scorer.pack(asked) for asked in questions]
        outcomes: list[list[list[Outcome]]] = []  # setting, clip, question
        costs: list[list[tuple[int, int, int, int]]] = []
        known: dict[tuple[bytes, InnerSettings | None], list[list[Outcome]]] = {}
        for setting in self.settings:
            visual = [setting.visual(clip) for clip in clips]
            tokens = [one.tokens for one in visual]
            told = [setting.standing(clip, one) for clip, one in zip(clips, visual, strict=True)]
            inner = visual[0].inner
            key = _digest([*tokens, *(one.place for one in told), *(one.bias for one in told)]), inner
            if key not in known:  # settings may coincide, such as all tokens of few frames
                known[key] = (
                    self.scorer.score(tokens, packs, told)
                    if inner is None
                    else self._inside(tokens, questions, told, inner)
                )
            outcomes.append(known[key])
            costs.append([self.cost(one) for one in visual])
        counted, frames, vision, prefill = np.array(costs, np.int64).transpose(2, 0, 1)
        counts = [len(asked) for asked in questions]
        return Answers(
            clip=np.repeat(np.arange(len(clips)), counts),
            kind=np.array([list(KINDS).index(question.kind) for asked in questions for question in asked]),
            right=np.array([[outcome.right for clip in row for outcome in clip] for row in outcomes]),
            same=self._same(outcomes),
            tokens=counted,
            frames=frames,
            vision=vision,
            prefill=prefill,
            objects=np.array([object_cells(clip.owner).mean() for clip in known_clips]),
        )

    def cost(self, visual: Visual) -> tuple[int, int, int, int]:
        """Tokens, frames at the tower's end, and flops of the vision part and of the prefill (see `earlytom.flops`)."""
        config: Any = self.checkpoint.config
        family, tokens, inner = family_of(config), len(visual.tokens), visual.inner
        vision = family.vision_flops(config, visual.stages, visual.merge_layers)
        if visual.ran:
            frame, frames = family.geometry(config), visual.stages[0]
            whole = flops.vision_encoder(config.vision_config, frame.patches, visual.stages, (), frame.depth)
            vision += flops.merged_encoder(config.vision_config, frame.patches, frames, visual.ran) - whole
        inside: dict[str, Any] = {} if inner is None else {"inner_layer": inner.layer, "inner_ratio": inner.ratio}
        return tokens, visual.stages[-1], vision, flops.prefill(config.text_config, tokens, **inside)

    def _inside(
        self,
        tokens: Sequence[Tensor],
        questions: Sequence[Sequence[Question]],
        told: Sequence[Standing],
        inner: InnerSettings,
    ) -> list[list[Outcome]]:
        """Outcomes with inner merging, which depends on the question: each has a sequence of its own."""
        found = []
        with apply_inner(self.model.get_decoder(), *inner) as applied:
            for own, asked, standing in zip(tokens, questions, told, strict=True):
                packs = [self.scorer.pack([question]) for question in asked]
                outcomes = self.scorer.score([own] * len(packs), packs, [standing] * len(packs), applied)
                found.append([outcome for row in outcomes for outcome in row])
        return found

    def _same(self, outcomes: list[list[list[Outcome]]]) -> NDArray[np.bool_]:
        """[Q] bool, see `Answers.same`."""
        names = [setting.method.name for setting in self.settings]
        if ENGINE not in names:
            return np.zeros(0, np.bool_)
        rows = (outcomes[names.index(name)] for name in (ENGINE, TWIN))
        said = ([outcome.said for clip in row for outcome in clip] for row in rows)
        return np.array([mine == theirs for mine, theirs in zip(*said, strict=True)], np.bool_)


def task_checkpoint(source: str | None) -> Checkpoint:
    """The checkpoint, if the task's questions and clips fit it."""
    checkpoint = describe(source)
    if (apart := (family := checkpoint.family).in_pieces) is not None:
        raise UserError(
            f"--model {checkpoint.source}: the task's questions are packed for one span of visual tokens a video, and "
            f"{family.title} {apart}; use the bundled model, or see what methods keep with --coverage VIDEO"
        )
    height, width = checkpoint.preprocessing.size
    if (height, width) != (SIDE, SIDE):
        raise UserError(
            f"--model {checkpoint.source}: it takes frames of {height} x {width}, and the task's clips are {SIDE} x "
            f"{SIDE}; use the bundled model or one trained with python -m builder.micro.train, or see what methods "
            "keep with --coverage VIDEO"
        )
    return checkpoint


def run(
    job: EvaluationJob, clips: int, workers: int, progress: Callable[[int], None], bench: EvaluationBench | None = None
) -> Answers:
    """Measure the clips 0 to `clips` - 1.

    Args:
        workers: number of processes; 1: this process.
        progress: called with the number of clips measured so far.
        bench: the job's, if already loaded in this process.
    """
    chunks = [range(start, min(start + CLIPS_AT_ONCE, clips)) for start in range(0, clips, CLIPS_AT_ONCE)]
    parts: list[Answers] = []
    for part in _parts(job, chunks, min(workers, len(chunks)), bench):
        parts.append(part)
        progress(sum(part.tokens.shape[1] for part in parts))
    return Answers.joined(parts)


def _parts(
    job: EvaluationJob, chunks: Sequence[range], workers: int, bench: EvaluationBench | None
) -> Iterator[Answers]:
    if workers <= 1:
        yield from map((bench or EvaluationBench(job)).measure, chunks)
        return
    context = multiprocessing.get_context("spawn")  # a forked process cannot use the threads that torch has started
    with ProcessPoolExecutor(workers, context, initializer=_start, initargs=(job,)) as pool:
        try:
            yield from pool.map(_measure, chunks)
        except BrokenProcessPool as error:
            raise UserError(
                "a process of the measurement was killed, for want of memory perhaps: try --workers 1"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


_bench: EvaluationBench | None = None  # of a worker process


def _start(job: EvaluationJob) -> None:
    global _bench
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends a worker at once; the parent reports it
    parent = multiprocessing.parent_process()
    assert parent is not None
    end_with_parent(parent.sentinel)
    torch.set_num_threads(1)
    # NumPy's BLAS threads spin while they wait: with as many processes as cores, they block each other's cores, and
    # drawing a clip took a hundred times as long.
    threadpool_limits(1, "blas")
    _bench = EvaluationBench(job)


def _measure(indices: range) -> Answers:
    assert _bench is not None  # `_start` ran first
    return _bench.measure(indices)


def _digest(tensors: Sequence[Tensor | None]) -> bytes:
    """A digest of shapes and contents."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(f"{None if tensor is None else tuple(tensor.shape)}".encode())
        if tensor is not None:
            sha.update(tensor.contiguous().numpy().data)
    return sha.digest()
