"""As much of Ray as `runtime.serve.ray` needs to be imported where Ray is not, for what it does without it."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

NAMES = ("ray", "ray.exceptions", "ray.serve", "ray.serve.config", "ray.serve.exceptions")


class RayError(Exception):
    pass


class RayActorError(RayError):
    pass


class BackPressureError(Exception):
    def __init__(self, queued: int = 0, most: int = 0) -> None:
        super().__init__(queued, most)


class DeploymentUnavailableError(Exception):
    pass


def imported(patch: pytest.MonkeyPatch) -> Any:
    """`runtime.serve.ray`, with Ray's own classes where Ray is."""
    if importlib.util.find_spec("ray") is None:
        modules = {name: ModuleType(name) for name in NAMES}
        modules["ray.exceptions"].__dict__.update(RayError=RayError, RayActorError=RayActorError)
        modules["ray.serve.exceptions"].__dict__.update(
            BackPressureError=BackPressureError, DeploymentUnavailableError=DeploymentUnavailableError
        )
        modules["ray.serve.config"].__dict__.update(RequestRouterConfig=object)
        modules["ray.serve"].__dict__.update(Application=object)
        modules["ray"].__dict__.update(ObjectRef=object, serve=modules["ray.serve"])
        for name, module in modules.items():
            patch.setitem(sys.modules, name, module)
        patch.delitem(sys.modules, "runtime.serve.ray", raising=False)
    found = importlib.import_module("runtime.serve.ray")
    patch.setitem(sys.modules, "runtime.serve.ray", found)
    patch.setattr(found.ray, "put", lambda clip: clip, raising=False)
    return found
