"""Methods by name. A method decides which frames and which tokens of a video the LLM sees.

`earlytom.method.Method` documents the interface and when its hooks are called. A new method is a module here and its
class in `METHODS` or `published.PUBLISHED`; README.md here shows one. To be built into an engine it also needs its
steps in ONNX, see `builder.export.vision.FORMS`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.method import Method
from earlytom.methods.cells import Cells, EachCells
from earlytom.methods.controls import EvenFrames, Pooling, RandomTokens, TopK
from earlytom.methods.earlytom import EachVideo, EarlyTom
from earlytom.methods.published import NEED_TRAINING, PUBLISHED
from earlytom.settings import MethodSettings
from earlytom.untouched import UntouchedConfig

_OWN: tuple[type[Method], ...] = (EarlyTom, Cells, RandomTokens, EvenFrames, TopK, Pooling)
METHODS: dict[str, type[Method]] = {method.name: method for method in _OWN} | dict(PUBLISHED)
"""All methods by name."""


def by_name(name: str, settings: Mapping[str, Any]) -> Method:
    """The method `name` with its settings as `Method.to_dict` gives them.

    Raises:
        UserError: an unknown method, one that needs trained modules, or an unknown or invalid setting.
    """
    if name in NEED_TRAINING:
        raise UserError(f"method {name!r} needs trained modules: {NEED_TRAINING[name]}")
    if name not in METHODS:
        raise UserError(f"no method named {name!r}: choose one of {', '.join(METHODS)}")
    return METHODS[name].from_dict(settings)


def method_of(config: MethodSettings | Method) -> Method:
    """The method that belongs to some settings; a method is returned as it is."""
    if isinstance(config, Method):
        return config
    if isinstance(config, UntouchedConfig):
        return PUBLISHED[config.method].from_dict(config.to_dict())
    return EarlyTom(config) if isinstance(config, EarlyTomConfig) else Cells(config)


def several(method: Method, videos: int) -> Method:
    """A method that applies `method` to each of several videos at once. Raises UserError if there is none."""
    if isinstance(method, EarlyTom):
        return EachVideo(method, videos)
    if isinstance(method, Cells):
        return EachCells(method, videos)
    raise UserError(f"method {method.name!r} decides about one video at a time: leave out --batch")
