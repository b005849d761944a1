"""Which clips are for training, for choosing settings, and for testing.

A clip belongs to the split that a hash of its cast falls into (`scene.Cast.key`: the shapes with their colours, the
dot, the digit). The splits are therefore disjoint by construction: nobody who is seen in a test clip was ever seen in
the same company in training, whatever the seeds.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from earlytom.errors import UserError
from earlytom.micro.data.questions import Question, questions
from earlytom.micro.data.render import render
from earlytom.micro.data.scene import FRAMES, Cast, Scene, draw_cast, draw_scene

_BUCKETS = 16
SPLITS = {"test": range(0, 1), "validation": range(1, 2), "train": range(2, _BUCKETS)}
"""The splits, as the sixteenths of all casts that belong to each."""


@dataclass(frozen=True)
class LabelledClip:
    """One clip.

    Attributes:
        frames: [F', 3, 72, 72] uint8 RGB, the frames asked for.
        owner: [F', 72, 72] int8, whom a pixel belongs to: an index into `scene.shapes`, `render.DOT`, or
            `render.NOBODY`.
        scene: what happens in it.
        questions: what one can ask about it.
    """

    frames: NDArray[np.uint8]
    owner: NDArray[np.int8]
    scene: Scene
    questions: tuple[Question, ...]


def split_of(cast: Cast) -> str:
    """The split that clips with this cast belong to."""
    bucket = hashlib.sha256(cast.key().encode()).digest()[0] % _BUCKETS
    return next(name for name, buckets in SPLITS.items() if bucket in buckets)


def labelled_clip(
    split: str, index: int, *, seed: int = 0, times: NDArray[np.intp] | None = None, length: int = FRAMES
) -> LabelledClip:
    """Clip number `index` of a split; always the same one for the same seed.

    Args:
        split: a key of `SPLITS`.
        index: any number from 0.
        seed: draws other clips of the same split.
        times: which frames to draw; all by default. Their sensor noise depends on which they are, what happens in them
            does not.
        length: frames of the whole clip; another length is another clip.
    """
    scene, asked, random = draw(split, index, seed=seed, length=length)
    frames, owner = render(scene, random, np.arange(length) if times is None else times)
    return LabelledClip(frames, owner, scene, asked)


def draw(
    split: str, index: int, *, seed: int = 0, length: int = FRAMES
) -> tuple[Scene, tuple[Question, ...], Generator]:
    """The scene and the questions of that clip, and the generator that `render` would go on with to draw it.

    Raises as `labelled_clip`.
    """
    if split not in SPLITS:
        raise UserError(f"no split named {split!r}; expected one of {', '.join(SPLITS)}")
    if index < 0:
        raise UserError(f"a clip's index must be 0 or more, got {index}")
    if length < FRAMES:
        raise UserError(f"a clip has {FRAMES} frames or more, got {length}; draw some of them with times")
    random = np.random.Generator(np.random.PCG64([seed, list(SPLITS).index(split), index]))
    cast = draw_cast(random, lambda cast: split_of(cast) == split)
    while True:
        scene = draw_scene(cast, random, length)
        asked = questions(scene, random)
        if asked:  # a very few scenes leave nothing certain to ask about
            return scene, asked, random
