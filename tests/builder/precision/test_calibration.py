"""Calibration of int8: smoothing leaves the function, outliers and sensitive products are found, and the proof: a
checkpoint with outliers (`stress`) that int8 done naively breaks and ours does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from builder.clips import SCALE_CLIPS, calibration_clips, gate_clips, scale_clips
from builder.export.vision import export_onnx, vision_graph
from builder.gate.drift import measure
from builder.gate.limits import GATES
from builder.precision import calibration
from builder.precision.calibration import MOST_ERROR, Calibration, Entered, few_of, settle
from builder.precision.int8 import Int8Linear
from builder.precision.products import Product
from builder.precision.smoothing import fold, folds, places
from builder.settings.arguments import parse
from builder.settings.config import BuildConfig
from builder.stages import plan_int8
from earlytom.errors import UserError
from earlytom.micro.data import labelled_clip
from runtime.engine import layout
from tests.builder.conftest import FRAMES, TAU
from tests.builder.precision.stress import stress_checkpoint


def config_of(checkpoint: Path, *words: str) -> BuildConfig:
    given = ["--model", str(checkpoint), "--frames", str(FRAMES), "--tau", TAU, "--ratio", "0.3", "--backend", "onnx"]
    return parse([*given, "--int8", *words])[1]


def calibrated(checkpoint: Path, clips: dict[str, Tensor]) -> Calibration:
    config = config_of(checkpoint)
    graph = vision_graph(config, torch.float32)
    pixels = torch.cat([graph.pixels(frames[:4]) for frames in clips.values()])
    return Calibration(graph.vision, graph.projector, pixels, config.depth, config.may_be_int8)


def naive(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a tool does it that takes the largest magnitude and moves nothing."""
    monkeypatch.setattr(calibration, "STRENGTHS", (0.0,))
    monkeypatch.setattr(calibration, "PERCENTILES", (100.0,))


@pytest.fixture(scope="module")
def stressed(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stress_checkpoint(small_checkpoint, tmp_path_factory.mktemp("int8") / "stressed")


def test_folding_leaves_the_function(small_checkpoint: Path, clips: dict[str, Tensor]) -> None:
    config = config_of(small_checkpoint)
    clip = clips["drawn0.mp4"]
    graph = vision_graph(config, torch.float32)
    wanted = graph(clip)
    layers = list(graph.tower.layers)
    random = torch.Generator().manual_seed(0)
    for product in filter(folds, config.may_be_int8):
        width = places(layers, graph.projector, product)[0].linear.weight.shape[1]
        fold(layers, graph.projector, product, 2.0 ** torch.randint(-6, 7, (width,), generator=random).float())
    got = graph(clip)
    for name in ("hidden_1", "features", "tokens"):
        torch.testing.assert_close(got[name], wanted[name], rtol=0, atol=2e-3)
    layers[0].layer_norm1.weight.data[0] *= 2  # the negative control: half of a fold is another function
    assert (graph(clip)["features"] - wanted["features"]).abs().max() > 2e-3


def test_an_outlier_moves_into_the_weights() -> None:
    random = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(256, 32, generator=random), torch.randn(16, 32, generator=random)
    seen = Entered()
    seen.add(rows)
    quiet = settle(seen, [weight])
    loud = Entered()
    loud.add(rows * torch.where(torch.arange(32) == 7, 500.0, 1.0))
    site = settle(loud, [weight])
    assert site.smooth is not None
    assert site.smooth.argmax() == 7
    assert site.limit < 500 < float(loud.rows.abs().max())
    assert quiet.limit == pytest.approx(float(rows.abs().max()), rel=0.5)


def test_the_rare_and_large_is_cut_off_only_where_that_is_much_better(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of other clips there would be more of it than of the sample."""
    random = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(256, 32, generator=random), torch.randn(16, 32, generator=random)
    rows[3, 7] = 9.0  # more than twice what the others have, and it counts for little: somewhat better without
    weight[:, 7] *= 0.22
    monkeypatch.setattr(calibration, "STRENGTHS", (0.0,))
    largest = []
    for doubt in (1.0, calibration.DOUBT):
        monkeypatch.setattr(calibration, "DOUBT", doubt)
        seen = Entered()
        seen.add(rows)
        largest.append(settle(seen, [weight]).limit)
    assert largest[0] < 9.0  # the negative control: it is cut off where nothing is doubted
    assert largest[1] == 9.0


@pytest.mark.parametrize(("frames", "taken"), [(3, [0, 1, 2]), (8, list(range(8))), (20, [0, 3, 6, 9, 12, 15, 18])])
def test_noise_is_measured_on_frames_of_all_clips(frames: int, taken: list[int]) -> None:
    assert few_of(torch.arange(frames)).tolist() == taken


def test_what_never_entered_but_zeros_is_no_reason_to_fail() -> None:
    seen = Entered()
    seen.add(torch.zeros(4, 8))
    site = settle(seen, [torch.ones(2, 8)])
    assert torch.equal(
        Int8Linear(torch.ones(2, 8), None, site.limit, torch.float16)(torch.zeros(1, 8)), torch.zeros(1, 2).half()
    )


def test_the_plan_is_what_was_measured(small_checkpoint: Path, clips: dict[str, Tensor]) -> None:
    """What `put_in` makes of another copy of the model is what the error was measured on."""
    found = calibrated(small_checkpoint, clips)
    plan = found.plan([Product("fc2", 0)])
    assert plan.error < 0.05
    config = config_of(small_checkpoint)
    graph = vision_graph(config, torch.float32, plan)
    linears = [p for p in graph.modules() if isinstance(p, Int8Linear)]
    assert len(linears) == 6 * config.depth + 2 - 1
    assert {one.zero.dtype for one in linears} == {torch.uint8}  # for ONNX Runtime alone
    compiled = vision_graph(replace(config, backend="tensorrt-rtx"), torch.float32, plan)
    assert {one.zero.dtype for one in compiled.modules() if isinstance(one, Int8Linear)} == {torch.int8}
    hidden = found.few
    with torch.no_grad():
        for layer in graph.tower.layers[: config.depth]:
            hidden, _ = graph.tower.run_layer(layer, hidden)
        features = graph.vision.features(hidden, None).features
    error = float(((features - found.exact).square().mean() / found.exact.square().mean()).sqrt())
    assert error == pytest.approx(plan.error, rel=0.05)
    assert all(site.noise > 0 for site in plan.sites.values())
    assert plan.to_dict()["kept"] == ["fc2:0"]


def test_the_search_keeps_the_loudest_and_no_more(small_checkpoint: Path, clips: dict[str, Tensor]) -> None:
    found = calibrated(small_checkpoint, clips)
    assert found.search().kept == frozenset()
    tight = found.search(found.error(()) * 0.8)
    assert tight.kept
    assert tight.error <= found.error(()) * 0.8
    assert len(tight.kept) < len(found.products)
    worst = max(found.products, key=lambda p: found.sites[p].noise / sum(m.weight.numel() for m in found.modules[p]))
    assert worst in tight.kept
    assert found.search(0.0).kept == frozenset(found.products)  # nothing is good enough: all stay


def test_the_stress_checkpoint_breaks_naive_int8_and_not_ours(
    stressed: Path, clips: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the exported graph, every result rounded, the rest in half."""
    config, clip = config_of(stressed), clips["drawn0.mp4"]
    reference = vision_graph(config, torch.float32)
    ours = plan_int8(config, clips)
    naive(monkeypatch)
    careless = plan_int8(replace(config, int8=()), clips)
    monkeypatch.undo()
    assert {product.name for product in ours.kept} == {"fc2"}  # where the loud neurons end
    assert len(ours.kept) < config.depth
    assert careless.kept == frozenset()
    assert ours.error <= MOST_ERROR < 0.3 < careless.error
    cosines = []
    for name, plan in (("ours", ours), ("careless", careless)):
        graph = vision_graph(config, torch.float16, plan)
        (tmp_path / name).mkdir()
        exported = export_onnx(graph, FRAMES, (72, 72), tmp_path / name / layout.ONNX_FILE)
        taps = measure(exported.path, reference, clip, "fp16")
        assert not any(tap.nonfinite for tap in taps)
        cosines.append(min(tap.cosine for tap in taps))
    assert cosines[0] > GATES["int8"].cosine > cosines[1]


BUNDLED = ("--ratio", "0.3", "--backend", "onnx")


def test_without_clips_the_bundled_model_s_scales_come_of_its_own_task(
    small_checkpoint: Path, clips: dict[str, Tensor]
) -> None:
    """Too: of many clips, none of them in a table. Other models have no such."""
    found = scale_clips(parse([*BUNDLED, "--int8"])[1], clips)
    assert list(found)[: len(clips)] == list(clips)
    found = dict(list(found.items())[len(clips) :])
    assert len(found) == SCALE_CLIPS
    assert len({frames.numpy().tobytes() for frames in found.values()}) == SCALE_CLIPS
    assert {(frames.dtype, tuple(frames.shape)) for frames in found.values()} == {(torch.uint8, (16, 3, 72, 72))}
    assert torch.equal(found["validation 3"], torch.from_numpy(labelled_clip("validation", 3).frames))
    assert scale_clips(config_of(small_checkpoint), clips) == clips


def shared(some: dict[str, Tensor], others: dict[str, Tensor]) -> list[str]:
    """The clips that both have, by their frames."""
    seen = {frames.numpy().tobytes() for frames in others.values()}
    return [name for name, frames in some.items() if frames.numpy().tobytes() in seen]


@pytest.mark.parametrize("frames", [8, 16, 20])
@pytest.mark.parametrize("bundled", [True, False])
def test_the_gate_sees_no_clip_that_the_scales_come_from(
    small_checkpoint: Path, bundled: bool, frames: int, tmp_path: Path
) -> None:
    words = [*BUNDLED, "--int8", "--frames", str(frames)]
    config = parse(words if bundled else [*words, "--model", str(small_checkpoint)])[1]
    clips = calibration_clips(config, tmp_path)
    scales, gate = scale_clips(config, clips), gate_clips(config, clips, tmp_path)
    assert len(gate) == (9 if bundled else 1)
    assert {tuple(clip.shape) for clip in gate.values()} == {(frames, 3, 72, 72)}
    assert not shared(gate, scales)
    assert not set(gate) & set(scales)
    plain = parse([word for word in words if word != "--int8"])[1]
    assert shared(gate_clips(plain, clips, tmp_path), scales) == ["drawn clip"]  # as it would be, were none held out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("given", "held"), [(2, 1), (3, 1), (8, 2), (9, 2)])
def test_of_the_clips_given_the_last_quarter_is_held_out(
    small_checkpoint: Path, drawn_clip: Path, given: int, held: int, tmp_path: Path
) -> None:
    config = config_of(small_checkpoint, "--calibration", *[str(drawn_clip)] * given)
    random = torch.Generator().manual_seed(0)
    clips = {str(n): torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8, generator=random) for n in range(given)}
    scales, gate = scale_clips(config, clips), gate_clips(config, clips, tmp_path)
    assert scales | gate == clips
    assert (len(scales), list(gate)) == (given - held, [str(n) for n in range(given - held, given)])


def test_one_clip_is_not_enough_for_both(small_checkpoint: Path, drawn_clip: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--calibration names 1: name at least 2, or none"):
        config_of(small_checkpoint, "--calibration", str(drawn_clip))
    config = config_of(small_checkpoint, "--calibration", str(drawn_clip), str(drawn_clip))
    same = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    with pytest.raises(UserError, match=r"b\.mp4 shows the same frames as a\.mp4, and int8 is checked on clips that"):
        gate_clips(config, {"a.mp4": same, "b.mp4": same.clone()}, tmp_path)
