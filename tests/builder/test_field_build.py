"""Engines of the field's methods: those with static shapes, whole; and the others, refused with the reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from builder import build
from builder.export.vision import vision_graph
from builder.gate import accuracy
from builder.gate.rules import ForcedUntouched, UntouchedRule
from builder.settings.arguments import parse
from builder.settings.config import BuildConfig
from earlytom import UserError
from earlytom.methods import method_of
from earlytom.methods.published import PUBLISHED, VisionZip
from earlytom.methods.published.compressing import Exported
from earlytom.settings import FIELD, NOT_BUILT, SETTINGS, settings_of
from earlytom.untouched import UNTOUCHED, UntouchedConfig, VisionZipConfig
from runtime import cli
from runtime.checkpoint import describe
from runtime.engine.manifest import Manifest
from runtime.video import load_clip
from runtime.vision import encode_one, open_backend
from runtime.vision.torch import open_torch
from tests.builder.conftest import FRAMES

Build = Callable[..., Path]


RATIOS = {"dycoke": "0.4"}  # a quarter at least


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, small_checkpoint: Path, videos: tuple[Path, ...]) -> Build:
    """`built("evs", "--fp16")`: the folder that the command builds and verifies."""
    out, done = tmp_path_factory.mktemp("field"), dict[tuple[str, ...], Path]()

    def make(name: str, *words: str) -> Path:
        if (name, *words) not in done:
            usual = ["--backend", "onnx", "--no-verify-text", "--calibration", *map(str, videos[:2])]
            command = [*_asked(name), "--model", str(small_checkpoint), *words, *usual]
            if "--frames" not in words:
                command += ["--frames", str(FRAMES)]
            folder = out / "".join((name, *words))
            assert build.main([*command, "--out", str(folder)]) == 0
            (done[name, *words],) = folder.iterdir()
        return done[name, *words]

    return make


def _asked(name: str) -> list[str]:
    return ["--method", name, "--ratio", RATIOS.get(name, "0.2")]


@pytest.mark.parametrize(
    "words",
    [
        *((kind.method, "--fp32") for kind in UNTOUCHED),
        ("visionzip", "--fp16"),
        ("visionzip", "--fp32", "--frames", f"4,{FRAMES}"),
    ],
    ids=" ".join,
)
def test_an_engine_says_what_pytorch_says(built: Build, videos: tuple[Path, ...], words: tuple[str, ...]) -> None:
    name, folder = words[0], built(*words)
    manifest = Manifest.read(folder)
    config = SETTINGS[name](float(_asked(name)[-1]))
    assert manifest.settings == config
    assert f"-{name}-" in folder.name
    assert manifest.verification is not None
    assert manifest.verification["passed"]
    assert manifest.frames_per_stage == (FRAMES,)
    assert manifest.tokens == config.tokens(FRAMES, manifest.tokens_per_frame) < FRAMES * manifest.tokens_per_frame
    if "--fp16" in words:
        return
    for count in manifest.counts:
        own = manifest.at(count)
        clip = load_clip(videos[0], count, own.model.preprocessing.size).frames
        got = encode_one(open_backend("onnxruntime", folder, own), clip)
        reference = open_torch(describe(own.model.source), own, device=torch.device("cpu"), dtype=torch.float32)
        wanted = encode_one(reference, clip)
        assert torch.equal(got.positions, wanted.positions)
        assert torch.equal(got.place, wanted.place)
        torch.testing.assert_close(got.tokens.float(), wanted.tokens, rtol=1e-3, atol=1e-4)


def test_the_gate_knows_its_rule(built: Build, monkeypatch: pytest.MonkeyPatch, videos: tuple[Path, ...]) -> None:
    """A reference that takes the least attended tokens does not take the graph's decisions again."""
    folder = built("visionzip", "--fp32")
    reference = vision_graph(config_of(folder), torch.float32)
    clips = {"clip": load_clip(videos[0], FRAMES, Manifest.read(folder).model.preprocessing.size).frames}
    report, _ = accuracy.verify(folder / "vision.onnx", reference, clips, "fp32")
    assert report.passed
    rule = VisionZip.by
    monkeypatch.setattr(VisionZip, "by", lambda self, x, attention, metric=None: rule(self, x, -attention, metric))
    spoilt, _ = accuracy.verify(folder / "vision.onnx", reference, clips, "fp32")
    failed = [check.what for check in spoilt.checks if not check.passed]
    assert "token choices repeated: share that is equal" in failed


def config_of(folder: Path) -> BuildConfig:
    words = [*_asked("visionzip"), "--model", Manifest.read(folder).model.source, "--fp32"]
    return parse([*words, "--backend", "onnx", "--frames", str(FRAMES)])[1]


@pytest.mark.parametrize("kind", UNTOUCHED)
def test_decisions_of_a_run_are_taken_on_other_tokens(kind: type[UntouchedConfig]) -> None:
    generator = torch.Generator().manual_seed(0)
    features, other = (torch.randn(4, 20, 8, generator=generator) for _ in range(2))
    relevance = torch.rand(4, 20, generator=generator)
    config = kind(0.4)
    taken = {"features": features.numpy()} | ({"relevance": relevance.numpy()} if config.watches else {})
    method = method_of(config)
    assert isinstance(method, Exported)
    forced = UntouchedRule(config).forced(taken)
    assert isinstance(forced, ForcedUntouched)
    assert forced.watched(3) == method.watched(3)
    state = Mock(vision=Mock(own=lambda seen: seen))
    tokens, places = forced.choose(other, 1 - relevance, state)
    assert torch.equal(places, method.by(features, relevance)[1])
    assert torch.equal(tokens, method.by(other, relevance, features)[0])
    assert torch.equal(method.by(features, relevance, features)[0], method.by(features, relevance)[0])
    assert not torch.equal(places, method.by(other, 1 - relevance)[1])  # negative control


def test_every_method_of_the_field_is_built_or_says_why_not() -> None:
    assert set(FIELD) == PUBLISHED.keys()
    assert set(FIELD) & SETTINGS.keys() == {kind.method for kind in UNTOUCHED}
    assert len(set(NOT_BUILT.values())) > 2


@pytest.mark.parametrize("name", NOT_BUILT)
def test_a_method_that_is_no_engine_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(build.main, ["--method", name]) == 2
    shown = capsys.readouterr().err
    assert f"{name} cannot be built into an engine: {NOT_BUILT[name]}" in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--batch", "2"], "--method visionzip takes one whole video at a time: leave out --batch 2"),
        (["--chunk", "4"], "leave out --chunk 4"),
        (["--merge-layers", "1"], "--method visionzip merges no frames: leave out --merge-layers"),
        (["--frame-budget", "0.5"], "leave out --frame-budget"),
        (["--schedule", "adaptive"], "leave out --schedule adaptive"),
        (["--tau", "0.5"], "--tau is for --method earlytom, not visionzip"),
        (["--ratio", "0"], "--ratio must be in (0, 1]"),
        (["--method", "dycoke"], "dycoke keeps one frame of 4 whole, so --ratio must be at least 0.25, got 0.1"),
    ],
)
def test_what_visionzip_does_not_go_with(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(build.main, ["--method", "visionzip", *words]) == 2
    assert said in capsys.readouterr().err


def test_settings_there_and_back() -> None:
    config = VisionZipConfig(0.25)
    assert settings_of("visionzip", json.loads(json.dumps(config.to_dict()))) == config
    assert config.replace(retention_ratio=0.5) == VisionZipConfig(0.5)
    method = method_of(config)
    assert isinstance(method, VisionZip)
    assert method.retention_ratio == 0.25
    with pytest.raises(UserError, match="unknown setting 'tau' of method 'visionzip'"):
        settings_of("visionzip", {"tau": 1})
