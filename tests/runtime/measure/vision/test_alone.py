"""Vision parts alone: in turns, without a model in memory, held against both peaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch

from runtime import bench, cli
from runtime.checkpoint import describe
from runtime.engine.manifest import Manifest
from runtime.measure import variants
from runtime.measure.vision import alone as vision_alone

pytestmark = pytest.mark.usefixtures("one_thread")


def test_the_command_loads_no_model(
    capsys: pytest.CaptureFixture[str], bundled_engine: Path, drawn_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(variants, "load_model", refuse)
    words = ["--vision-only", "--engine", str(bundled_engine), "--video", str(drawn_clip)]
    assert cli.run(bench.main, [*words, "--warmup", "1", "--repeats", "2"]) == 0
    out, err = capsys.readouterr()
    assert not err
    *shown, last = out.splitlines()
    got = json.loads(last)
    (one,) = got["engines"]
    assert one["name"] == "onnxruntime fp16 r0.3"
    assert one["rate"] == pytest.approx(one["flops"] / one["seconds"]["p50"])
    assert one["of_peak"] == pytest.approx(one["rate"] / got["matmul"])
    assert got["integer_matmul"] is one["of_integer_peak"] is None  # nothing of it is int8
    assert "of integer peak" in "\n".join(shown)


def test_an_int8_engine_is_held_against_the_integer_peak(bundled_engine: Path) -> None:
    plain = Manifest.read(bundled_engine)
    given = (describe(), plain, "onnxruntime", [1.0, 2.0, 3.0], 1e9, 4e9)
    assert vision_alone.engine_record(*given)["of_integer_peak"] is None
    narrow = msgspec.structs.replace(plain, int8=("fc1:0",))
    got = vision_alone.engine_record(given[0], narrow, *given[2:])
    assert got["seconds"]["p50"] == 2.0
    assert got["of_peak"] == got["flops"] / 2.0 / 1e9
    assert got["of_integer_peak"] == got["flops"] / 2.0 / 4e9


def test_who_begins_changes_and_the_warm_up_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Named:
        device = torch.device("cpu")

    visions: list[Any] = [Named(), Named()]
    ran: list[int] = []
    monkeypatch.setattr(vision_alone, "encode_one", lambda vision, frames: ran.append(visions.index(vision)))
    found = vision_alone.in_turns(visions, torch.zeros(1), warmup=1, repeats=2)
    assert ran == [0, 1, 1, 0, 0, 1]
    assert [len(one) for one in found] == [2, 2]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ((), "--vision-only measures engines and none is named: give --engine"),
        (("--engine", "no-such", "--plot", "plots"), "nothing else: leave out --plot"),
        (("--engine", "no-such", "--service"), "leave out --service"),
    ],
)
def test_what_does_not_go_with_it_is_refused(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], says: str
) -> None:
    assert cli.run(bench.main, ["--vision-only", *words]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert says in err
    assert err.count("\n") == 1
