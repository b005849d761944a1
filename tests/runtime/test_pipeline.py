"""The whole path on the bundled model gives what `model.generate` with EarlyTom applied gives, on every backend."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import shutil
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import SiglipVisionModel

from earlytom import EarlyTomConfig, UserError, apply_earlytom
from runtime.checkpoint import describe, load_model, load_tokenizer
from runtime.decoder.eager import InnerMerge
from runtime.drawing.clips import draw_clip
from runtime.engine.manifest import FileRecord, Manifest, describe_files
from runtime.errors import DeadlineExceeded, EngineError
from runtime.pipeline import Pipeline
from runtime.service import answering, writing
from runtime.service.requests import Answer, Delta, Ready
from runtime.text.prompt import build_prompt, splice
from runtime.video import Clip, load_clip
from tests.processes import HANG_SECONDS

pytestmark = pytest.mark.usefixtures("one_thread")

QUESTION = "What happens?"
TOKENS = 20
# size (height, width), seconds, frames per second: three scenes each, other ones for each seed
SHAPES = [((120, 160), 1.5, 12), ((160, 96), 3.0, 24), ((96, 224), 2.0, 30)]


def load(folder: Path, **how: Any) -> Pipeline:
    """A pipeline on the CPU, where these tests compare to the bit."""
    return Pipeline.load(folder, **{"device": "cpu", **how})


@pytest.fixture(scope="module")
def pipeline(engine: Path, one_thread: None) -> Iterator[Pipeline]:
    with load(engine) as made:
        yield made


@pytest.fixture(scope="module")
def half(half_engine: Path, one_thread: None) -> Iterator[Pipeline]:
    with load(half_engine) as made:
        yield made


@pytest.fixture(scope="module")
def reference(engine: Path, one_thread: None) -> Iterator[Pipeline]:
    with load(engine, backend="torch") as made:
        yield made


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory, drawn_clip: Path) -> list[Path]:
    folder = tmp_path_factory.mktemp("clips")
    made = [
        draw_clip(folder / f"{seed}.mp4", seconds, fps, size, seed)
        for seed, (size, seconds, fps) in enumerate(SHAPES * 2)
    ]
    return [drawn_clip, *made]


@pytest.fixture(scope="module")
def frames(drawn_clip: Path, pipeline: Pipeline) -> Tensor:
    """uint8 [F, 3, H, W] of the drawn clip at the model's size."""
    return ready(pipeline, drawn_clip).frames


@pytest.fixture(scope="module")
def answer(pipeline: Pipeline, frames: Tensor) -> Answer:
    """What the pipeline says about `frames`."""
    return pipeline.ask(frames, QUESTION, max_new_tokens=TOKENS)


class Generate:
    """`model.generate` of the same checkpoint with EarlyTom applied: the other way to the same answer."""

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self.checkpoint = describe(manifest.model.source)
        self.model = load_model(self.checkpoint, torch.float32)
        self.tokenizer = load_tokenizer(self.checkpoint)
        self.config = EarlyTomConfig.from_dict(manifest.earlytom)

    def __call__(
        self,
        video: Path | Tensor,
        question: str,
        config: EarlyTomConfig | None = None,
        system: str | None = None,
        **how: Any,
    ) -> tuple[int, ...]:
        """The greedy answer's token ids, stop token left out."""
        pixels = self.checkpoint.preprocessing
        shown = load_clip(video, self.manifest.frames, pixels.size).frames if isinstance(video, Path) else video
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (pixels.mean, pixels.std))
        ids = build_prompt(self.tokenizer, question, system=system).input_ids(self.manifest.tokens_full + 1)
        how = {"max_new_tokens": TOKENS, "eos_token_id": self.model.generation_config.eos_token_id} | how
        with apply_earlytom(self.model, config or self.config):
            out = self.model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                pixel_values_videos=((shown / 255 - mean) / std)[None],
                do_sample=False,
                **how,
            )
        new = out[0, ids.shape[1] :].tolist()
        return tuple(itertools.takewhile(lambda token: token not in how["eos_token_id"], new))


@pytest.fixture(scope="module")
def generate(pipeline: Pipeline) -> Generate:
    return Generate(pipeline.manifest)


def ready(pipeline: Pipeline, path: Path) -> Clip:
    return load_clip(path, pipeline.manifest.frames, pipeline.manifest.model.preprocessing.size)


def copy(folder: Path, place: Path, **changes: Any) -> Path:
    """A copy of an engine folder whose manifest says `changes`, in good order."""
    shutil.copytree(folder, place, dirs_exist_ok=True)
    manifest = Manifest.read(folder)
    manifest.replace(**{"files": describe_files(place), **changes}).write(place)
    return place


def compiled(folder: Path, place: Path, **changes: Any) -> Path:
    """A copy with a file for a compiled engine, as its manifest says."""
    place.mkdir()
    (place / "vision.engine").write_bytes(b"not a plan")
    return copy(folder, place, backend="tensorrt-rtx", **changes)


# The same answer


@pytest.mark.parametrize("question", [QUESTION, "How many balls are there?"])
def test_greedy_text_is_that_of_generate_with_earlytom_applied(
    pipeline: Pipeline, reference: Pipeline, generate: Generate, clips: list[Path], question: str
) -> None:
    answers = []
    for clip in clips:
        wanted = generate(clip, question)
        for each in (pipeline, reference):
            got = each.ask(clip, question, max_new_tokens=TOKENS)
            assert got.tokens == wanted, (clip.name, each.vision.name)
            assert got.text == generate.tokenizer.decode(wanted, skip_special_tokens=True)
        answers.append(wanted)
    assert len(set(answers)) == len(clips)  # the clips are told apart, so equal answers mean something


def test_the_answer_depends_on_the_method_s_settings(generate: Generate, frames: Tensor, answer: Answer) -> None:
    """Negative control of the test above: without merging, or with other tokens, generate says something else."""
    assert generate(frames, QUESTION) == answer.tokens
    for change in ({"merge_layers": ()}, {"retention_ratio": 0.2}, {"tau": 0.99}):
        assert generate(frames, QUESTION, dataclasses.replace(generate.config, **change)) != answer.tokens, change


def test_a_half_precision_engine_says_the_same(
    half: Pipeline, pipeline: Pipeline, answer: Answer, drawn_clip: Path
) -> None:
    assert half.manifest.dtype == "fp16"
    assert half.ask(drawn_clip, QUESTION, max_new_tokens=TOKENS).tokens == answer.tokens


def test_a_system_message_reaches_the_model(pipeline: Pipeline, generate: Generate, frames: Tensor) -> None:
    got = pipeline.ask(frames, QUESTION, max_new_tokens=TOKENS, system="Answer briefly.")
    assert got.tokens == generate(frames, QUESTION, system="Answer briefly.")
    assert got.tokens != generate(frames, QUESTION)


def test_frames_in_any_form_are_the_file_s(
    pipeline: Pipeline, drawn_clip: Path, frames: Tensor, answer: Answer
) -> None:
    clip = ready(pipeline, drawn_clip)
    channels_last = frames.permute(0, 2, 3, 1)
    forms = [drawn_clip, str(drawn_clip), clip, channels_last, frames.numpy(), np.ascontiguousarray(channels_last)]
    for form in forms:
        assert pipeline.ask(form, QUESTION, max_new_tokens=TOKENS).tokens == answer.tokens, type(form)
    assert pipeline.ask(frames.flip(0), QUESTION, max_new_tokens=TOKENS).tokens != answer.tokens  # negative control


def test_more_frames_than_the_engine_takes_are_sampled(pipeline: Pipeline, frames: Tensor, answer: Answer) -> None:
    twice = frames.repeat_interleave(2, 0)
    assert pipeline.ask(twice, QUESTION, max_new_tokens=TOKENS).tokens == answer.tokens


# Streaming


def test_deltas_joined_are_the_answer(pipeline: Pipeline, frames: Tensor, generate: Generate) -> None:
    *deltas, last = pipeline.stream(frames, QUESTION, max_new_tokens=TOKENS)
    assert last.answer is not None
    assert last.finish == last.answer.finish == "length"
    assert last.token is None
    assert [delta.token for delta in deltas] == list(last.answer.tokens)
    assert all(delta.answer is None and delta.finish is None for delta in deltas)
    joined = "".join(delta.text for delta in (*deltas, last))
    assert joined == last.answer.text == generate.tokenizer.decode(last.answer.tokens, skip_special_tokens=True)
    assert sum(bool(delta.text) for delta in deltas) > TOKENS // 2  # it does come bit by bit
    assert last.answer.visual_tokens == pipeline.manifest.tokens


@pytest.mark.parametrize("tokens", [1, 2, 7])
def test_max_new_tokens(pipeline: Pipeline, frames: Tensor, answer: Answer, tokens: int) -> None:
    got = pipeline.ask(frames, QUESTION, max_new_tokens=tokens)
    assert got.tokens == answer.tokens[:tokens]
    assert got.finish == "length"
    assert (got.timings.per_token == 0) == (tokens == 1)


def test_a_stop_token_ends_the_answer_and_is_not_in_it(
    pipeline: Pipeline, frames: Tensor, answer: Answer, generate: Generate, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop = next(token for token in answer.tokens if token != answer.tokens[0])
    monkeypatch.setattr(pipeline._core, "stops", (stop,))
    got = pipeline.ask(frames, QUESTION, max_new_tokens=TOKENS)
    assert got.finish == "stop"
    assert got.tokens == answer.tokens[: answer.tokens.index(stop)] == generate(frames, QUESTION, eos_token_id=[stop])
    monkeypatch.setattr(pipeline._core, "stops", (answer.tokens[0],))
    nothing = pipeline.ask(frames, QUESTION)
    assert (nothing.text, nothing.tokens, nothing.finish) == ("", (), "stop")
    assert nothing.timings.first_token > 0


def test_stop_tokens_are_those_of_the_checkpoint(pipeline: Pipeline, generate: Generate) -> None:
    assert list(pipeline._core.stops) == generate.model.generation_config.eos_token_id


# Times


def test_times_add_up(pipeline: Pipeline, drawn_clip: Path) -> None:
    times = pipeline.ask(drawn_clip, QUESTION, max_new_tokens=4).timings
    assert all(seconds > 0 for seconds in dataclasses.asdict(times).values())
    assert times.waiting + times.decode + times.preprocess + times.vision + times.prefill <= times.first_token
    assert times.first_token + 3 * times.per_token <= times.total


def test_frames_that_are_ready_cost_no_decoding(pipeline: Pipeline, drawn_clip: Path) -> None:
    clip = ready(pipeline, drawn_clip)
    assert clip.decode_seconds > 0
    times = pipeline.ask(clip, QUESTION, max_new_tokens=1).timings
    assert (times.decode, times.preprocess) == (0, 0)
    assert times.vision + times.prefill <= times.first_token


def test_the_time_of_a_token_is_not_the_reader_s(
    pipeline: Pipeline, drawn_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that ticks once at every look, and 1000 times while the caller has a delta."""
    core = pipeline._core
    clip, question = core.prepare(drawn_clip), core.question(QUESTION, max_new_tokens=4)
    now = itertools.count()
    for module in (answering, writing):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: float(next(now))))
    answer = None
    for delta in core.answer(Ready(clip, question)):
        answer = delta.answer
        now = itertools.count(next(now) + 1000)
    assert answer is not None
    assert answer.timings.per_token == 1
    assert answer.timings.first_token < 10
    assert answer.timings.total > 4000


# Requests of one caller (those of many: test_pipeline_callers.py)


def test_a_second_request_is_answered_while_one_streams(pipeline: Pipeline, frames: Tensor, answer: Answer) -> None:
    """In the same thread; each goes on undisturbed."""
    first = pipeline.stream(frames, QUESTION, max_new_tokens=TOKENS)
    deltas = [next(first)]
    second = pipeline.stream(frames.flip(0), QUESTION, max_new_tokens=TOKENS)
    other = [next(second)]
    assert pipeline.ask(frames, QUESTION, max_new_tokens=2).tokens == answer.tokens[:2]
    deltas += first
    other += second
    assert deltas[-1].answer is not None
    assert other[-1].answer is not None
    assert deltas[-1].answer.tokens == answer.tokens != other[-1].answer.tokens


def test_a_stream_may_move_to_another_thread(pipeline: Pipeline, frames: Tensor, answer: Answer) -> None:
    stream = pipeline.stream(frames, QUESTION, max_new_tokens=TOKENS)
    deltas = [next(stream)]
    thread = threading.Thread(target=lambda: deltas.extend(stream), daemon=True)
    thread.start()
    thread.join(HANG_SECONDS)
    assert deltas[-1].answer is not None
    assert deltas[-1].answer.tokens == answer.tokens
    assert pipeline.ask(frames, QUESTION, max_new_tokens=TOKENS).tokens == answer.tokens


def _closed(stream: Any) -> None:
    stream.close()


def _thrown_into(stream: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        stream.throw(KeyboardInterrupt)


@pytest.mark.parametrize("end", [_closed, _thrown_into])
def test_a_request_that_ends_early_leaves_the_pipeline_usable(
    pipeline: Pipeline, frames: Tensor, answer: Answer, end: Callable[[Any], None]
) -> None:
    stream = pipeline.stream(frames, QUESTION)
    next(stream)
    next(stream)
    end(stream)
    assert pipeline.ask(frames, QUESTION, max_new_tokens=TOKENS).tokens == answer.tokens


def test_an_exception_that_is_still_held_does_not_keep_the_pipeline_busy(
    pipeline: Pipeline, frames: Tensor, answer: Answer
) -> None:
    """Its traceback holds every frame of the request, the decoder's suspended one among them."""
    stream = pipeline.stream(frames, QUESTION)
    next(stream)
    try:
        stream.throw(ZeroDivisionError)
    except ZeroDivisionError:
        assert pipeline.ask(frames, QUESTION, max_new_tokens=TOKENS).tokens == answer.tokens


# Loading and closing


@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_close_twice_and_after_the_block(engine: Path, frames: Tensor, answer: Answer, backend: str) -> None:
    with load(engine, backend=backend) as opened:
        assert opened.vision.name == backend
        assert opened.ask(frames, QUESTION, max_new_tokens=2).tokens == answer.tokens[:2]
        opened.close()
    opened.close()
    with pytest.raises(RuntimeError, match="closed"):
        opened.ask(frames, QUESTION)
    with pytest.raises(RuntimeError, match="closed"):
        opened.vision.encode(frames)


def test_closing_frees_engine_and_decoder(engine: Path, frames: Tensor) -> None:
    opened = load(engine)
    opened.ask(frames, QUESTION, max_new_tokens=1)
    decoder = weakref.ref(opened.decoder)
    gc.collect()
    assert decoder() is not None
    opened.close()
    gc.collect()
    assert decoder() is None


def test_a_stream_under_way_outlives_close(engine: Path, frames: Tensor, answer: Answer) -> None:
    opened = load(engine)
    stream = opened.stream(frames, QUESTION, max_new_tokens=TOKENS)
    tokens: list[Delta] = [next(stream)]
    opened.close()
    assert tuple(delta.token for delta in (*tokens, *stream))[:-1] == answer.tokens


@pytest.mark.parametrize(("backend", "towers"), [("onnxruntime", 0), ("torch", 1)])
def test_vision_weights_are_in_memory_once(engine: Path, backend: str, towers: int) -> None:
    """The engine has its own; the checkpoint's tower stays only where it is the backend."""

    def alive() -> set[int]:
        gc.collect()
        return {id(each) for each in gc.get_objects() if type(each) is SiglipVisionModel}

    before = alive()
    with load(engine, backend=backend) as opened:
        assert len(alive() - before) == towers
        assert opened.decoder is not None


def test_an_engine_of_another_model_is_refused(engine: Path) -> None:
    with pytest.raises(EngineError, match=r"was built from .*talkative\S* .*--model"):
        load(engine, model="random:llava-onevision-qwen2-0.5b-ov")


def test_the_same_weights_from_elsewhere_are_accepted(
    engine: Path, talkative: Path, tmp_path: Path, frames: Tensor, answer: Answer
) -> None:
    """The digest is of what is in the files, so the place does not matter; and one changed weight does."""
    shutil.copytree(talkative, tmp_path / "model")
    with load(engine, model=tmp_path / "model") as opened:
        assert opened.ask(frames, QUESTION, max_new_tokens=2).tokens == answer.tokens[:2]
    weights = load_file(tmp_path / "model" / "model.safetensors")
    name = next(name for name in sorted(weights) if "vision_tower" in name)
    weights[name] = weights[name] + 1
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(EngineError, match="has weights"):
        load(engine, model=tmp_path / "model")


@pytest.mark.parametrize("name", ["manifest.json", "vision.onnx", "vision.engine"])
def test_a_flipped_byte_is_noticed(engine: Path, tmp_path: Path, name: str) -> None:
    folder = compiled(engine, tmp_path / "copy")
    load(folder, backend="onnxruntime").close()  # negative control
    path = folder / name
    damaged = bytearray(path.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(EngineError, match=name) as caught:
        load(folder, backend="onnxruntime")
    assert "\n" not in str(caught.value)


def test_an_engine_of_another_library_version_is_refused(
    engine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("runtime.trt.load", lambda flavour: SimpleNamespace(__version__="1.7.1.116"))
    folder = compiled(engine, tmp_path / "copy", backend_version="1.6.0.5")
    with pytest.raises(EngineError, match=r"1\.6\.0\.5 and 1\.7\.1\.116 is installed.*--force"):
        load(folder, backend="tensorrt-rtx")


def test_a_compiled_engine_runs_in_onnxruntime_without_a_gpu(
    engine: Path, tmp_path: Path, frames: Tensor, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with load(compiled(engine, tmp_path / "copy")) as opened:
        assert opened.vision.name == "onnxruntime"
        assert opened.ask(frames, QUESTION, max_new_tokens=2).tokens == answer.tokens[:2]


def test_a_bf16_engine_runs_in_pytorch_on_a_cpu(
    engine: Path, tmp_path: Path, frames: Tensor, answer: Answer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    folder = copy(engine, tmp_path / "copy", dtype="bf16")
    with load(folder) as opened:
        assert opened.vision.name == "torch"
        assert opened.ask(frames, QUESTION, max_new_tokens=2).tokens == answer.tokens[:2]
    with pytest.raises(EngineError, match=r"bf16.*--backend torch"):
        load(folder, backend="onnxruntime")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")
@pytest.mark.parametrize("backend", ["onnxruntime", "torch"])
def test_the_decoder_on_a_gpu_says_the_same(engine: Path, frames: Tensor, answer: Answer, backend: str) -> None:
    with load(engine, backend=backend, device="cuda", dtype=torch.float32) as opened:
        assert opened.decoder is not None
        assert opened.decoder.device.type == "cuda"
        got = opened.ask(frames, QUESTION, max_new_tokens=TOKENS)
    assert got.tokens == answer.tokens
    assert min(got.timings.vision, got.timings.prefill, got.timings.first_token, got.timings.per_token) > 0


def test_a_device_that_is_not_there_is_one_line(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="--device cpu"):
        Pipeline.load(engine, device="cuda")


def test_a_manifest_without_a_good_record_cannot_be_written(engine: Path, tmp_path: Path) -> None:
    """Negative control of the copies above: `copy` and `compiled` seal what they write, and a stale record shows."""
    stale = {"vision.onnx": FileRecord(1, "0" * 64)}
    with pytest.raises(EngineError, match="the manifest says 1"):
        load(copy(engine, tmp_path / "copy", files=stale))


def test_inner_merging_is_an_option_of_the_pipeline(engine: Path, frames: Tensor) -> None:
    """The same tokens as the decoder gives by itself when it is told where the visual ones are; other than without."""
    inner = InnerMerge(layer=1, ratio=0.7)
    with load(engine) as plain, load(engine, inner=inner) as merging:
        assert merging.decoder is not None
        words = build_prompt(merging._core.tokenizer, QUESTION)
        visual = merging.vision.encode(frames)[0].clone()
        embeds = splice(words, torch.cat([visual, merging._core.splicing.closing[None]]), merging.decoder.embed)
        span = range(len(words.prefix_ids), embeds.shape[1] - len(words.suffix_ids))
        expected = list(merging.decoder.stream(embeds, max_new_tokens=TOKENS, visual=span))
        got = merging.ask(frames, QUESTION, max_new_tokens=TOKENS)
        assert list(got.tokens) == expected[: len(got.tokens)]
        assert got.tokens != plain.ask(frames, QUESTION, max_new_tokens=TOKENS).tokens


def test_inner_merging_and_a_compiled_decoder_exclude_each_other(engine: Path) -> None:
    with pytest.raises(UserError, match="inner merging runs in the PyTorch decoder, not in torch-tensorrt"):
        load(engine, inner=InnerMerge(1), decoder="torch-tensorrt")


# Embeddings, for a decoder elsewhere


def test_embeddings_are_what_the_decoder_answers_from(pipeline: Pipeline, frames: Tensor, answer: Answer) -> None:
    embeds = pipeline.embed(frames, QUESTION)
    tokens = pipeline.vision.encode(frames)[0].clone()
    prompt = build_prompt(pipeline._core.tokenizer, QUESTION)
    assert embeds.shape == (1, prompt.length(len(tokens) + 1), pipeline.manifest.dim)
    span = prompt.visual_span(len(tokens) + 1)
    assert torch.equal(embeds[0, span.start : span.stop - 1], tokens)
    assert pipeline.decoder is not None
    stops = pipeline._core.stops
    ids = tuple(pipeline.decoder.stream(embeds, max_new_tokens=len(answer.tokens), stop_ids=stops))
    assert ids == answer.tokens


def test_embeddings_belong_to_the_caller(pipeline: Pipeline, clips: list[Path]) -> None:
    embeds = pipeline.embed(clips[0], QUESTION)
    kept = embeds.clone()
    pipeline.embed(clips[1], QUESTION)
    assert torch.equal(embeds, kept)
    assert not torch.equal(pipeline.embed(clips[1], QUESTION), kept)  # negative control


def test_what_is_wrong_with_embeddings_is_said_as_by_submit(pipeline: Pipeline, frames: Tensor) -> None:
    with pytest.raises(UserError, match="question is empty"):
        pipeline.embed(frames, "")
    with pytest.raises(UserError, match="2 frames"):
        pipeline.embed(frames[:1], QUESTION)
    with pytest.raises(DeadlineExceeded):
        pipeline.embed(frames, QUESTION, deadline=1e-9)
