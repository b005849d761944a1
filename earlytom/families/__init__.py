"""Model families, by the `model_type` of their configurations. A new one is a module here and a line in `FAMILIES`.

All that is specific to a family is in its module, its checkpoints' configurations in `published` and `bundled`; all
other code goes through `Family`.
"""

from __future__ import annotations

from typing import Any

from earlytom.errors import UserError
from earlytom.families.closings import Closings
from earlytom.families.family import SIZES, Family, ShortPrompt
from earlytom.families.frames import FrameSampling, FrameTimes, Geometry
from earlytom.families.internvl import INTERNVL
from earlytom.families.llava_next_video import LLAVA_NEXT_VIDEO
from earlytom.families.llava_onevision import LLAVA_ONEVISION
from earlytom.families.llava_video import LLAVA_VIDEO
from earlytom.families.qwen2_5_vl import QWEN2_5_VL
from earlytom.families.qwen3_5 import QWEN3_5
from earlytom.families.qwen3_vl import QWEN3_VL
from earlytom.families.smolvlm import SMOLVLM
from earlytom.families.vision import Features, Vision, VisionModules

__all__ = [
    "DEFAULT_FAMILY",
    "FAMILIES",
    "LLAVA_ONEVISION",
    "NAMED",
    "SIZES",
    "TITLES",
    "Closings",
    "Family",
    "Features",
    "FrameSampling",
    "FrameTimes",
    "Geometry",
    "ShortPrompt",
    "Vision",
    "VisionModules",
    "family_named",
    "family_of",
    "geometry",
]

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (LLAVA_ONEVISION, INTERNVL, LLAVA_NEXT_VIDEO, LLAVA_VIDEO, SMOLVLM, QWEN2_5_VL, QWEN3_VL, QWEN3_5)
}
"""The supported families by model type."""

NAMED: dict[str, Family] = {form.name: form for family in FAMILIES.values() for form in family.forms}
"""Every form (variant) of the families, by its name."""
DEFAULT_FAMILY: Family = LLAVA_ONEVISION
"""The family of modules given without a configuration, and of the bundled checkpoint."""
TITLES = " or ".join(family.title for family in FAMILIES.values())
"""The families' usual names, for messages."""


def family_of(config: Any) -> Family:
    """The family of a Hugging Face configuration. Raises UserError if it is not supported."""
    return family_named(getattr(config, "model_type", None)).of(config)


def family_named(name: object) -> Family:
    """A family by its model type, or a form by its name. Raises UserError if it is not supported."""
    if not isinstance(name, str) or name not in FAMILIES | NAMED:
        raise UserError(f"model family {name!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[name] if name in FAMILIES else NAMED[name]


def geometry(config: Any) -> Geometry:
    """The frame geometry of a configuration's model. Raises UserError as `family_of` and `Family.geometry`."""
    return family_of(config).geometry(config)
