"""EarlyTom: early token compression for video language models (training-free), in PyTorch.

    from earlytom import EarlyTomConfig, apply_earlytom
    with apply_earlytom(model, EarlyTomConfig.preset("videomme", 0.20)):
        model.generate(**inputs)

The method: *EarlyTom: Early Token Compression Completes Fast Video Understanding* (CVPR 2026, arXiv 2605.30010).
"""

from earlytom.budget import frames_per_stage, token_count
from earlytom.config import EarlyTomConfig
from earlytom.encoder import VisualTokens
from earlytom.errors import UserError
from earlytom.inner_decoder import apply_inner
from earlytom.merge import FramePlan, plan_frames, segment_frames
from earlytom.model import apply_earlytom, encode_video
from earlytom.select import select_tokens

__all__ = [
    "EarlyTomConfig",
    "FramePlan",
    "UserError",
    "VisualTokens",
    "apply_earlytom",
    "apply_inner",
    "encode_video",
    "frames_per_stage",
    "plan_frames",
    "segment_frames",
    "select_tokens",
    "token_count",
]
