"""What a build is asked for: counts, sizes and the key that names its result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from builder.export.vision import vision_graph
from builder.settings import config
from builder.settings.arguments import parse
from builder.settings.config import BuildConfig
from builder.settings.options import parse_target
from earlytom.budget import frames_per_stage, token_count
from earlytom.config import PRESETS
from earlytom.errors import UserError
from runtime.checkpoint import describe
from runtime.engine.dtypes import DTYPES

Parse = Callable[..., BuildConfig]


@pytest.fixture
def parsed(build_arguments: list[str]) -> Parse:
    """The session's build with some arguments added."""
    return lambda *words: parse([*build_arguments, *words])[1]


@pytest.mark.parametrize(
    ("text", "capability"), [("a100", (8, 0)), ("A100", (8, 0)), ("8.0", (8, 0)), ("8.9", (8, 9)), ("12.0", (12, 0))]
)
def test_targets(text: str, capability: tuple[int, int]) -> None:
    assert parse_target(text) == capability


@pytest.mark.parametrize("text", ["h200", "8", "80", "sm80", "8.0.0", "", "-8.0", "8.12"])
def test_targets_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--target"):
        parse_target(text)


def test_counts_are_those_of_the_budget(parsed: Parse) -> None:
    one = parsed("--frame-budget", "0.6", "--ratio", "0.25")
    rule: Any = {"merges": 2, "frame_budget": 0.6}
    assert one.stages == frames_per_stage(12, **rule)
    assert one.tokens_per_frame == 25  # a grid of 9 x 9, pooled
    assert one.tokens == token_count(12, 25, 0.25, **rule)
    assert one.depth == 4


def test_published_configuration() -> None:
    """LLaVA-OneVision-7B with 32 frames, from its shapes alone: the figures of the method's documentation."""
    words = ["--model", "random:llava-onevision-qwen2-7b-ov", "--frames", "32", "--ratio", "0.1", "--backend", "onnx"]
    one = parse(words)[1]
    assert (one.depth, one.stages, one.tokens_per_frame) == (26, (32, 24, 18, 14), 196)
    assert one.tokens == token_count(32, 196, 0.1)
    assert one.flops["vision"] < one.flops["vision_full"]
    assert one.flops["prefill"] < one.flops["prefill_full"] / 9
    assert one.expected_bytes["weights"] == pytest.approx(829e6, rel=0.01)  # fp16
    assert one.expected_bytes["input"] == 32 * 3 * 384 * 384


def test_expected_sizes_are_those_of_the_shapes(parsed: Parse) -> None:
    for dtype, size in (("fp16", 2), ("fp32", 4)):
        one = parsed(f"--{dtype}")
        graph = vision_graph(one, torch.float32)
        stored = vision_graph(one, DTYPES[dtype])  # with layer norms in fp32
        used = [p for name, p in stored.named_parameters() if "post_layernorm" not in name]
        sizes = one.expected_bytes
        assert sizes["weights"] == sum(p.numel() * p.itemsize for p in used)
        frames = torch.zeros(12, 3, 72, 72, dtype=torch.uint8)
        tokens, positions = (graph(frames)[name] for name in ("tokens", "positions"))
        assert sizes["input"] == frames.numel()
        assert sizes["output"] == tokens.numel() * size + positions.numel() * 8


def test_key_is_a_function_of_what_is_asked(parsed: Parse) -> None:
    assert parsed().key() == parsed().key()
    assert len(parsed().key()) == 64
    assert parsed("--out", "elsewhere", "--force", "--json", "--no-verify").key() == parsed().key()


@pytest.mark.parametrize(
    "words",
    [
        ["--ratio", "0.31"],
        ["--frames", "13"],
        ["--fp32"],
        ["--bf16"],
        ["--tau", "0.51"],
        ["--merge-layers", "1"],
        ["--merge-layers", "none"],
        ["--frame-budget", "0.5"],
        ["--frame-budget", "9,7"],  # the same counts by another rule: one key too many does no harm
        ["--target", "8.9"],
        ["--model", "micro"],
    ],
    ids=" ".join,
)
def test_key_changes_with_every_setting(parsed: Parse, words: list[str]) -> None:
    one, other = parsed(), parsed(*(word for word in words))
    assert one.key() != other.key()
    assert one.name(one.key()) != other.name(other.key())


@pytest.mark.parametrize(
    "change",
    [
        {"backend": "tensorrt-rtx"},
        {"backend_version": "0.0.1"},
        {"hardware_compatible": True},
        {"workspace_gib": 1.0},
        {"compression": "plugin"},
    ],
    ids=str,
)
def test_key_changes_with_what_compiles(parsed: Parse, change: dict[str, Any]) -> None:
    assert replace(parsed(), **change).key() != parsed().key()


def test_key_changes_with_settings_that_have_no_option(parsed: Parse) -> None:
    one = parsed()
    for change in ({"ema": 0.8}, {"max_window": 5}, {"trailing": "keep"}):
        assert replace(one, earlytom=one.earlytom.replace(**change)).key() != one.key()


def test_key_changes_with_the_bytes_of_the_clips(parsed: Parse, tmp_path: Path) -> None:
    keys = []
    for content in (b"one", b"two"):
        (tmp_path / "clip.mp4").write_bytes(content)
        keys.append(parsed("--calibration", str(tmp_path / "clip.mp4")).key())
    keys.append(parsed().key())
    (tmp_path / "other.mp4").write_bytes(b"two")
    assert len(set(keys)) == 3
    assert parsed("--calibration", str(tmp_path / "other.mp4")).key() == keys[1]  # a name is no content


def test_key_changes_with_the_weights(parsed: Parse, small_checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "small"
    folder.mkdir()
    for path in small_checkpoint.iterdir():
        (folder / path.name).symlink_to(path)
    assert parsed("--model", str(folder)).key() == parsed().key()  # where they lie does not count
    weights = load_file(small_checkpoint / "model.safetensors")
    name = next(n for n in weights if n.endswith("layers.3.mlp.fc2.bias"))
    weights[name][0] += 1
    (folder / "model.safetensors").unlink()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert parsed("--model", str(folder)).key() != parsed().key()


def test_key_changes_with_libraries_and_code(parsed: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    before, version = parsed().key(), config.metadata.version
    for name in config.EXPORTERS:
        with monkeypatch.context() as patch:
            patch.setattr(config.metadata, "version", lambda asked, n=name: version(asked) + (asked == n) * "+1")
            assert parsed().key() != before, name
    monkeypatch.setattr(config, "code_digest", lambda: "other")
    assert parsed().key() != before


def test_key_changes_with_triton_where_it_makes_the_kernels(parsed: Parse, monkeypatch: pytest.MonkeyPatch) -> None:
    native = parsed()
    keys = []
    for version in ("3.6.0", "3.9.0"):
        monkeypatch.setattr(config, "triton_version", lambda version=version: version)
        keys.append((native.key(), replace(native, compression="plugin").key()))
    assert keys[0][0] == keys[1][0]
    assert len({*keys[0], *keys[1]}) == 3


def test_name_says_what_it_is(parsed: Parse) -> None:
    one = parsed("--ratio", "0.125", "--target", "8.9", "--bf16")
    assert one.name("0123456789abcdef") == "small-sm89-onnx-bf16-r0.125-f12-0123456789"


@pytest.mark.parametrize("frames", [0, -1, 129, 1000])
def test_frames_out_of_range(parsed: Parse, frames: int) -> None:
    with pytest.raises(UserError, match=f"between 1 and 128, got {frames}: set --frames"):
        replace(parsed(), frames=frames)


def test_defaults_suit_the_model() -> None:
    _, one, choice = parse(["--ratio", "0.3", "--backend", "onnx"])
    assert one.checkpoint == describe("micro")
    assert (one.frames, one.dtype, one.target) == (16, "fp16", (8, 0))
    assert one.earlytom.merge_layers == (2, 4, 6)
    assert one.earlytom.schedule == "budget"
    assert choice.reason
    assert one.compression == "native"  # there is no engine for plugins to be in
    _, published, _ = parse(["--model", "random:llava-onevision-qwen2-0.5b-ov", "--backend", "onnx"])
    assert published.frames == 32
    assert published.earlytom.merge_layers == (6, 14, 20)


def test_presets_are_the_released_ones_and_what_is_given_beside_wins() -> None:
    for benchmark, released in PRESETS.items():
        for ratio, (tau, layers) in released.items():
            words = ["--model", "random:llava-onevision-qwen2-7b-ov", "--backend", "onnx", "--ratio", str(ratio)]
            method = parse([*words, "--preset", benchmark])[1].earlytom
            assert (method.tau, method.merge_layers, method.schedule) == (tau, layers, "budget")
    method = parse([*words, "--preset", benchmark, "--tau", "0.25", "--merge-layers", "3,4"])[1].earlytom
    assert (method.tau, method.merge_layers) == (0.25, (3, 4))
    video = ["--model", "random:llava-video-7b", "--backend", "onnx", "--ratio", "0.25"]  # two are its own
    assert parse([*video, "--preset", "longvideobench"])[1].earlytom.merge_layers == (6, 21, 23)


def test_inner_merging_is_the_runtimes_and_not_part_of_a_build(parsed: Parse) -> None:
    with pytest.raises(UserError, match=r"--inner-layer 2 to python -m runtime.ask"):
        replace(parsed(), earlytom=parsed().earlytom.replace(inner_layer=2))
