"""The ONNX body that says what tokens of a chain stand for does as `earlytom.standing`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from builder.export.standing import adaptive_standing
from builder.export.vision import OPSET
from earlytom.standing import frame_times, places, size_bias, token_sizes
from tests.builder.export.test_functions import FLOAT, INT64, call, run, value


@pytest.mark.parametrize("noise", [0.0, 2e-5, 2e-2])  # of the shares of copies: none, of rounding, and a difference
def test_tokens_stand_for_what_they_do_in_the_reference(noise: float) -> None:
    inputs = [value("features", FLOAT, 3, 4, 6), value("positions", INT64, 5), value("sources", FLOAT, 3, 6)]
    outputs = [value("place", INT64, 5), value("bias", FLOAT, 5)]
    model = call(adaptive_standing(per_frame=4, opset=OPSET), [*inputs, value("count", INT64, 1)], outputs, {})
    features = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(0))
    sources = torch.tensor(
        [[1.0, 0, 0, 0, 0, 0], [0, 1 / 3 - noise, 1 / 3, 1 / 3 + noise, 0, 0], [0, 0, 0, 0, 0.4, 0.6]]
    )
    positions, count = torch.tensor([0, 5, 6, 11, 3]), 4  # the last row is padding
    given = {"features": features, "positions": positions, "sources": sources, "count": torch.tensor([count])}
    place, bias = run(model, **{name: tensor.numpy() for name, tensor in given.items()})
    time, size = frame_times(sources)
    assert time[1] == (3 if noise > 1e-3 else 1)
    assert place[:count].tolist() == places(time, positions, 4)[:count].tolist()
    wanted = size_bias(token_sizes(features, positions[:count], time, size, 6))
    np.testing.assert_allclose(bias[:count], wanted.numpy(), atol=1e-6)
