"""The drift table: small where the graph is the model, and it names the place where it is not."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor

from builder import verify
from builder.export.vision import export_onnx, vision_graph
from builder.gate import drift
from builder.gate.drift import Tap, first_bad, measure
from builder.gate.rules import ForcedDecisions
from builder.gate.runs import run_tapped
from builder.settings.arguments import parse
from earlytom.errors import UserError
from runtime.engine import layout
from runtime.engine.dtypes import DTYPES
from runtime.engine.manifest import Manifest
from runtime.errors import EngineError
from tests.builder.conftest import FRAMES, SMALL, TAU, Exported
from tests.builder.gate.test_accuracy import scale_weight
from tests.builder.precision.stress import stress_checkpoint

Make = Callable[..., Exported]
LAYERS = [f"hidden_{layer}" for layer in range(SMALL[0])]
TAPS = [*LAYERS, "projected", "features", "relevance", "tokens"]


@pytest.fixture
def clip(clips: dict[str, Tensor]) -> Tensor:
    return clips["drawn0.mp4"]


def scaled(made: Exported, weight: str, factor: float, place: Path) -> Path:
    """A copy of the graph in which one weight is off; `weight` is the end of its name."""
    model = onnx.load(str(made.path))
    scale_weight(weight, factor)(model)
    onnx.save(model, str(place / layout.ONNX_FILE))
    return place / layout.ONNX_FILE


@pytest.mark.parametrize(("dtype", "cosine"), [("fp32", 1 - 1e-9), ("fp16", 0.99999), ("bf16", 0.999)])
def test_an_honest_graph_stays_close_everywhere(exported: Make, clip: Tensor, dtype: str, cosine: float) -> None:
    made = exported("--ratio", "0.3", f"--{dtype}")
    written = made.path.read_bytes()
    taps = measure(made.path, made.reference, clip, dtype)
    assert [tap.name for tap in taps] == TAPS
    assert all(tap.cosine > cosine and tap.nonfinite == 0 for tap in taps), taps
    assert first_bad(taps, dtype) is None
    limit = float(torch.finfo(DTYPES[dtype]).max)
    for tap in taps:
        assert tap.share == pytest.approx(max(map(abs, tap.graph)) / limit)
        assert tap.graph == pytest.approx(tap.reference, abs=0.05 * max(map(abs, tap.reference)))
    # Nothing is left behind, neither in the folder nor in the reference.
    assert [path.name for path in made.path.parent.iterdir()] == [layout.ONNX_FILE]
    assert made.path.read_bytes() == written
    assert not made.reference.every_layer


def test_the_figures_are_what_they_say(exported: Make, clip: Tensor) -> None:
    """Against the definitions, on the tokens of an fp16 graph."""
    made = exported("--ratio", "0.3", "--fp16")
    tap = measure(made.path, made.reference, clip, "fp16")[-1]
    names = ["tokens", "positions", "static", *(f"weights_{layer}" for layer in (1, 2))]
    feeds = [{layout.FRAMES: clip.numpy()}]
    got = run_tapped(made.path, names, feeds, rounded=True)[0][1][0]
    made.reference.decisions = ForcedDecisions(made.reference.config, {name: got[name] for name in names})
    wanted = made.reference(clip)["tokens"].double().numpy()
    tokens = np.asarray(got["tokens"], np.float64)
    assert tap.cosine == pytest.approx(np.sum(tokens * wanted) / np.sqrt(np.sum(tokens**2) * np.sum(wanted**2)))
    assert tap.max_error == pytest.approx(np.abs(tokens - wanted).max())
    assert tap.reference == pytest.approx((wanted.min(), wanted.max()))
    each = np.sqrt(np.mean((tokens - wanted) ** 2, axis=0)) / wanted.std(axis=0)
    assert tap.channel_error == pytest.approx(np.median(each))


@pytest.mark.parametrize(
    ("weight", "factor", "first"),
    [
        ("layers.0.layer_norm1.weight", 1.3, "hidden_0"),
        ("layers.3.mlp.fc2.bias", 30.0, "hidden_3"),
        ("projector.linear_1.bias", 3.0, "projected"),
    ],
)
def test_the_first_tap_off_is_where_the_weight_is(
    exported: Make, clip: Tensor, tmp_path: Path, weight: str, factor: float, first: str
) -> None:
    made = exported("--ratio", "0.3", "--fp16")
    taps = measure(scaled(made, weight, factor, tmp_path), made.reference, clip, "fp16")
    bad = first_bad(taps, "fp16")
    assert bad is not None
    assert bad.name == first


def test_nan_is_counted_and_written_as_null(exported: Make, clip: Tensor, tmp_path: Path) -> None:
    made = exported("--ratio", "0.3", "--fp16")
    taps = measure(scaled(made, "layers.3.mlp.fc2.bias", math.nan, tmp_path), made.reference, clip, "fp16")
    bad = first_bad(taps, "fp16")
    assert bad is not None
    assert bad.name == "hidden_3"
    record = json.loads(json.dumps(bad.to_dict(), allow_nan=False))
    assert record["cosine"] is record["channel_error"] is record["max_error"] is None
    assert record["nonfinite"] == 7 * 81 * 128  # [F', S, D]
    assert taps[2].nonfinite == 0


def test_one_large_channel_does_not_hide_the_others() -> None:
    good = {"name": "hidden_0", "cosine": 1.0, "max_error": 1.0, "reference": (0.0, 1.0), "graph": (0.0, 1.0)}
    taps = [Tap(**good, channel_error=error, share=0.1, nonfinite=0) for error in (0.01, 0.5)]  # type: ignore[arg-type]
    assert first_bad(taps, "fp16") is taps[1]
    assert first_bad(taps[:1], "fp16") is None


def stressed(source: Path, folder: Path, islands: str, **how: float) -> Callable[[Tensor], list[Tap]]:
    """Taps of a stress checkpoint exported with `islands`."""
    checkpoint = folder / "checkpoint"
    if not checkpoint.is_dir():
        stress_checkpoint(source, checkpoint, **how)
    words = ["--model", str(checkpoint), "--frames", str(FRAMES), "--tau", TAU, "--ratio", "0.3", "--backend", "onnx"]
    _, config, _ = parse([*words, "--islands", islands])
    place = folder / str(len(list(folder.iterdir())))
    place.mkdir()
    graph = vision_graph(config, torch.float16)
    exported = export_onnx(graph, FRAMES, (72, 72), place / layout.ONNX_FILE)
    reference = vision_graph(config, torch.float32)
    return lambda clip: measure(exported.path, reference, clip, "fp16")


def test_the_table_leads_to_the_islands_that_mend_a_loss_of_digits(
    small_checkpoint: Path, clip: Tensor, tmp_path: Path
) -> None:
    """A mean a thousand times the rest, within the range of half. The cosine of the first layer does not show it."""
    how = {"stream": 2.0**5, "mean": 1000.0}
    taps = stressed(small_checkpoint, tmp_path, "default", **how)(clip)
    bad = first_bad(taps, "fp16")
    assert bad is taps[0]
    assert bad.cosine > 0.9999
    assert taps[1].cosine < 0.95
    # Embeddings and stream in fp32, the first layer is good; the MLP that takes the mean out again still rounds it.
    taps = stressed(small_checkpoint, tmp_path, "default,residual,embeddings,mlp:1", **how)(clip)
    assert first_bad(taps, "fp16") is None, taps
    assert min(tap.cosine for tap in taps) > 0.9999


def test_the_table_leads_to_the_islands_that_mend_an_overflow(
    small_checkpoint: Path, clip: Tensor, tmp_path: Path
) -> None:
    how = {"stream": 2.0**13, "mean": 0.0}
    taps = stressed(small_checkpoint, tmp_path, "default", **how)(clip)
    assert taps[0].nonfinite > 0
    assert taps[-1].nonfinite > 0
    assert max(map(abs, taps[3].reference)) > torch.finfo(torch.float16).max
    taps = stressed(small_checkpoint, tmp_path, "default,residual,mlp,projector", **how)(clip)
    assert first_bad(taps, "fp16") is None, taps
    assert max(tap.share for tap in taps) > 1


# ------------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_a_table(engine: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(path.name for path in engine.iterdir())
    assert verify.main([str(engine), "--layers"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "the frames that it was verified on" in lines[0]
    assert "cosine" in lines[1]
    assert [line.split()[0] for line in lines[2 : 2 + len(TAPS)]] == TAPS
    assert all("%" in line and " .. " in line for line in lines[2 : 2 + len(TAPS)])
    assert "at every tap the cosine is at least 0.999" in lines[-2]
    record = json.loads(lines[-1])
    assert [tap["tap"] for tap in record["taps"]] == TAPS
    assert record["first_bad"] is None
    assert sorted(path.name for path in engine.iterdir()) == before
    Manifest.read(engine)


def test_json_alone_and_a_clip_of_ones_own(
    engine: Path, videos: tuple[Path, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify.main([str(engine), "--layers", "--json", "--video", str(videos[1])]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["clip"] == str(videos[1])
    assert min(tap["cosine"] for tap in record["taps"]) > 0.999


def test_an_unverified_engine_is_measured_on_a_drawn_clip(engine: Path, tmp_path: Path) -> None:
    frames, what = drift.frames_for(tmp_path, Manifest.read(engine))  # a folder without saved inputs
    assert what == "a drawn clip"
    assert tuple(frames.shape) == (FRAMES, 3, 72, 72)
    assert frames.float().std() > 10


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{}",
        b"[]",
        b"[1, 2]",
        b'[{"frames": 3}]',
        b"[" * 5000,
        b"\xff\xfe",
        b'[{"frames": {"array": "bm90IG51bXB5", "polygraphy_class": "ndarray"}}]',
        b"[" + b"[]," * 4_000_000 + b"[]]",
    ],
)
def test_saved_frames_that_are_none_are_one_line(
    engine: Path, tmp_path: Path, content: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / layout.REFERENCE_INPUTS_FILE).write_bytes(content)
    with pytest.raises(EngineError, match=r"holds no frames uint8 \[\d+, 3, 72, 72\]") as caught:
        drift.frames_for(tmp_path, Manifest.read(engine))
    assert len(str(caught.value)) < 600
    assert capsys.readouterr() == ("", "")


def test_saved_frames_that_are_a_pipe_are_not_waited_for(engine: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(EngineError, match="no plain file"):
        drift._saved_frames(tmp_path / "pipe", (1, 3, 2, 2))


def test_a_graph_for_looking_at_values_is_cleared_if_its_writer_was_killed(exported: Make, clip: Tensor) -> None:
    made = exported("--ratio", "0.3", "--fp16")
    (made.path.parent / f".{made.path.name}.12ab.partial").touch()
    measure(made.path, made.reference, clip, "fp16")
    assert not [path for path in made.path.parent.iterdir() if path.name.startswith(".")]


def test_what_cannot_be_done_is_one_line(engine: Path, tmp_path: Path, talkative: Path) -> None:
    with pytest.raises(UserError, match="--polygraphy DIR or --layers"):
        verify.main([str(engine)])
    with pytest.raises(UserError, match=r"is not the checkpoint that .* was built from.*--model"):
        verify.main([str(engine), "--layers", "--model", str(talkative)])
    with pytest.raises(UserError, match="no engine folder"):
        verify.main([str(tmp_path), "--layers"])
    missing = tmp_path / "missing.mp4"
    with pytest.raises(UserError, match=r"missing\.mp4"):
        verify.main([str(engine), "--layers", "--video", str(missing)])


def test_a_graph_without_names_is_one_of_another_version(exported: Make, clip: Tensor, tmp_path: Path) -> None:
    made = exported("--ratio", "0.3", "--fp16")
    model = onnx.load(str(made.path))
    for node in model.graph.node:
        for names in (node.input, node.output):
            names[:] = ["add_9" if name == "hidden_0" else name for name in names]
    for value in model.graph.value_info:
        value.name = "add_9" if value.name == "hidden_0" else value.name
    onnx.save(model, str(tmp_path / layout.ONNX_FILE))
    with pytest.raises(UserError, match="no value named hidden_0, so another version exported it"):
        measure(tmp_path / layout.ONNX_FILE, made.reference, clip, "fp16")
