"""The gate's steps and the limits of each precision. Numbers only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

# Largest difference of merge weights that two runtimes compute from equal similarities.
PLAN_TOLERANCE = 1e-4
# Likewise of `sources`, the product of all merges' weights.
SOURCES_TOLERANCE = 1e-3
# Limit of a video's error against its own reference, relative to that against another video's.
OTHER_VIDEO = 2.0
STEPS = ("hidden", "decisions", "tokens", "text")


@dataclass(frozen=True)
class Gate:
    """The limits of one precision.

    Attributes:
        cosine: least cosine of hidden states and tokens with the reference's.
        frames, tokens: least share of the reference's kept frames and tokens that the graph keeps, too.
        error: largest element-wise error of a token, in units of the reference tokens' root mean square.
        text: least share of next tokens that agree.
        bias: mean error of the tokens' bias (a logarithm); a token equally alike to two kept ones changes its owner
            by a rounding error.
        mean_of_clips: whether the shares (frames, tokens, text) are averaged over the clips; else the least counts.
    """

    cosine: float
    frames: float
    tokens: float
    error: float
    text: float
    bias: float
    mean_of_clips: bool = False

    def of_clips(self, shares: Sequence[float]) -> float:
        """The share to compare with its limit, from those of all clips."""
        return fmean(shares) if self.mean_of_clips else min(shares)


GATES = {
    "fp32": Gate(cosine=0.99999, frames=0.99, tokens=0.99, error=1e-3, text=0.99, bias=0.02),
    "fp16": Gate(cosine=0.999, frames=0.85, tokens=0.85, error=0.05, text=0.9, bias=0.1),
    "bf16": Gate(cosine=0.99, frames=0.7, tokens=0.7, error=0.3, text=0.8, bias=0.3),
    # For graphs with int8 products, whatever the dtype of the rest, measured on clips other than the calibration clips:
    # saturation changes single elements by more than the root mean square. Of nine such clips of the bundled model the
    # worst has a cosine of 0.9949 (cells, which keeps the tokens that are unlike others, at ratio 0.05). In 21 of 25
    # clips EarlyTom keeps the same frames as the reference; in the other 4, whose frames are nearly equal, 4 or 5 of 7.
    # builder/README.md has the cost in accuracy; shares are averaged, so that no single clip decides.
    "int8": Gate(cosine=0.99, frames=0.75, tokens=0.75, error=2.5, text=0.85, bias=0.2, mean_of_clips=True),
}
