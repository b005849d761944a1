"""Second and third stage: the decoder is trained to answer, with a frozen tower.

Half of a step's clips are new; the others are drawn from the last few thousand, whose visual tokens are cached, as the
tower is frozen. Clips of eight frames come first (short sequences, many clips), then clips of all sixteen. The decoder
always sees all visual tokens of a clip. Two measures help it:

* An auxiliary loss after layer `_MOTION_LAYER`: each visual token has to predict its time and its object's motion so
  far (`labels.cell_motion`), dense labels for what questions about time need. Without it accuracy on direction stayed
  at that of guessing along the right axis.
* Distances between neighbouring visual tokens' positions are sometimes below one, so that the decoder relies on the
  tokens' content and order rather than on exact distances, and generalises to clips of other lengths.
"""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor, nn
from torch.nn import functional

from builder.micro.labels import MOTION, cell_motion
from builder.micro.loop import Optimizer, Progress, Report, made_ahead
from builder.micro.packing import IGNORE, Pack, Packer, batch, logits
from builder.micro.see import normalised
from earlytom.families import DEFAULT_FAMILY
from earlytom.micro.data.questions import Question, questions
from earlytom.micro.data.scene import FRAMES, Scene
from earlytom.micro.data.splits import labelled_clip

_DRAWS, _QUESTIONS = 6, 12
_OFTEN = 4.0
_MOTION_LAYER = 1
_FLAGS = {"moving": 1.0, "recoloured": 8.0}  # columns of `MOTION` that are yes or no, with the weight of a yes


@dataclass(frozen=True)
class Stage:
    """The settings of one stage.

    Attributes:
        name: of its state file.
        seed: of its clips.
        steps, clips: number of steps, and of clips in each.
        frames: of a clip.
        rate: peak learning rate.
        kept: size of the cache of clips to repeat, which make half of each step.
        stretched: share of clips whose visual tokens are less than one position apart.
        often: kinds of questions asked more often than others.
    """

    name: str
    seed: int
    steps: int
    clips: int
    frames: int
    rate: float
    kept: int
    stretched: float
    often: tuple[str, ...]


@dataclass(frozen=True)
class Example:
    """A clip's frames uint8 [F, 3, 72, 72], or its visual tokens [N, E], with its questions.

    `motion` [N, 7]: `labels.cell_motion` of the visual tokens.
    """

    visual: Tensor
    pack: Pack
    kinds: tuple[str, ...]
    motion: Tensor


class ClipMaker:
    """The new clips of a step, made in a worker process."""

    def __init__(self, stage: Stage, packer: Packer) -> None:
        self.stage, self.packer = stage, packer
        self.fresh = stage.clips - stage.clips // 2

    def __call__(self, step: int) -> list[Example]:
        return [self._one(step * self.fresh + number) for number in range(self.fresh)]

    def _one(self, index: int) -> Example:
        random = np.random.default_rng([self.stage.seed, index, 2])
        times = choose_times(self.stage.frames, random)
        clip = labelled_clip("train", index, seed=self.stage.seed, times=times)
        asked = choose_questions(clip.scene, times, random, self.stage.often)
        pack = self.packer.pack([(question.text, question.answer) for question in asked])
        motion = torch.from_numpy(cell_motion(clip.scene, clip.owner, times)).flatten(0, 1)
        return Example(torch.from_numpy(clip.frames), pack, tuple(question.kind for question in asked), motion)


def choose_times(frames: int, random: Generator) -> np.ndarray:
    """One frame number out of each of `frames` equal stretches of the clip."""
    edges = np.arange(frames + 1) * FRAMES // frames
    return random.integers(edges[:-1], edges[1:])


def choose_questions(scene: Scene, times: np.ndarray, random: Generator, often: tuple[str, ...] = ()) -> list[Question]:
    """Up to `_QUESTIONS` distinct questions about a scene that the frames at `times` can answer, in random order.

    Kinds in `often` are more likely.
    """
    drawn = [questions(scene, random) for _ in range(_DRAWS)]
    # "exists": many draws have more distinct questions with the answer no, so only those of one draw.
    found = dict.fromkeys(
        question for draw in drawn for question in draw if question.kind != "exists" or draw is drawn[0]
    )
    asked = [question for question in found if _shown(question, scene, times)]
    # "count" has a single question, which others would crowd out.
    weight = np.array(
        [np.inf if question.kind == "count" else _OFTEN if question.kind in often else 1.0 for question in asked]
    )
    order = np.argsort(random.exponential(size=len(asked)) / weight)
    return [asked[i] for i in order[:_QUESTIONS]]


def _shown(question: Question, scene: Scene, times: np.ndarray) -> bool:
    spans = {"digit": [(shape.digit_first, shape.digit_last) for shape in scene.shapes if shape.digit is not None]}
    if scene.dot is not None:
        spans["dot"] = [(scene.dot.first, scene.dot.last)]
    if scene.cut is not None:
        both = [shape for shape in scene.shapes if shape.first < scene.cut < shape.last]
        spans["after"] = spans["changed"] = [
            span for shape in both for span in ((shape.first, scene.cut), (scene.cut, shape.last))
        ]
    return all(((first <= times) & (times < last)).any() for first, last in spans.get(question.kind, []))


def motion_head(model: Any) -> nn.Linear:
    """The head that predicts visual tokens' motion; shared by the stages, and dropped after the last."""
    return nn.Linear(model.config.text_config.hidden_size, len(MOTION)).to(model.device)


def train_answering(
    model: Any, head: nn.Linear, packer: Packer, stage: Stage, work: Path, report: Report, workers: int
) -> float:
    """Train one stage in place, resuming from its state in `work`. Returns the seconds of all steps."""
    torch.manual_seed(stage.seed)
    closing = nn.ParameterList([_closing(model)])
    optimizer = Optimizer([model.model.language_model, closing, head], stage.rate, stage.steps)
    modules, others = {"model": model, "head": head}, {"optimizer": optimizer}
    progress = Progress(work / f"{stage.name}.pt", modules, others, repr(stage), model.device)
    kept: deque[Example] = deque(maxlen=stage.kept)
    maker = ClipMaker(stage, packer)
    # A resumed run first makes the cached clips again.
    begin = max(0, progress.step - math.ceil(stage.kept / maker.fresh)) if progress.step < stage.steps else stage.steps
    for step, fresh in made_ahead(maker, begin, stage.steps, workers):
        random = np.random.default_rng([stage.seed, step, 3])
        examples = _with_tokens(model, fresh)
        kept.extend(examples)
        if step < progress.step:
            continue
        again = random.integers(len(kept), size=stage.clips - len(examples))
        examples = examples + [kept[i] for i in again]
        loss, right = answer_loss(model, head, packer, examples, _stretch(len(examples), stage.stretched, random))
        optimizer.step(loss, step)
        report(stage.name, step + 1, stage.steps, loss.detach(), right)
        progress.done(step + 1, stage.steps)
    return progress.seconds


def _stretch(count: int, part: float, random: Generator) -> Tensor:
    """[count] fp32: distance between neighbouring visual tokens; 1/8 to 1 for a share `part` of the clips, else 1."""
    shorter = np.exp(random.uniform(np.log(1 / 8), 0, count))
    return torch.from_numpy(np.where(random.random(count) < part, shorter, 1.0).astype(np.float32))


@torch.no_grad()
def _with_tokens(model: Any, examples: list[Example]) -> list[Example]:
    """The examples with visual tokens instead of frames, in fp16 to save memory."""
    frames = torch.cat([example.visual for example in examples]).to(model.device)
    tower, projector, _ = DEFAULT_FAMILY.modules(model.model)
    hidden = tower(pixel_values=normalised(frames), output_hidden_states=True).hidden_states[-1]
    tokens = DEFAULT_FAMILY.pool(projector(hidden)).half()
    shares = tokens.split([len(example.visual) for example in examples])
    return [replace(example, visual=share.flatten(0, 1)) for share, example in zip(shares, examples, strict=True)]


def _closing(model: Any) -> nn.Parameter:
    """The embedding of the closing token, [E]; it is trained, too."""
    closing = DEFAULT_FAMILY.closing(model.model)
    assert closing is not None
    return closing


def answer_loss(
    model: Any, head: nn.Linear, packer: Packer, examples: list[Example], stretch: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, cross entropy per question plus motion, and by kind the share of questions answered right, with the
    motion's loss as "motion".

    `head` predicts motion from the visual tokens' states after the decoder's layer `_MOTION_LAYER` (from 0).
    """
    closing = _closing(model)[None]
    visual = [torch.cat((example.visual.float(), closing)) for example in examples]
    packs = [example.pack for example in examples]
    sequences = batch(packer.prefix, visual, packs, model.get_input_embeddings(), stretch)
    answered = sequences.target != IGNORE
    states: list[Tensor] = []
    layer = model.model.language_model.layers[_MOTION_LAYER]
    hook = layer.register_forward_hook(lambda _module, _inputs, output: states.append(output))
    scores = logits(model, sequences, answered)
    hook.remove()
    told = torch.stack([example.motion for example in examples]).to(scores.device)  # [B, N, 7]
    lead = len(packer.prefix)
    motion = _motion_loss(head(states[0][:, lead : lead + told.shape[1]]), told)
    target = sequences.target[answered]
    answer = functional.cross_entropy(scores, target, reduction="sum") / sum(pack.questions for pack in packs)
    with torch.no_grad():
        wrong = torch.zeros_like(answered)
        wrong[answered] = scores.argmax(-1) != target
        right: dict[str, list[bool]] = {}
        for row, example in enumerate(examples):
            failed = set(sequences.block[row][wrong[row]].tolist())
            for number, kind in enumerate(example.kinds):
                right.setdefault(kind, []).append(number not in failed)
    rates = {kind: torch.tensor(hits).float().mean() for kind, hits in right.items()}
    return answer + motion, {**rates, "motion": motion.detach()}


def _motion_loss(scores: Tensor, told: Tensor) -> Tensor:
    """Sum over the columns of `MOTION` [..., 7] of their mean loss over known labels; scores of flags are logits.

    As few tokens show a recoloured object, these weigh more.
    """
    known = ~told.isnan()
    target = told.nan_to_num()
    flag = torch.tensor([name in _FLAGS for name in MOTION], device=told.device)
    rare = torch.tensor([_FLAGS.get(name, 1.0) for name in MOTION], device=told.device)
    yes_or_no = functional.binary_cross_entropy_with_logits(scores, target, reduction="none", pos_weight=rare)
    length = functional.smooth_l1_loss(scores, target, reduction="none", beta=0.2)
    error = torch.where(flag, yes_or_no, length) * known
    return (error.flatten(0, -2).sum(0) / known.flatten(0, -2).sum(0).clamp_min(1)).sum()
