"""The model that most checkpoint folders of these tests hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from earlytom.micro.random_model import random_model
from tests.runtime.checkpoint.tiny_checkpoint import tiny_config


@pytest.fixture(scope="module")
def original() -> Any:
    return random_model(tiny_config(), torch.float32, seed=5)
