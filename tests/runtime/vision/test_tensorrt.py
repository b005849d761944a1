"""Engines on a GPU in every order, on stand-ins: what is queued and in which order, the addresses, the refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from runtime import trt as seam
from runtime.engine.layout import ENGINE_FILE, OUTPUTS
from runtime.errors import EngineError
from runtime.gpu.graphs import Replay
from runtime.vision import tensorrt
from runtime.vision.open import open_tensorrt
from runtime.vision.tensorrt import engine_tensors
from tests.runtime.vision.stand_ins import LAYOUTS, Engine, Gpu, tensors_of

Opened = Callable[[str], tuple[Any, list[Engine], list[str]]]
CLIP = torch.arange(4, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 8, 8)


def frames(value: int = 1) -> Tensor:
    return torch.full((4, 3, 8, 8), value, dtype=torch.uint8)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    return Gpu(monkeypatch)


@pytest.fixture
def opened(gpu: Gpu, tmp_path: Path) -> Opened:
    """`opened("chunked")`: a backend of one of `LAYOUTS`, its engines, and the log since it was opened."""

    def make(mode: str) -> tuple[Any, list[Engine], list[str]]:
        vision, engines = gpu.open(tmp_path, LAYOUTS[mode])
        return vision, engines, gpu.log

    return make


# What is queued


def test_a_whole_clip_is_ordered_between_the_callers_work(opened: Opened) -> None:
    vision, _, log = opened("whole")
    vision.encode(frames())
    assert log == [
        "host waits for copy",  # the last one out of the pinned buffer
        "engine waits for caller",
        "{",
        "engine notes copy",
        "run on engine",
        "engine notes end",
        "}",
        "caller waits for end",
    ]


def test_a_chain_runs_stage_by_stage_and_reads_each_count(opened: Opened, gpu: Gpu) -> None:
    vision, engines, log = opened("adaptive")
    engines[0].kept, engines[1].kept = 3, 2
    encoded = vision.encode(frames())
    tokens, positions, *_ = encoded
    assert log == [
        "engine waits for caller",
        "{",
        "stage 0 on engine: frames [4, 3, 8, 8]",
        "host waits for engine",
        "stage 1 on engine: hidden [3, 5, 6], received [3, 5], made_of [3, 4]",
        "host waits for engine",
        "}",
    ]
    assert vision.frames_per_stage == (4, 3)
    assert gpu.recorded == [(output.data_ptr(), "caller") for output in encoded]  # who may still read them
    assert (tokens.shape, tokens.dtype, positions.shape) == ((2, 7), torch.float16, (2,))
    assert encoded.sources.shape == (3, 4)
    assert encoded.sources.data_ptr() == engines[1].addresses["sources"] != engines[1].addresses["made_of"]
    assert engines[0].addresses["sources"] == engines[1].addresses["made_of"]


PUSHED = [
    "engine waits for caller",
    "{",
    "host waits for copy",
    "engine notes copy",
    "stage 0 on engine",
    "engine notes end",
    "}",
    "caller waits for end",
]
FINISHED = ["engine waits for caller", "{", "stage 1 on engine", "engine notes end", "}", "caller waits for end"]


def test_every_call_of_a_clip_in_chunks_is_ordered_between_the_callers_work(opened: Opened, gpu: Gpu) -> None:
    vision, _, log = opened("chunked")
    with vision.begin() as clip:
        assert log == ["engine waits for caller"]  # on whose stream the clip's memory is being cleared
        room = clip._room
        owned = [buffer.data_ptr() for buffer in (room.hidden, room.received, *room.encoded)]
        assert sorted(gpu.recorded) == sorted((address, "engine") for address in owned)
        log.clear()
        clip.push(CLIP[:2])
        assert log == PUSHED
        clip.push(CLIP[2:])
        tokens, positions, *_ = clip.finish()
    assert log == [*PUSHED, *PUSHED, *FINISHED]
    assert (tokens.shape, tokens.dtype) == ((9, 7), torch.float16)
    assert (positions.shape, positions.dtype) == ((9,), torch.int64)


def test_several_clips_are_one_run_each_in_its_place(opened: Opened) -> None:
    vision, _, log = opened("batch")
    assert (vision.batch, vision.shape) == (3, (3, 4, 3, 8, 8))
    entered, out = vision._lane.frames, vision._out
    out["positions"].copy_(torch.arange(27).view(3, 9))
    for values, wanted in (((4, 5, 6), [4, 5, 6]), ((7, 8), [7, 8, 8]), ((9,), [9, 9, 9])):
        log.clear()
        found = vision.encode_several([frames(value) for value in values])
        assert log.count("run on engine") == 1
        assert log.count("host waits for copy") == 1
        assert log.index("engine waits for caller") < log.index("run on engine") < log.index("}")
        assert entered[:, 0, 0, 0, 0].tolist() == wanted
        assert [where.tolist()[0] for _, where, *_ in found] == [0, 9, 18][: len(values)]
        addresses = [one.tokens.data_ptr() for one in found]
        assert addresses == [tokens.data_ptr() for tokens in out["tokens"]][: len(values)]
    tokens, positions, *_ = vision.encode(torch.stack([frames(value) for value in (1, 2, 3)]))
    assert entered[:, 0, 0, 0, 0].tolist() == [1, 2, 3]
    assert (tokens.shape, positions.shape) == ((3, 9, 7), (3, 9))


# Where it is


def test_a_whole_clips_memory_is_told_once_and_holds_the_frames(opened: Opened) -> None:
    vision, (engine,), _ = opened("whole")
    told = dict(engine.addresses)
    first = vision.encode(frames(7))
    second = vision.encode(frames(9))
    assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]
    assert [t.data_ptr() for t in first] == [told[name] for name in OUTPUTS]
    assert [(t.shape, t.dtype) for t in first[:2]] == [((9, 7), torch.float16), ((9,), torch.int64)]
    assert vision._lane.frames.data_ptr() == told["frames"]
    assert vision._lane.frames.unique().tolist() == [9]
    assert engine.addresses == told


def test_a_chain_is_told_the_same_memory_every_time(opened: Opened) -> None:
    vision, (first, second), _ = opened("adaptive")
    first.kept, second.kept = 3, 2
    vision.encode(frames())
    told = [dict(engine.addresses) for engine in (first, second)]
    assert second.addresses["hidden"] == first.addresses["merged_hidden"]
    assert second.addresses["received"] == first.addresses["merged_received"]
    first.kept, second.kept = 1, 3
    tokens, *_ = vision.encode(frames(2))
    assert [engine.addresses for engine in (first, second)] == told
    assert second.shapes["hidden"] == (1, 5, 6)
    assert tokens.shape == (3, 7)
    assert tokens.data_ptr() == second.addresses["tokens"]


def test_each_clip_in_chunks_has_memory_of_its_own_told_every_time(opened: Opened) -> None:
    vision, (first, second), _ = opened("chunked")
    tokens, positions, *_ = vision.encode(CLIP)
    told = [dict(engine.addresses) for engine in (first, second)]
    assert second.addresses["tokens"] == tokens.data_ptr()
    assert second.addresses["positions"] == positions.data_ptr()
    assert first.addresses["frames"] == vision._lane.frames.data_ptr()
    assert second.addresses["hidden"] == vision._own._room.hidden.data_ptr()
    vision.encode(CLIP)
    assert [engine.addresses for engine in (first, second)] == told
    with vision.begin() as clip:  # another clip, other memory
        for some in CLIP.split(2):
            clip.push(some)
        clip.finish()
        assert first.addresses == told[0]
        assert not set(second.addresses.values()) & set(told[1].values())


def test_a_short_chunk_is_padded_with_its_last_frame(opened: Opened) -> None:
    vision, _, _ = opened("chunked")
    with vision.begin() as clip:
        clip.push(CLIP[3:])
        assert torch.equal(vision._lane.frames, CLIP[[3, 3]])
        assert clip.encoded == 1
        clip.push(CLIP[1:3])
        assert torch.equal(vision._lane.frames, CLIP[1:3])


def test_what_the_head_writes_goes_to_the_rows_of_its_frames(opened: Opened) -> None:
    vision, _, _ = opened("chunked")
    with vision.begin() as clip:
        for value, some in enumerate(CLIP.split(2), start=1):
            for buffer in vision._out.values():
                buffer.fill_(value)
            clip.push(some)
        assert clip._room.hidden[:, 0, 0].tolist() == [1, 1, 2, 2]
        assert clip._room.received[:, 0].tolist() == [1, 1, 2, 2]


# CUDA graphs


class RecordedGraph(Replay):
    """A graph whose replay is written down."""

    log: list[str]

    def __init__(self, device: torch.device) -> None:
        super().__init__(device)
        self.reason = None

    def _capture(self, function: Callable[[], None], rewind: Callable[[], None]) -> Callable[[], None]:
        function()
        self.log.append("captured")
        return lambda: self.log.append("replayed")


@pytest.fixture
def recorded(gpu: Gpu, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The log, where graphs can be captured."""
    monkeypatch.setattr(tensorrt, "Replay", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "log", gpu.log, raising=False)
    return gpu.log


def test_a_call_replays_the_graph_that_was_captured_once(gpu: Gpu, recorded: list[str], tmp_path: Path) -> None:
    gpu.engines = [engine := Engine(LAYOUTS["whole"].graphs[0], tensors_of(LAYOUTS["whole"].graphs[0]), gpu.log)]
    (tmp_path / ENGINE_FILE).write_bytes(b"plan")
    vision: Any = open_tensorrt(tmp_path, LAYOUTS["whole"], "tensorrt-rtx", device="cpu")
    runner = vision.runner
    assert runner.unreplayed is None
    assert recorded.count("captured") == 1
    recorded.clear()
    for value in (3, 4):
        vision.encode(frames(value))
        assert vision._lane.frames.unique().tolist() == [value]  # where the graph reads
    assert recorded.count("replayed") == 2
    assert not any("run on" in line or line == "captured" for line in recorded)
    replay = runner._replay
    vision.close()
    assert replay.reason is not None  # nothing is left to replay on an engine that is gone
    assert tmp_path / ENGINE_FILE not in replay
    assert engine.addresses


def test_where_no_graph_can_be_captured_each_call_launches_the_engine(opened: Opened) -> None:
    vision, _, log = opened("whole")
    assert "CUDA graphs need a GPU" in vision.runner.unreplayed
    vision.encode(frames())
    assert "run on engine" in log


@pytest.mark.parametrize("capturable", [True, False])
def test_an_engine_that_says_it_cannot_be_captured_is_not(
    gpu: Gpu, recorded: list[str], tmp_path: Path, capturable: bool
) -> None:
    part = LAYOUTS["whole"].graphs[0]
    engine: Any = Engine(part, tensors_of(part), gpu.log)
    engine.is_stream_capturable = lambda stream: recorded.append(f"asked about {stream}") or capturable
    gpu.engines = [engine]
    (tmp_path / ENGINE_FILE).write_bytes(b"plan")
    vision: Any = open_tensorrt(tmp_path, LAYOUTS["whole"], "tensorrt-rtx", device="cpu")
    assert recorded.count("asked about engine") == 1
    assert recorded.count("captured") == capturable
    recorded.clear()
    vision.encode(frames())
    assert ("replayed" in recorded, "run on engine" in recorded) == (capturable, not capturable)
    assert (vision.runner.unreplayed is None) == capturable


# What is refused


@pytest.mark.parametrize("mode", LAYOUTS)
def test_frames_on_another_device(opened: Opened, mode: str) -> None:
    vision, _, log = opened(mode)
    elsewhere = torch.zeros(vision.shape, dtype=torch.uint8, device="meta")
    with pytest.raises(EngineError, match="frames are on meta and the engine is on cpu: move the frames there"):
        vision.encode(elsewhere)
    assert not any("on engine" in line for line in log)


def test_clips_that_do_not_fit_are_refused_before_anything_is_queued(opened: Opened) -> None:
    vision, _, log = opened("batch")
    for clips, message in (
        ([], "takes 1 to 3 clips at once, got 0"),
        ([frames()] * 4, "takes 1 to 3 clips at once, got 4"),
        ([frames(), frames()[:1]], "this engine takes frames of shape"),
        ([frames(), frames().to("meta")], "frames are on meta and the engine"),
    ):
        with pytest.raises(EngineError, match=message):
            vision.encode_several(clips)
    with pytest.raises(EngineError, match="4 frames of each of 3 videos"):
        vision.encode(frames())
    assert log == []
    vision.close()
    with pytest.raises(RuntimeError, match="closed"):
        vision.encode_several([frames()])


@pytest.mark.parametrize(
    ("mode", "stage", "what"),
    [
        ("whole", 0, "the engine"),
        ("adaptive", 0, "stage 0"),
        ("adaptive", 1, "stage 1"),
        ("chunked", 0, "stage 0"),
        ("chunked", 1, "stage 1"),
    ],
)
def test_a_run_that_is_refused(opened: Opened, mode: str, stage: int, what: str) -> None:
    vision, engines, _ = opened(mode)
    engines[stage].refuses = True
    with pytest.raises(EngineError, match=f"tensorrt-rtx refused to run {what}: out of memory"):
        vision.encode(frames())
    engines[stage].refuses = False
    vision.encode(frames())  # and it is not stuck


@pytest.mark.parametrize(
    ("stage", "kept", "line"),
    [
        (0, 0, "stage 0 of the tensorrt-rtx engine kept 0 of 4 frames"),
        (0, 5, "kept 5 of 4 frames"),
        (1, 9, "kept 9 of 6 tokens"),
    ],
)
def test_a_count_that_cannot_be(opened: Opened, stage: int, kept: int, line: str) -> None:
    vision, engines, _ = opened("adaptive")
    engines[0].kept, engines[1].kept = 3, 2
    good, engines[stage].kept = engines[stage].kept, kept
    with pytest.raises(EngineError, match=line):
        vision.encode(frames())
    engines[stage].kept = good
    vision.encode(frames())  # and it is not stuck


@pytest.mark.parametrize("mode", LAYOUTS)
def test_closing_waits_for_what_is_running(opened: Opened, mode: str) -> None:
    vision, _, log = opened(mode)
    vision.close()
    vision.close()
    assert log == ["host waits for engine"]
    with pytest.raises(RuntimeError, match="closed"):
        vision.encode(torch.zeros(vision.shape, dtype=torch.uint8))


@pytest.mark.parametrize("mode", LAYOUTS)
def test_what_cannot_be_opened(
    opened: Opened, gpu: Gpu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    layout = LAYOUTS[mode]
    parts, paths = layout.graphs, [tmp_path / part.file(ENGINE_FILE) for part in layout.graphs]

    def refused(message: str) -> None:
        with pytest.raises(EngineError, match=message) as caught:
            open_tensorrt(tmp_path, layout, "tensorrt-rtx", device="cpu")
        assert "\n" not in str(caught.value)

    opened(mode)  # negative control
    gpu.engines = [None]
    refused(rf"cannot load .*{paths[0].name} \(out of memory\).*rebuild")
    gpu.engines = [Engine(part, tensors_of(part, layout.batch), gpu.log) for part in parts]
    gpu.engines[-1].room = False  # type: ignore[union-attr]
    refused(rf"cannot run .*{paths[-1].name} here .*--frames")
    paths[-1].unlink()
    refused(rf"{paths[-1].name} is missing: rebuild")
    paths[-1].write_bytes(b"plan")
    monkeypatch.setattr(tensorrt.torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(tensorrt.torch, "__version__", "2.0", raising=False)
    for has, message in ((False, "NVIDIA GPU and none was found"), (True, "CUDA build of torch")):
        monkeypatch.setattr(seam, "has_gpu", lambda has=has: has)
        refused(f"{message}.*use --backend onnxruntime")


def test_a_gpu_but_no_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def missing(name: str) -> None:
        raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(seam.importlib, "import_module", missing)
    (tmp_path / ENGINE_FILE).write_bytes(b"plan")
    with pytest.raises(EngineError, match="tensorrt is not installed: pip install"):
        open_tensorrt(tmp_path, LAYOUTS["whole"], "tensorrt")


WHOLE = {
    "frames": ((2, 3, 4, 4), "UINT8"),
    "tokens": ((5, 8), "HALF"),
    "positions": ((5,), "INT64"),
    "sources": ((2, 2), "FLOAT"),
    "place": ((5,), "INT64"),
    "bias": ((5,), "FLOAT"),
}

PART = LAYOUTS["whole"].graphs[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": None, "pixels": ((2, 3, 4, 4), "UINT8")}, "takes .'pixels'.*expected frames"),
        ({"positions": None}, "expected frames and tokens, positions"),
        ({"tokens": ((-1, 8), "HALF")}, r"tokens is HALF \[-1, 8\], expected fixed sizes"),
        ({"tokens": ((5, 8), "FP8")}, "tokens is FP8"),
        ({"frames": ((2, 3, 4, 4), "HALF")}, "frames is torch.float16, expected torch.uint8"),
        ({"positions": ((5,), "INT32")}, "positions is torch.int32, expected torch.int64"),
        ({"frames": ((3, 2, 3, 4, 4), "UINT8")}, r"frames has shape \[3, 2, 3, 4, 4\], expected 4 sizes"),
        ({"sources": None}, "expected frames and tokens, positions, sources, place, bias"),
        ({"bias": ((5,), "HALF")}, "bias is torch.float16, expected torch.float32"),
        ({"tokens": ((1, 5, 8), "HALF")}, r"tokens has shape \[1, 5, 8\], expected 2 sizes"),
    ],
)
def test_tensors_that_are_not_the_layouts(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    tensors = {name: value for name, value in (WHOLE | change).items() if value is not None}
    with pytest.raises(EngineError, match=message):
        engine_tensors(tmp_path, Engine(PART, tensors, []), PART)


def test_more_outputs_are_fine(tmp_path: Path) -> None:
    more = Engine(PART, WHOLE | {"hidden_3": ((2, 4, 8), "FLOAT")}, [])
    assert engine_tensors(tmp_path, more, PART)["hidden_3"] == ((2, 4, 8), torch.float32)
