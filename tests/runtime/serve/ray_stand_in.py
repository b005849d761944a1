"""As much of Ray as `runtime.serve.replicas.front` needs to be imported where Ray is not, for what it does without."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from types import ModuleType
from typing import Any

import pytest

NAMES = ("ray", "ray.exceptions", "ray.serve", "ray.serve.config", "ray.serve.exceptions")
OURS = ("runtime.serve.replicas.front", "runtime.serve.replicas.shipped")


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
    """`runtime.serve.replicas.front`, with Ray's own classes where Ray is."""
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
        for name in OURS:
            patch.delitem(sys.modules, name, raising=False)
    found = importlib.import_module(OURS[0])
    for name in OURS:
        patch.setitem(sys.modules, name, sys.modules[name])
    patch.setattr(found.ray, "put", lambda clip: clip, raising=False)
    return found
