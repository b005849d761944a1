"""The loop of the first stage: see `perception`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor

from builder.micro.labels import frame_labels
from builder.micro.loop import Optimizer, Progress, Report, made_ahead
from builder.micro.perception import PerceptionHeads, perception_loss, word_embeddings
from earlytom.families import DEFAULT_FAMILY
from earlytom.micro.data.render import render
from earlytom.micro.data.scene import DIGIT_SHAPES, DIGITS, FRAMES, Scene, Shape, casts_of
from earlytom.micro.data.splits import draw, split_of

NAME = "perception"
CLIPS, FRAMES_A_CLIP = 16, 4
RATE = 1e-3
_SEED = 1


def make_batch(step: int) -> dict[str, Tensor]:
    """The frames and labels of one step: `FRAMES_A_CLIP` frames of each of `CLIPS` clips."""
    random = np.random.default_rng([step, _SEED])
    frames, labels = [], []
    for index in range(step * CLIPS, (step + 1) * CLIPS):
        times = np.sort(random.choice(FRAMES, FRAMES_A_CLIP, replace=False))
        drawn, _, noise = draw("train", index, seed=_SEED)
        scene = with_more_digits(drawn, random)
        pixels, owner = render(scene, noise, times)
        frames.append(pixels)
        labels.append(vars(frame_labels(scene, owner, times)))
    batch = {name: torch.from_numpy(np.concatenate([one[name] for one in labels])) for name in labels[0]}
    batch["frames"] = torch.from_numpy(np.concatenate(frames))
    return batch


def with_more_digits(scene: Scene, random: Generator) -> Scene:
    """The scene with a digit on most shapes that can carry one, for all their time, as digits are hardest to learn."""

    def wear(shape: Shape) -> Shape:
        if shape.shape not in DIGIT_SHAPES or random.random() < 0.3:
            return shape
        return replace(shape, digit=int(random.choice(DIGITS)), digit_first=shape.first, digit_last=shape.last)

    dressed = replace(scene, shapes=tuple(wear(shape) for shape in scene.shapes))
    return dressed if all(split_of(cast) == "train" for cast in casts_of(dressed)) else scene


def normalised(frames: Tensor) -> Tensor:
    """uint8 frames to pixels from -1 to 1, as in the model's preprocessing."""
    return frames.float() / 127.5 - 1


def train_perception(model: Any, tokenizer: Any, steps: int, work: Path, report: Report, workers: int) -> float:
    """Train tower, projector and word embeddings in place, resuming from the state in `work`.

    Returns the seconds of all steps.
    """
    torch.manual_seed(_SEED)
    device = model.device
    tower, projector, _ = DEFAULT_FAMILY.modules(model.model)
    heads = PerceptionHeads(model.config.vision_config.hidden_size, model.config.text_config.hidden_size).to(device)
    embeddings = model.get_input_embeddings()
    parts = {"tower": tower, "projector": projector, "embeddings": embeddings, "heads": heads}
    optimizer = Optimizer(parts.values(), RATE, steps)
    progress = Progress(work / f"{NAME}.pt", parts, {"optimizer": optimizer}, f"{NAME} {steps}", device)
    for step, made in made_ahead(make_batch, progress.step, steps, workers):
        labels = {name: tensor.to(device) for name, tensor in made.items()}
        pixels = normalised(labels.pop("frames"))
        hidden = tower(pixel_values=pixels, output_hidden_states=True).hidden_states[-1]
        words = word_embeddings(model, tokenizer)
        loss, right = perception_loss(hidden, projector(hidden), words, heads, pixels, labels)
        optimizer.step(loss, step)
        report(NAME, step + 1, steps, loss.detach(), right)
        progress.done(step + 1, steps)
    return progress.seconds
