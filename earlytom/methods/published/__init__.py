"""Published comparison methods, by name. Each module says where it departs from the publication.

Their base classes are in `compressing`. README.md of `earlytom.methods` says how to add one.
"""

from __future__ import annotations

from earlytom.methods.published.bvllm import BVLLMStyle
from earlytom.methods.published.compressing import Compressing
from earlytom.methods.published.dycoke import DyCoke
from earlytom.methods.published.evs import EVS
from earlytom.methods.published.fastv import FastV
from earlytom.methods.published.fastvid import FastVID
from earlytom.methods.published.flashvid import FlashVID
from earlytom.methods.published.holitom import HoliTom
from earlytom.methods.published.pooled import Pooled
from earlytom.methods.published.tempme import TempMe, ToMe
from earlytom.methods.published.unicomp import UniComp
from earlytom.methods.published.vidcom2 import VidCom2
from earlytom.methods.published.visionzip import VisionZip
from earlytom.methods.published.vqtoken import VQToken

PUBLISHED: dict[str, type[Compressing]] = {
    method.name: method
    for method in (
        HoliTom,
        VQToken,
        ToMe,
        TempMe,
        BVLLMStyle,
        VisionZip,
        FastVID,
        DyCoke,
        UniComp,
        FlashVID,
        Pooled,
        FastV,
        EVS,
        VidCom2,
    )
}
NEED_TRAINING: dict[str, str] = {
    "bvllm": "two Q-Formers and three projections, trained for another vision tower (earlytom.bvllm.path loads them); "
    "bvllm-style is an approximation without them",
    "vqtoken-attention": "VQ-attention, which has no released weights for this model (earlytom.vqtoken.attention loads "
    "them); vqtoken is the core that needs none",
    "tempme-trained": "adapters and temporal embeddings, trained for a CLIP tower (earlytom.tempme.clip loads them); "
    "tempme is the schedule that needs none",
}
"""Published methods that cannot run without trained modules: name to reason."""
