"""What a graph must reach to pass the gate: the steps and the limits of each precision. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

# Of weights computed from equal similarities by two runtimes.
PLAN_TOLERANCE = 1e-4
# Of their products over all merges.
SOURCES_TOLERANCE = 1e-3
# How much nearer to another video's similarities than to its own is too near.
OTHER_VIDEO = 2.0
STEPS = ("hidden", "decisions", "tokens", "text")


@dataclass(frozen=True)
class Gate:
    """What a graph of one precision must reach.

    Attributes:
        cosine: of hidden states and tokens with the reference's, at least.
        frames, tokens: share of the reference's kept frames and tokens that the graph keeps too, at least.
        error: largest element-wise error of a token, in units of the reference tokens' root mean square.
        text: share of next tokens that agree, at least.
        bias: mean error of what tokens stand for, in logarithms; tokens that are as much alike to one as to another
            change sides for a rounding error.
        mean_of_clips: whether the shares (frames, tokens, text) are the mean of the clips; else the least of any.
    """

    cosine: float
    frames: float
    tokens: float
    error: float
    text: float
    bias: float
    mean_of_clips: bool = False

    def of_clips(self, shares: Sequence[float]) -> float:
        """The share that is held against its limit, of those of all clips."""
        return fmean(shares) if self.mean_of_clips else min(shares)


GATES = {
    "fp32": Gate(cosine=0.99999, frames=0.99, tokens=0.99, error=1e-3, text=0.99, bias=0.02),
    "fp16": Gate(cosine=0.999, frames=0.85, tokens=0.85, error=0.05, text=0.9, bias=0.1),
    "bf16": Gate(cosine=0.99, frames=0.7, tokens=0.7, error=0.3, text=0.8, bias=0.3),
    # Of a graph with products in int8, whatever the rest is in, on clips that the scales do not come from: what is cut
    # off there changes single elements by more than their root mean square. Of nine such clips of the bundled model the
    # worst has a cosine of 0.9949 (cells, which keeps the tokens that are unlike others, at ratio 0.05). Of 25 of them
    # EarlyTom keeps the reference's own frames in 21; in the others, whose frames are nearly equal, 4 or 5 of 7. What
    # that costs of accuracy says builder/README.md; no clip by itself decides.
    "int8": Gate(cosine=0.99, frames=0.75, tokens=0.75, error=2.5, text=0.85, bias=0.2, mean_of_clips=True),
}
