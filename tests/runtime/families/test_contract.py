"""What holds for an engine of every family: built, asked, watched, measured, served, and refused where it is not known.

A family comes here by a line in `CASES`. What is one's alone is in the other files.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from builder import build
from earlytom import UserError
from earlytom.families import FAMILIES, geometry
from earlytom.standing import frame_spans
from runtime import ask, bench, cli
from runtime.checkpoint import describe
from runtime.decoder.eager import InnerMerge
from runtime.decoder.sampling import GREEDY
from runtime.engine.manifest import Manifest
from runtime.pipeline import Pipeline
from runtime.serve.backend import Asked, Local
from runtime.serve.decoding import Decoders
from runtime.serve.fetch import FetchRules
from runtime.serve.media import Media, TakenVideo, VideoPart
from runtime.text.messages import ChatMessage
from runtime.text.prompt import build_prompt
from runtime.video import Clip, load_clip
from tests.processes import HANG_SECONDS
from tests.runtime.families.cases import CASES, OFF, OTHER, QUESTION, Case, said

pytestmark = pytest.mark.usefixtures("each_export_once")

ON_AXES = [name for name in CASES if FAMILIES[name].on_axes]
GATED = ["internvl", *ON_AXES]  # whose engine is built with the gate

Engine = Callable[[str], tuple[Case, Path, Path]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Of a family: its case, its folder, an engine that leaves tokens out, through the gate, its text too."""
    made: dict[str, tuple[Case, Path, Path]] = {}

    def of(name: str) -> tuple[Case, Path, Path]:
        if name not in made:
            case, place = CASES[name], tmp_path_factory.mktemp(name)
            folder = case.folder(place)
            made[name] = case, folder, case.built(folder, place / "on", *case.on, "--verify-text")
        return made[name]

    return of


def test_every_family_has_a_case() -> None:
    """But the first: all other tests are its own."""
    assert set(CASES) == set(FAMILIES) - {"llava_onevision"}


@pytest.mark.parametrize("name", CASES)
def test_with_all_tokens_an_engine_answers_as_transformers_do(name: str, tmp_path: Path) -> None:
    """At two rates where that matters: of a slow video frames stand later, some later than the question. Places of
    tokens that are all there are those they had."""
    case, answers = CASES[name], []
    folder, video = case.folder(tmp_path), case.video()
    engine = case.built(folder, tmp_path / "off", *OFF, "--no-verify")
    biased = name != "qwen3_5"  # its linear layers have no keys
    with Pipeline.load(engine) as pipeline, Pipeline.load(engine, positions="original", bias=biased) as placed:
        for fps in case.rates:
            clip, given = case.clip(video, fps), case.given(folder, video, fps)
            answer = pipeline.ask(clip, QUESTION, max_new_tokens=12)
            assert said(folder, answer) == case.greedy(folder, video, fps=fps)
            assert answer.prompt_tokens == given["input_ids"].shape[1]
            with pipeline.watch(clip) as watched:
                for _ in range(2):
                    assert watched.ask(QUESTION, max_new_tokens=12).tokens == answer.tokens
            assert placed.ask(clip, QUESTION, max_new_tokens=12).tokens == answer.tokens
            answers.append((answer.tokens, given["input_ids"].tolist()))
    assert len({str(one) for one in answers}) == len(case.rates)  # negative control: when frames were matters


@pytest.mark.parametrize("name", GATED)
def test_an_engine_answers_as_the_model_does_with_earlytom(name: str, engine: Engine) -> None:
    case, folder, place = engine(name)
    manifest, video = Manifest.read(place), case.video()
    frame, clip = geometry(describe(folder).config), case.clip(video)
    assert manifest.model.family == name
    assert manifest.model.preprocessing.sampling == case.family.sampling
    assert manifest.verification is not None
    assert manifest.verification["passed"]
    assert Manifest.from_dict(manifest.to_dict()) == manifest
    wanted = case.greedy(folder, video, manifest.settings)
    assert wanted != case.greedy(folder, video)  # negative control: what is kept matters
    with Pipeline.load(place) as pipeline, Pipeline.load(place, backend="torch") as reference:
        answer = pipeline.ask(clip, QUESTION, max_new_tokens=12, kept=True)
        assert said(folder, answer) == wanted
        assert reference.ask(clip, QUESTION, max_new_tokens=12).tokens == answer.tokens
        assert answer.visual_tokens == manifest.tokens < manifest.tokens_full
        assert answer.sampling == case.family.sampling
        assert answer.picture(place.parent / "kept.png", clip).is_file()
        with pipeline.watch(clip) as watched:
            other = watched.ask(OTHER, max_new_tokens=12)
            seen = watched.ask(QUESTION, max_new_tokens=12)
            assert (seen.tokens, seen.prompt_tokens) == (answer.tokens, answer.prompt_tokens)
            assert 0 < seen.cached_tokens < seen.prompt_tokens
        assert other.tokens == pipeline.ask(clip, OTHER, max_new_tokens=12).tokens
        if case.family.on_axes:
            with pytest.raises(UserError, match=f"a prompt of {case.family.title} is more than embeddings"):
                pipeline.embed(clip, QUESTION)
        else:
            assert pipeline.embed(clip, QUESTION).shape == (1, answer.prompt_tokens, frame.llm_width)


@pytest.mark.parametrize("name", GATED)
def test_a_watched_answer_is_that_of_one_prompt_where_tokens_keep_their_places(name: str, engine: Engine) -> None:
    case, _, place = engine(name)
    clip = case.clip(case.video())
    with Pipeline.load(place, positions="original") as pipeline, pipeline.watch(clip) as watched:
        for question in (QUESTION, OTHER, "And then?", "When?"):
            wanted = pipeline.ask(clip, question, max_new_tokens=12).tokens
            assert watched.ask(question, max_new_tokens=12).tokens == wanted


@pytest.mark.parametrize("name", CASES)
def test_cells_are_built_and_asked_with_positions_and_bias(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    folder, video = case.folder(tmp_path), case.video()
    clip, engine = case.clip(video), case.built(folder, tmp_path / "cells", "--method", "cells", *case.on)
    if name == "qwen3_5":
        with pytest.raises(UserError, match=r"has others .*: use --no-bias"):
            Pipeline.load(engine)
    else:
        with Pipeline.load(engine) as pipeline, Pipeline.load(engine, backend="torch") as reference:
            answer = pipeline.ask(clip, QUESTION, max_new_tokens=12)
            assert answer.tokens == reference.ask(clip, QUESTION, max_new_tokens=12).tokens
            assert answer.visual_tokens == pipeline.manifest.tokens < pipeline.manifest.tokens_full
            with pipeline.watch(clip) as watched:
                assert watched.ask(QUESTION, max_new_tokens=12).tokens == answer.tokens
    with Pipeline.load(engine, bias=False, positions="consecutive") as plain:
        wanted = case.greedy(folder, video, plain.manifest.settings)
        assert said(folder, plain.ask(clip, QUESTION, max_new_tokens=12)) == wanted


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_several_videos_at_once_are_answered_as_each_alone(name: str, engine: Engine, tmp_path: Path) -> None:
    case, folder, place = engine(name)
    several = case.built(folder, tmp_path / "two", *case.on, "--batch", "2")  # through the gate
    with Pipeline.load(several) as pipeline, Pipeline.load(place) as alone:
        assert pipeline.manifest.batch == 2
        answers = []
        for clip in (case.clip(case.video()), case.clip(case.video().flip(0))):
            answer = pipeline.ask(clip, QUESTION, max_new_tokens=12)
            assert answer.tokens == alone.ask(clip, QUESTION, max_new_tokens=12).tokens
            answers.append(answer.tokens)
    assert answers[0] != answers[1]  # negative control


REFUSED = {
    "--frames 7": "{} takes 2 pictures for a frame: --frames must be a multiple, got 7",
    "--frames 8,7": "{} takes 2 pictures for a frame: --frames must be a multiple, got 7,8",
    "--schedule adaptive": "--schedule adaptive does not know {}'s frames",
    "--chunk 4": "--chunk does not know {}'s frames",
    "--method tome": "method 'tome' does not know {}'s tokens",
    "--int8": "--int8 knows the products of LLaVA-OneVision, not of {}: leave it out",
    "--size 20x16": "frames are 20x16, expected multiples of 8 pixels",
    "--size big": "--size 'big' is not HEIGHTxWIDTH",
}


@pytest.fixture(scope="module", params=ON_AXES)
def folder_on_axes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Case, Path]:
    case = CASES[request.param]
    return case, case.folder(tmp_path_factory.mktemp("refused"))


@pytest.mark.parametrize("words", REFUSED)
def test_a_build_that_cannot_be_is_refused(folder_on_axes: tuple[Case, Path], words: str) -> None:
    case, folder = folder_on_axes
    given = ["--model", str(folder), "--frames", str(case.frames), "--backend", "onnx", "--dry-run", *words.split()]
    with pytest.raises(UserError) as error:
        build.main(given)
    assert REFUSED[words].format(case.family.title) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", [{"decoder": "http://127.0.0.1:1/v1"}, {"inner": InnerMerge(1, 0.5)}])
@pytest.mark.parametrize("name", ON_AXES)
def test_decoders_that_do_not_know_more_than_embeddings_are_refused(
    name: str, engine: Engine, how: dict[str, Any]
) -> None:
    _, _, place = engine(name)
    with pytest.raises(UserError, match="use --decoder torch, without --inner-layer"):
        Pipeline.load(place, **how)


@pytest.mark.parametrize("name", GATED)
def test_the_commands_ask_and_bench_take_it(
    name: str, engine: Engine, drawn_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    case, folder, place = engine(name)
    full = Manifest.read(place).tokens_full
    words = [str(drawn_clip), QUESTION, "--engine", str(place), "--device", "cpu", "--max-new-tokens", "8"]
    assert cli.run(ask.main, [*words, "--json"]) == 0
    asked = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert asked["visual_tokens_full"] == full
    words = ["--model", str(folder), "--engine", str(place), "--video", str(drawn_clip), *case.on]
    words += f"--frames {case.frames} --device cpu --requests 1 --warmup 0 --concurrency none".split()
    words += ["--repeats", "1", "--scale-repeats", "1", "--max-new-tokens", "4", "--json"]
    assert cli.run(bench.main, words) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    tokens = {one["name"].split()[0]: one["visual_tokens"] for one in found["variants"]}
    assert list(tokens) == ["full", "adaptive", "budget", "onnxruntime"]
    assert tokens["onnxruntime"] == tokens["budget"] < tokens["full"] == full
    assert f"naive: EarlyTom was not released for {case.family.title}" in found["left_out"]


@pytest.mark.parametrize("name", ["internvl", "qwen3_vl"])
def test_a_server_answers_about_the_family_s_frames(name: str, engine: Engine, drawn_clip: Path) -> None:
    """As the pipeline does of the file; twice about one video, which is read once. Frames from the first to the last
    are another clip."""
    case, _, place = engine(name)
    shown: list[torch.Tensor] = []

    async def decoded(taken: TakenVideo, counts: Any, size: tuple[int, int]) -> Clip:
        clip = await decoders.clip(taken, counts, size, pipeline.manifest.model.preprocessing.sampling)
        shown.append(clip.frames)
        return clip

    async def answer(text: str) -> Any:
        message, deadline = ChatMessage("user", text), time.monotonic() + HANG_SECONDS
        asked = Asked((message,), GREEDY, (), None, 12, 12, True, "k", deadline)
        url = "data:video/mp4;base64," + base64.b64encode(drawn_clip.read_bytes()).decode()
        taken = await Media(FetchRules()).take(VideoPart(url=url))
        return [delta async for delta in backend.deltas(asked, taken)][-1].answer

    async def both() -> Any:
        await decoders.start()
        try:
            return [await answer(QUESTION), await answer(OTHER)]
        finally:
            await decoders.close()

    decoders = Decoders()
    with Pipeline.load(place, device="cpu") as pipeline:
        backend = Local(pipeline, decoded, videos=2)
        first, second = asyncio.run(both())
        backend.close()
        assert first.tokens == pipeline.ask(drawn_clip, QUESTION, max_new_tokens=12).tokens
        assert second.tokens == pipeline.ask(drawn_clip, OTHER, max_new_tokens=12).tokens
        assert second.cached_tokens > 0
    (frames,) = shown
    size = (frames.shape[2], frames.shape[3])
    assert torch.equal(frames, load_clip(drawn_clip, case.frames, size, sampling=case.family.sampling).frames)
    assert not torch.equal(frames, load_clip(drawn_clip, case.frames, size).frames)


def test_a_span_a_frame_is_counted_and_inner_merging_goes_on(engine: Engine) -> None:
    case, _, place = engine("internvl")
    clip, manifest = case.clip(case.video()), Manifest.read(place)
    with Pipeline.load(place) as pipeline:
        answer = pipeline.ask(clip, QUESTION, max_new_tokens=12, kept=True)
        assert answer.kept is not None
        words = build_prompt(pipeline._core.tokenizer, QUESTION, family=case.family)
        spans = frame_spans(answer.kept.positions, answer.kept.sources, manifest.tokens_per_frame)
        assert answer.prompt_tokens == words.length(manifest.tokens, spans)
        with pipeline.watch(clip) as watched:
            cached = watched.ask(QUESTION, max_new_tokens=12).cached_tokens
        assert cached == answer.prompt_tokens - len(words.suffix_ids)
    with Pipeline.load(place, inner=InnerMerge(1, 0.5)) as merging:
        assert merging.ask(clip, QUESTION, max_new_tokens=12).prompt_tokens == answer.prompt_tokens


def test_states_of_layers_are_in_the_engine_s_tokens(engine: Engine) -> None:
    case, _, place = engine("qwen3_vl")
    manifest = Manifest.read(place)
    assert manifest.model.preprocessing.size == case.size
    assert manifest.frames_per_stage == (4, 3, 2)  # pairs of pictures
    assert manifest.dim == 3 * 32
    (graph,) = manifest.layout.graphs
    shapes = {tensor.name: tensor.shape for tensor in (*graph.inputs, *graph.outputs)}
    assert (shapes["frames"], shapes["sources"]) == ((case.frames, 3, *case.size), (2, 4))
    assert shapes["tokens"] == (manifest.tokens, 3 * 32)


def test_an_engine_of_several_counts_answers_as_that_of_one(engine: Engine, tmp_path: Path) -> None:
    case, folder, place = engine("qwen3_vl")
    several = case.built(folder, tmp_path / "counts", *case.on, "--frames", f"4,{case.frames}")  # through the gate
    with Pipeline.load(several) as pipeline, Pipeline.load(place) as alone:
        clip = case.clip(case.video())
        answer = pipeline.ask(clip, QUESTION, max_new_tokens=12)
        assert answer.tokens == alone.ask(clip, QUESTION, max_new_tokens=12).tokens
        less = pipeline.ask(case.clip(case.video(), frames=4), QUESTION, max_new_tokens=12)
        assert less.visual_tokens == pipeline.manifest.tokens_per_frame < answer.visual_tokens  # half of two frames


def test_a_layer_that_sees_windows_cannot_be_the_last_to_merge_after(tmp_path: Path, drawn_clip: Path) -> None:
    case = CASES["qwen2_5_vl"]
    folder = case.folder(tmp_path)
    words = ["--model", str(folder), "--frames", str(case.frames), "--merge-layers", "0"]
    with pytest.raises(UserError, match=r"layer 0 of this tower attends within windows.* end with one of 1, 2"):
        build.main([*words, "--backend", "onnx", "--dry-run"])
    with pytest.raises(UserError, match="layer 0 of this tower attends within windows"):
        bench.main([*words, "--video", str(drawn_clip), "--ratio", "0.5", "--device", "cpu"])


def test_another_family_takes_its_own_size() -> None:
    with pytest.raises(UserError, match="--size 64x64: LLaVA-OneVision of micro takes frames of "):
        build.main(["--size", "64x64", "--dry-run", "--backend", "onnx"])
