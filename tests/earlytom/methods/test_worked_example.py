"""The example of earlytom/methods/README.md is a method: it is run as it stands there."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from earlytom import UserError, apply_earlytom, encode_video
from earlytom.method import Method
from earlytom.methods import METHODS, by_name
from tests.earlytom.tiny import made_video, tiny_llava, tiny_projector, tiny_tower, video_prompt

README = Path(__file__).parents[3] / "earlytom" / "methods" / "README.md"
F, P = 8, 9


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> type[Method]:
    (source,) = re.findall(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert source.count("\n") <= 50
    module: Any = ModuleType("evenly")
    monkeypatch.setitem(sys.modules, "evenly", module)  # where a dataclass looks its annotations up
    exec(compile(source, str(README), "exec"), vars(module))
    method: type[Method] = module.Evenly
    monkeypatch.setitem(METHODS, method.name, method)
    return method


@pytest.mark.parametrize("ratio", [0.1, 0.3, 1.0])
def test_the_example_works(example: type[Method], ratio: float) -> None:
    method = by_name("evenly", {"retention_ratio": ratio, "first": 2})
    assert isinstance(method, example)
    assert by_name("evenly", method.to_dict()) == method
    out = encode_video(tiny_tower("siglip"), tiny_projector(), made_video("noise", F), method)
    counts = method.counts(F, P)
    assert counts is not None
    assert (out.frames_per_stage, len(out.tokens)) == (counts.stages, counts.tokens)
    assert out.positions.tolist() == sorted(set(out.positions.tolist()))
    if ratio < 1:
        other = by_name("evenly", {"retention_ratio": ratio})  # negative control: the setting matters
        again = encode_video(tiny_tower("siglip"), tiny_projector(), made_video("noise", F), other)
        assert not torch.equal(again.positions, out.positions)


def test_the_example_generates_and_refuses(example: type[Method]) -> None:
    model: Any = tiny_llava()
    with apply_earlytom(model, by_name("evenly", {"retention_ratio": 0.3})):
        out = model.generate(
            input_ids=video_prompt(F),
            pixel_values_videos=made_video("scenes", F)[None],
            max_new_tokens=2,
            do_sample=False,
        )
    assert out.shape[1] == video_prompt(F).shape[1] + 2
    with pytest.raises(UserError, match="first must be a whole number of at least 0, got -1"):
        by_name("evenly", {"first": -1})
    with pytest.raises(UserError, match="unknown setting 'last'"):
        by_name("evenly", {"last": 1})
