"""The benchmark: its baselines give the answers they should, its clock adds up, its command says what is wrong."""

from __future__ import annotations

import argparse
import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from earlytom import EarlyTomConfig, UserError, encode_video
from earlytom.encoder import encode
from earlytom.merge import plan_frames
from earlytom.methods import by_name
from earlytom.methods.earlytom import EarlyTom
from earlytom.towers import Tower
from runtime import bench, cli
from runtime.checkpoint import describe
from runtime.engine.manifest import Manifest
from runtime.errors import EngineError, VideoError
from runtime.measure import clock, comparison, overhead, report
from runtime.measure.arguments import VARIANTS
from runtime.measure.measure import STAGES, VariantRunner, interleaved, under_load
from runtime.measure.memory import Memory, peak_memory
from runtime.measure.naive import encode_naive, find_segments
from runtime.measure.overhead import compression_share
from runtime.measure.variants import OFF, Bench, Variant, full_tokens, read_engine, settings
from runtime.show import figure
from runtime.video import load_clip
from tests.earlytom.test_golden import encoder_case
from tests.processes import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[2] / "golden" / "earlytom"
TOKENS = 4


@pytest.fixture(scope="module")
def loaded(one_thread: None) -> Bench:
    return Bench(describe(), "What happens?", CPU, torch.float32)


@pytest.fixture(scope="module")
def config() -> EarlyTomConfig:
    return settings(describe(), 0.3, None, 0.8)


@pytest.fixture(scope="module")
def runner(loaded: Bench, drawn_clip: Path) -> VariantRunner:
    return VariantRunner(loaded, drawn_clip, TOKENS)


@pytest.fixture(scope="module")
def variants(loaded: Bench, config: EarlyTomConfig) -> dict[str, Variant]:
    return {name: loaded.variant(name, config, 8) for name in VARIANTS}


# --- the naive form decides as the reference


def tower(seed: int) -> tuple[Any, Any]:
    """A random SigLIP tower of five layers on 5 x 5 patches whose attention is uneven, and a projector."""
    torch.manual_seed(seed)
    made: Any = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=5,
            num_attention_heads=2,
            image_size=20,
            patch_size=4,
            vision_use_head=False,
        )
    )
    projector = nn.Sequential(nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 24))
    with torch.no_grad():
        for parameter in (*made.parameters(), *projector.parameters()):
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return made.eval(), projector.eval()


def walk(frames: int, seed: int, step: float) -> Tensor:
    """Pixels of a video in which every frame differs a little from the one before, with a cut now and then."""
    generator = torch.Generator().manual_seed(seed)
    steps = step * torch.randn(frames, 3, 20, 20, generator=generator)
    steps[:: 9 + seed] = torch.randn(steps[:: 9 + seed].shape, generator=generator)
    return steps.cumsum(0)


@pytest.mark.parametrize("trailing", ["released", "keep"])
@pytest.mark.parametrize("ratio", [0.05, 0.3, 1.0])
@pytest.mark.parametrize("layers", [(), (2,), (0, 1, 3)])
def test_the_naive_form_decides_as_the_reference(layers: tuple[int, ...], ratio: float, trailing: Any) -> None:
    merged = set()
    for seed, step in ((1, 0.1), (2, 0.3), (3, 0.6), (4, 0.0)):  # the last one stands still: equal frames
        model, projector = tower(seed)
        config = EarlyTomConfig(ratio, layers, tau=0.5, trailing=trailing)
        for frames in (1, 2, 3, 4, 11, 24):
            pixels = walk(frames, seed, step)
            want = encode_video(model, projector, pixels, config, depth=5)
            got = encode_naive(model, projector, pixels, config, depth=5)
            assert got.frames_per_stage == want.frames_per_stage
            assert got.segments == [tuple(pair) for pair in want.segments.tolist()]
            assert torch.equal(got.positions, want.positions)
            torch.testing.assert_close(got.tokens, want.tokens, atol=1e-4, rtol=1e-4)
            merged.add(got.frames_per_stage[-1] < frames)
    assert merged == ({False, True} if layers else {False})  # there was something to decide


def test_the_naive_form_decides_as_the_reference_on_a_real_clip(
    loaded: Bench, variants: dict[str, Variant], drawn_clip: Path
) -> None:
    frames = load_clip(drawn_clip, 16, (72, 72)).frames
    naive, ours = (variants[name].see(variants[name].copy(frames)) for name in ("naive", "adaptive"))
    assert naive.frames_per_stage == ours.frames_per_stage
    assert naive.frames_per_stage[-1] < 16
    torch.testing.assert_close(naive.tokens, ours.tokens, atol=1e-4, rtol=1e-4)


def test_a_made_up_difference_would_be_found() -> None:
    """Negative control: another threshold gives other segments."""
    hidden = walk(24, 2, 0.3).flatten(2).transpose(1, 2)
    config = EarlyTomConfig(tau=0.5)
    plan = plan_frames(hidden, tau=0.5, max_window=6, ema=0.9)
    assert find_segments(hidden, config) == [tuple(pair) for pair in plan.segments.tolist()]
    assert find_segments(hidden, config.replace(tau=0.9)) != find_segments(hidden, config)


@pytest.mark.parametrize("case", json.loads((GOLDEN / "encoder.json").read_text("utf-8")), ids=lambda c: str(c["case"]))
def test_the_naive_form_gives_what_the_released_code_gave(case: dict[str, Any]) -> None:
    arrays = np.load(GOLDEN / "encoder.npz")
    model, projector, pixels = encoder_case(arrays, case)
    layers, rule = tuple(case["prune_layers"]), {name: case[name] for name in ("tau", "max_window", "ema")}
    config = EarlyTomConfig(retention_ratio=case["ratio"], merge_layers=layers, **rule)
    got = encode_naive(model, projector, pixels, config, depth=case["layers"])
    assert [list(pair) for pair in got.segments] == arrays[f"e{case['case']}_segments"].tolist()
    assert (got.frames_per_stage[-1], len(got.tokens)) == (case["frames_out"], case["tokens_out"])
    torch.testing.assert_close(got.tokens, torch.from_numpy(arrays[f"e{case['case']}_tokens"]), atol=1e-4, rtol=0)


def test_the_naive_form_refuses_the_budget_schedule() -> None:
    model, projector = tower(0)
    with pytest.raises(UserError, match="--variants"):
        encode_naive(model, projector, walk(4, 0, 0.1), EarlyTomConfig(schedule="budget"), depth=5)


# --- the variants


def test_the_baseline_is_what_generate_gives(
    loaded: Bench, runner: VariantRunner, variants: dict[str, Variant]
) -> None:
    got = runner.answer(variants["full"])
    clip = runner.clip(variants["full"])
    pixels = variants["full"].copy(clip.frames)
    ids = loaded.prompt.input_ids(got.visual_tokens + 1)
    never = loaded.checkpoint.config.image_token_id  # nothing else stops an answer in the benchmark either
    out = loaded.model.generate(
        input_ids=ids, pixel_values_videos=pixels[None], max_new_tokens=TOKENS, do_sample=False, eos_token_id=never
    )
    assert got.tokens == tuple(out[0, ids.shape[1] :].tolist())
    assert got.visual_tokens == full_tokens(loaded.checkpoint, 8) == 200
    assert got.frames_per_stage == (8,)


@pytest.mark.parametrize("name", ["visionzip", "holitom"])
def test_a_method_of_the_field_is_a_variant(
    loaded: Bench, runner: VariantRunner, config: EarlyTomConfig, name: str
) -> None:
    variant = loaded.variant(name, config, 8)
    method = by_name(name, {"retention_ratio": 0.3})
    frames = runner.clip(variant).frames
    wanted = encode(loaded.family.vision_of(loaded.inner), variant.copy(frames), method, depth=loaded.depth)
    got = variant.see(variant.copy(frames))
    assert torch.equal(got.tokens, wanted.tokens)
    assert got.frames_per_stage == (8,)
    vision, prefill = loaded.arithmetic(got.frames_per_stage, len(got.tokens), variant.config)
    full, most = loaded.arithmetic((8,), 200, OFF)
    assert vision == full
    assert prefill < most
    assert variant.config.retention_ratio == 0.3


def test_both_decoders_give_the_same_ids(loaded: Bench, runner: VariantRunner, variants: dict[str, Variant]) -> None:
    plain, ours = (runner.answer(variants[name]) for name in ("naive", "adaptive"))
    assert plain.tokens == ours.tokens
    assert plain.visual_tokens == ours.visual_tokens < 200


def test_every_answer_has_the_length_asked_for(runner: VariantRunner, variants: dict[str, Variant]) -> None:
    assert {len(runner.answer(variant).tokens) for variant in variants.values()} == {TOKENS}


def test_an_engine_is_a_variant(loaded: Bench, bundled_engine: Path, drawn_clip: Path) -> None:
    manifest = read_engine(bundled_engine, loaded.checkpoint, 16)
    found, missing = loaded.engines(bundled_engine, manifest)
    assert [variant.name for variant in found] == ["onnxruntime fp16 r0.3"]
    assert not missing
    runner = VariantRunner(loaded, drawn_clip, TOKENS)
    budget = loaded.variant("budget", found[0].config, 16)
    got, want = runner.answer(found[0]), runner.answer(budget)
    assert (
        (got.visual_tokens, got.frames_per_stage)
        == (want.visual_tokens, want.frames_per_stage)
        == (126, (16, 12, 9, 7))
    )
    assert got.tokens[0] == want.tokens[0]


def test_an_engine_of_something_else_is_refused(loaded: Bench, engine: Path, bundled_engine: Path) -> None:
    with pytest.raises(EngineError, match=r"other weights.*--model"):
        read_engine(engine, loaded.checkpoint, 16)
    with pytest.raises(EngineError, match=r"takes 16 frames.*--frames 16"):
        read_engine(bundled_engine, loaded.checkpoint, 8)


def test_an_engine_that_runs_nowhere_here_says_why(loaded: Bench, bundled_engine: Path) -> None:
    manifest = Manifest.read(bundled_engine).replace(dtype="bf16")
    with pytest.raises(EngineError, match=r"does not run here.*bf16"):
        loaded.engines(bundled_engine, manifest)


def test_what_does_not_fit_in_the_context_is_refused(loaded: Bench) -> None:
    loaded.check(128, 16)
    with pytest.raises(UserError, match="context"):
        loaded.check(400, 16)


@pytest.mark.parametrize("given", [{"ratio": 1.5}, {"tau": 3.0}, {"merge_layers": (99,)}])
def test_settings_that_make_no_sense_are_refused(given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="--"):
        settings(describe(), **({"ratio": 0.1, "merge_layers": None, "tau": 0.8} | given))


# --- the clock


def test_the_stages_add_up_to_the_first_token(runner: VariantRunner, variants: dict[str, Variant]) -> None:
    for variant in variants.values():
        request = runner.answer(variant)
        assert tuple(request.stages) == STAGES
        assert sum(request.stages.values()) == pytest.approx(request.ttft, rel=1e-6)
        assert request.total == pytest.approx(request.ttft + (TOKENS - 1) * request.tpot, rel=1e-6)
        assert all(seconds > 0 for name, seconds in request.stages.items() if name != "copy")


def test_a_decoded_clip_is_not_decoded_again(runner: VariantRunner, variants: dict[str, Variant]) -> None:
    request = runner.answer(variants["budget"], runner.clip(variants["budget"]))
    assert request.stages["decode"] == request.stages["preprocess"] == 0


class Told:
    """A runner that only notes who was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []

    def answer(self, variant: Any) -> Any:
        self.asked.append(variant)
        return argparse.Namespace(ttft=float(len(self.asked)))


def test_variants_take_turns_and_warm_up_apart() -> None:
    told: Any = Told()
    names: Any = ["a", "b", "c"]
    first, found = interleaved(told, names, warmup=2, repeats=3)
    assert told.asked[:6] == [*"abcabc"]
    assert told.asked[6:] == [*"abc", *"bca", *"cab"]
    assert first == [1.0, 2.0, 3.0]  # the very first requests
    assert [[request.ttft for request in one] for one in found] == [[7, 12, 14], [8, 10, 15], [9, 11, 13]]


def test_clients_wait_in_line(runner: VariantRunner, variants: dict[str, Variant]) -> None:
    load = under_load(runner, variants["budget"], clients=3, requests=5)
    assert (load.clients, load.requests, len(load.ttft), len(load.total)) == (3, 5, 5, 5)
    assert all(0 < first < whole <= load.seconds for first, whole in zip(load.ttft, load.total, strict=True))
    assert sum(load.total) > load.seconds  # they overlap, which one client's cannot


def test_a_client_that_fails_ends_the_others(
    loaded: Bench, runner: VariantRunner, variants: dict[str, Variant], monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = iter(range(99))

    def clip(variant: Variant) -> Any:
        if next(turns) == 2:
            raise VideoError("no such video")
        return made

    made = runner.clip(variants["budget"])
    failing = VariantRunner(loaded, runner.video, TOKENS)
    monkeypatch.setattr(failing, "clip", clip)
    before = set(threading.enumerate())
    with pytest.raises(VideoError, match="no such video"):
        under_load(failing, variants["budget"], clients=4, requests=8)
    for thread in set(threading.enumerate()) - before:
        thread.join(HANG_SECONDS)
    assert set(threading.enumerate()) <= before


def test_peak_memory_sees_what_was_freed_again() -> None:
    size = 200_000_000

    def touch() -> None:
        np.ones(size, dtype=np.uint8)

    got, nothing = peak_memory(touch, CPU), peak_memory(lambda: None, CPU)
    if got.growth is None or nothing.growth is None:
        pytest.skip("this system keeps no high-water mark that can be reset")
    assert got.growth > 0.9 * size > nothing.growth
    assert got.cuda is None


def test_the_share_of_the_compression_is_what_its_parts_take(
    loaded: Bench, variants: dict[str, Variant], drawn_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that only the parts move: a second each, ten a layer, three more where attention is formed."""
    now = 0.0

    def takes(owner: Any, name: str, seconds: Callable[..., float]) -> None:
        own = getattr(owner, name)

        def slow(*given: Any, **named: Any) -> Any:
            nonlocal now
            now += seconds(**named)
            return own(*given, **named)

        monkeypatch.setattr(owner, name, slow)

    pixels = variants["budget"].copy(load_clip(drawn_clip, 8, (72, 72)).frames)
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now)
    for name in ("similarity", "plan", "select", "select_varying"):
        takes(EarlyTom, name, lambda: 1.0)
    takes(overhead, "apply_weights", lambda: 1.0)
    takes(Tower, "run_layer", lambda receive=False: 13.0 if receive else 10.0)
    # three merges, the segments of what is left, the choice of tokens, and one attention
    parts = 3 * (1 + 1) + 3 + (1 + 1) + 1 + 3
    merged_elsewhere = 3  # merging is timed beside the encoder, which does it without this clock
    share = compression_share(loaded, variants["budget"].config, pixels, 2)
    assert share == parts / (8 * 10 + parts - merged_elsewhere)
    assert 0 < compression_share(loaded, variants["adaptive"].config, pixels, 2) < 1
    # with everything off nothing is merged, chosen or gone by attention; the segments are found all the same
    off = 1 + 1
    assert compression_share(loaded, OFF, pixels, 2) == off / (8 * 10 + off)


# --- the figures


def record(name: str, ttft: float, vision: float, flops: int) -> dict[str, Any]:
    return {"name": name, "ttft": {"p50": ttft}, "stages": {"vision": {"p50": vision}}, "flops": {"vision": flops}}


def test_gains_are_ratios_of_medians() -> None:
    got = report.gains(
        [record("full", 9, 6, 300), record("naive", 6, 5, 100), record("budget", 3, 4, 150)], {"budget": 0.02}
    )
    assert got["ttft_full_over_budget"] == 3
    assert got["ttft_naive_over_budget"] == 2
    assert got["ttft_naive_over_adaptive"] is None  # not measured
    assert (got["vision_full_over_budget"], got["vision_flops_full_over_budget"]) == (1.5, 2)
    assert got["vision_of_flops"] == 0.75
    assert got["compression_of_encoder"] == {"budget": 0.02}


def test_a_share_is_arithmetic_in_time_at_the_peak(
    loaded: Bench, runner: VariantRunner, variants: dict[str, Variant]
) -> None:
    variant = variants["budget"]
    requests = [runner.answer(variant)]
    got = report.variant_record(loaded, variant, requests, math.nan, Memory(None, None, None), peak=1e12)
    vision, prefill = loaded.arithmetic((8, 6, 4, 3), requests[0].visual_tokens, variant.config)
    assert got["flops"] == {"vision": vision, "prefill": prefill}
    assert got["of_peak"]["vision"] == pytest.approx(vision / requests[0].stages["vision"] / 1e12)
    assert got["first_ttft"] is None  # JSON has no NaN
    full, _ = loaded.arithmetic((8,), 200, OFF)
    assert vision < full


# --- the command


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    status = cli.run(bench.main, list(words))
    out, err = capsys.readouterr()
    return status, out, err


QUICK = ("--repeats", "1", "--warmup", "1", "--requests", "2", "--scale-repeats", "1", "--max-new-tokens", "2")


def test_the_command_measures_everything(
    capsys: pytest.CaptureFixture[str], drawn_clip: Path, bundled_engine: Path, tmp_path: Path
) -> None:
    words = ("--video", str(drawn_clip), "--engine", str(bundled_engine), "--plot", str(tmp_path / "plots"), *QUICK)
    lists = ("--concurrency", "1,2", "--scale-frames", "4,8", "--scale-ratios", "0.1,1")
    status, out, err = run(capsys, *words, *lists)
    assert (status, err) == (0, "")
    *text, last = out.splitlines()
    got = json.loads(last)
    names = [*VARIANTS, "onnxruntime fp16 r0.3"]
    assert [one["name"] for one in got["variants"]] == names
    assert got["variants"][0]["visual_tokens"] == 400
    assert [(one["name"], one["clients"]) for one in got["throughput"]] == [(n, c) for c in (1, 2) for n in names]
    over = got["scaling"]
    assert [(p["name"], p["frames"]) for p in over["frames"]] == [(n, f) for f in (4, 8) for n in VARIANTS]
    assert [(p["name"], p["ratio"]) for p in over["ratios"]] == [(n, r) for r in (0.1, 1.0) for n in VARIANTS[1:]]
    assert set(got["gains"]["compression_of_encoder"]) == {"adaptive", "budget"}
    assert all(got["gains"].values())
    shown = "\n".join(text)
    for words_of in (*names, "TTFT", "prefill", "requests/s", "scaling over ratios", "share of"):
        assert words_of in shown
    for name in ("ttft.png", "scaling.png"):
        assert (tmp_path / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_json_prints_the_line_alone_and_lists_can_be_empty(
    capsys: pytest.CaptureFixture[str], drawn_clip: Path
) -> None:
    none = ("--concurrency", "none", "--scale-frames", "none", "--scale-ratios", "none")
    status, out, _ = run(
        capsys, "--json", "--video", str(drawn_clip), "--variants", "budget", "--threads", "1", *QUICK, *none
    )
    assert status == 0
    got = json.loads(out)  # one line, nothing else
    assert [one["name"] for one in got["variants"]] == ["budget"]
    assert got["throughput"] == got["scaling"]["frames"] == got["scaling"]["ratios"] == []
    assert got["gains"]["ttft_full_over_budget"] is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--repeats", "0"), "--repeats must be at least 1"),
        (("--max-new-tokens", "1"), "--max-new-tokens must be at least 2"),
        (("--frames", "1"), "--frames must be at least 2"),
        (("--scale-frames", "1,8"), "--scale-frames must each be at least 2"),
        (("--scale-frames", "eight"), "--scale-frames: 'eight': expected whole numbers"),
        (("--scale-ratios", "0.5,2"), "--scale-ratios: '0.5,2': expected ratios"),
        (("--concurrency", "0"), "--concurrency: '0': expected whole numbers"),
        (("--variants", "full,fast"), "'fast' is not one of full, naive"),
        (("--variants", "none"), "nothing to measure"),
        (("--variants", "fastv"), "fastv acts inside the language model: python -m builder.evaluate --methods fastv"),
        (("--variants", "dycoke", "--ratio", "0.1"), "retention_ratio must be at least 0.25, got 0.1"),
        (("--variants", "dycoke", "--ratio", "0.5", "--scale-ratios", "0.1"), "must be at least 0.25, got 0.1"),
        (("--ratio", "0"), "--ratio"),
        (("--merge-layers", "99"), "merge layer 99 does not exist"),
        (("--video", "no-such.mp4"), "no-such.mp4"),
        (("--engine", "no-such"), "no-such"),
        (("--model", "random:no-such"), "siglip-base-qwen2-0.5b"),
        (("--scale-frames", "100000"), "context"),
        (("--question", " "), "the question is empty"),
        (("--nonsense",), "--nonsense"),
        (("--service", "--plot", "plots", "--frames", "8"), "leave out --frames, --plot"),
        (("--soak", "5", "--scale-ratios", "0.1"), "leave out --scale-ratios"),
        (("--soak", "0"), "--soak must be at least 1, got 0"),
        (("--soak", "1", "--soak-clients", "0"), "--soak-clients must be at least 1, got 0"),
        (("--soak", "1", "--engine", "x", "--engine", "y"), "--soak measures one engine, got 2"),
        (("--service", "--engine", "x", "--engine", "y"), "--service measures one engine, got 2"),
        (("--service", "--soak", "10"), "give one of them"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], drawn_clip: Path, words: tuple[str, ...], says: str
) -> None:
    video = () if "--video" in words else ("--video", str(drawn_clip))
    status, out, err = run(capsys, *video, *words)
    assert (status, out) == (2, "")
    assert says in err
    assert err.count("\n") == 1
    assert err.startswith("error: ")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    status, _, err = run(capsys, "--device", "cuda")
    assert status == 2
    assert "--device cpu" in err


def test_a_gpu_that_is_too_small_is_an_error_of_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, drawn_clip: Path
) -> None:
    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(comparison, "measure", full)
    status, _, err = run(capsys, "--video", str(drawn_clip))
    assert (status, err.count("\n")) == (2, 1)
    assert "lower --frames" in err


def test_plots_without_matplotlib_are_refused_at_once(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def missing(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(figure.importlib, "import_module", missing)
    status, _, err = run(capsys, "--plot", str(tmp_path))
    assert status == 2
    assert "pip install" in err


def test_the_mid_size_model_is_siglip_base() -> None:
    found = describe("random:siglip-base-qwen2-0.5b")
    vision: Any = found.config.vision_config
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (768, 12, 384, 16)
    assert (found.frames, found.trained, found.preprocessing.size) == (8, False, (384, 384))
    assert full_tokens(found, 8) == 8 * 12 * 12
    assert settings(found, 0.1, None, 0.8).merge_layers == EarlyTomConfig.layers_for(12)
