"""Model families, by the `model_type` of their configurations. A new one is a module here and a line in `FAMILIES`."""

from __future__ import annotations

from typing import Any

from earlytom.errors import UserError
from earlytom.families.family import Family, Features, Geometry, Vision
from earlytom.families.llava_onevision import LLAVA_ONEVISION

__all__ = ["FAMILIES", "LLAVA_ONEVISION", "Family", "Features", "Geometry", "Vision", "family_of", "geometry"]

FAMILIES: dict[str, Family] = {family.model_type: family for family in (LLAVA_ONEVISION,)}
"""The supported families by model type."""


def family_of(config: Any) -> Family:
    """The family of a Hugging Face configuration.

    Raises:
        UserError: it is not supported.
    """
    model_type = getattr(config, "model_type", None)
    if model_type not in FAMILIES:
        raise UserError(f"model family {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return FAMILIES[model_type]


def geometry(config: Any) -> Geometry:
    """Frames of the model that `config` describes. Raises UserError as `family_of` and `Family.geometry` do."""
    return family_of(config).geometry(config)
