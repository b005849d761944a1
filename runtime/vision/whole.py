"""An engine of a single graph: a clip, or a batch of videos, is encoded in one run.

Outputs are allocated and bound once. On a CPU frames are read in place. On a GPU they are copied to the engine's own
buffer, and `encode` returns before the run is done: work queued on the caller's stream finds the tokens ready. Before
the next call overwrites them, it waits, on the GPU, for the work queued on that stream.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from runtime.engine.layout import FRAMES, OUTPUTS
from runtime.vision.frames import batch_of, check_clips, check_frames
from runtime.vision.protocol import Encoded
from runtime.vision.runner import CallGuard, Runner


class Whole:
    """A `VisionBackend` of one graph; it owns the returned tensors.

    Attributes:
        shape: [F, 3, H, W] of its input frames; [B, F, 3, H, W] for B > 1 videos.
        batch: B.
        device: where it runs.
    """

    def __init__(self, runner: Runner) -> None:
        self.name = runner.name
        self.shape = runner.tensors[FRAMES][0]
        self.batch = batch_of(self.shape)
        self.runner = runner
        self._turn = CallGuard()
        self._lane = runner.lane(self.shape, kept=self.batch > 1)
        self.device = self._lane.device
        self._out = {
            name: torch.zeros(shape, dtype=dtype, device=self.device)
            for name, (shape, dtype) in runner.tensors.items()
            if name != FRAMES
        }
        runner.fix(self._out, self._lane)
        self._lane.warm_up(self.encode, self.shape)

    def encode(self, frames: Tensor) -> Encoded:
        """Visual tokens of frames uint8 [F, 3, H, W].

        All have a leading B where the graph takes several videos. They are valid until the next call, which writes
        over them.
        """
        check_frames(frames, self.shape)
        self._lane.check(frames)
        with self._turn():
            return self._run([frames])

    def encode_several(self, clips: Sequence[Tensor]) -> list[Encoded]:
        """Visual tokens of each of 1 to B clips uint8 [F, 3, H, W], in one run.

        A partial batch is filled with copies of the last clip. Devices, validity and errors as of `encode`.
        """
        check_clips(clips, self.shape)
        if self.batch == 1:
            return [self.encode(clips[0])]
        for clip in clips:
            self._lane.check(clip)
        filled = [*clips, *[clips[-1]] * (self.batch - len(clips))]
        with self._turn():
            return self._run(filled).each()[: len(clips)]

    def _run(self, clips: Sequence[Tensor]) -> Encoded:
        with self._lane.bringing(clips) as entering:
            self.runner.run({FRAMES: entering})
        encoded = Encoded(*(self._out[name] for name in OUTPUTS))
        self._lane.hand_over(encoded)
        return encoded

    def close(self) -> None:
        """Wait for the current run and free the graph; a second call does nothing. Returned tensors stay readable."""
        with self._turn.closing() as first:
            if first:
                self._lane.drain()
                self.runner.close()
                self._out = {}
