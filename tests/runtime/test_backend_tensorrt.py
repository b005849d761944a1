"""The TensorRT vision backend: refusals, and the order of what is queued, on a CPU; the numbers where there is a GPU.

On the CPU `torch.cuda` and the library are replaced by stand-ins that write down what was asked of them: they prove the
order (wait, copy, run, event) and the addresses, not that a GPU agrees.
"""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from runtime import trt as seam
from runtime.errors import EngineError
from runtime.gpu.graphs import Replay
from runtime.vision import tensorrt as backend
from runtime.vision.tensorrt import TensorRTVision, engine_tensors

from .gpu_flavour import FLAVOUR, WHY_NOT

SHAPES = {"frames": ((2, 3, 4, 4), "UINT8"), "tokens": ((5, 8), "HALF"), "positions": ((5,), "INT64")}


class Engine:
    """A deserialised engine: name -> (shape, dtype); everything but `frames` is an output."""

    def __init__(self, tensors, context=None):
        self.tensors, self.context = tensors, context
        self.num_io_tensors = len(tensors)

    def get_tensor_name(self, index):
        return list(self.tensors)[index]

    def get_tensor_mode(self, name):
        return f"TensorIOMode.{'INPUT' if name in ('frames', 'pixels') else 'OUTPUT'}"

    def get_tensor_shape(self, name):
        return self.tensors[name][0]

    def get_tensor_dtype(self, name):
        return f"DataType.{self.tensors[name][1]}"

    def create_execution_context(self):
        return self.context


class Context:
    """An execution context that keeps the addresses it is given and writes down its runs."""

    def __init__(self, log, succeeds=True):
        self.log, self.succeeds, self.addresses = log, succeeds, {}

    def set_tensor_address(self, name, address):
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream):
        self.log.append(f"run on {stream}")
        return self.succeeds


def stand_ins(monkeypatch, engine, log):
    """Replace torch's CUDA and the library; returns nothing, everything lands in `log`."""

    class Stream:
        def __init__(self, name):
            self.cuda_stream = name

        def wait_stream(self, other):
            log.append(f"{self.cuda_stream} waits for {other.cuda_stream}")

        def wait_event(self, event):
            log.append(f"{self.cuda_stream} waits for event of {event.stream}")

        def synchronize(self):
            log.append(f"host waits for {self.cuda_stream}")

    class Event:
        stream = None

        def record(self, stream):
            self.stream = stream.cuda_stream
            log.append(f"event on {self.stream}")

        def synchronize(self):
            log.append(f"host waits for event of {self.stream}")

    current = [Stream("caller")]

    @contextlib.contextmanager
    def on(stream):
        log.append("{")
        current.append(stream)
        yield
        current.pop()
        log.append("}")

    cuda = SimpleNamespace(
        is_available=lambda: True,
        device=lambda device: contextlib.nullcontext(),
        Stream=lambda device: Stream("engine"),
        Event=Event,
        stream=on,
        current_stream=lambda device: current[-1],
        synchronize=lambda device: log.append("host waits for all"),
    )
    monkeypatch.setattr(
        backend, "torch", SimpleNamespace(cuda=cuda, zeros=lambda shape, dtype, **_: torch.zeros(shape, dtype=dtype))
    )
    monkeypatch.setattr(Tensor, "record_stream", lambda self, stream: None)
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: engine)
    monkeypatch.setattr(
        seam,
        "load",
        lambda flavour: SimpleNamespace(__version__="1.7.1", ILogger=object, Runtime=lambda logger: runtime),
    )
    monkeypatch.setattr(seam, "errors_of", lambda logger: ["expecting library version 1.8"])


@pytest.fixture
def engine_file(tmp_path):
    path = tmp_path / "vision.engine"
    path.write_bytes(b"plan")
    return path


@pytest.fixture
def opened(monkeypatch, engine_file):
    """A backend on stand-ins, its context, and the log since it was opened."""
    log = []
    context = Context(log)
    stand_ins(monkeypatch, Engine(SHAPES, context), log)
    vision = TensorRTVision(engine_file, "tensorrt-rtx")
    assert "run on engine" in log  # the warm-up
    assert log[-1] == "host waits for all"
    log.clear()
    return vision, context, log


def frames(value=1):
    return torch.full((2, 3, 4, 4), value, dtype=torch.uint8)


def test_a_call_is_ordered_between_the_callers_work(opened):
    vision, _, log = opened
    vision.encode(frames())
    assert log == [
        "host waits for event of engine",  # the last copy out of the pinned buffer
        "engine waits for caller",
        "{",
        "event on engine",
        "run on engine",
        "event on engine",
        "}",
        "caller waits for event of engine",
    ]


def test_buffers_are_allocated_once_and_hold_the_frames(opened):
    vision, context, _ = opened
    first = vision.encode(frames(7))
    second = vision.encode(frames(9))
    assert [t.data_ptr() for t in first] == [t.data_ptr() for t in second]
    assert [t.data_ptr() for t in first] == [context.addresses["tokens"], context.addresses["positions"]]
    assert (first[0].shape, first[0].dtype, first[1].shape, first[1].dtype) == (
        (5, 8),
        torch.float16,
        (5,),
        torch.int64,
    )
    assert vision._buffers["frames"].data_ptr() == context.addresses["frames"]
    assert vision._buffers["frames"].unique().tolist() == [9]


@pytest.mark.parametrize("wrong", [frames()[:1], frames().float(), frames().permute(0, 2, 3, 1)])
def test_frames_that_do_not_fit(opened, wrong):
    vision, _, log = opened
    with pytest.raises(EngineError, match="this engine takes frames"):
        vision.encode(wrong)
    assert log == []


def test_frames_on_another_device(opened):
    vision, _, log = opened
    with pytest.raises(EngineError, match="frames are on meta and the engine"):
        vision.encode(frames().to("meta"))
    assert log == []


SEVERAL = {"frames": ((3, 2, 3, 4, 4), "UINT8"), "tokens": ((3, 5, 8), "HALF"), "positions": ((3, 5), "INT64")}


@pytest.fixture
def opened_for_three(monkeypatch, engine_file):
    """As `opened`, of an engine for three videos at once."""
    log = []
    stand_ins(monkeypatch, Engine(SEVERAL, Context(log)), log)
    vision = TensorRTVision(engine_file, "tensorrt-rtx")
    log.clear()
    return vision, log


def test_several_clips_are_one_run_each_in_its_place(opened_for_three):
    vision, log = opened_for_three
    assert (vision.batch, vision.shape) == (3, (3, 2, 3, 4, 4))
    vision._buffers["positions"].copy_(torch.arange(15).view(3, 5))
    for values, entered in (((4, 5, 6), [4, 5, 6]), ((7, 8), [7, 8, 8]), ((9,), [9, 9, 9])):
        log.clear()
        found = vision.encode_several([frames(value) for value in values])
        assert log.count("run on engine") == 1
        assert log.count("host waits for event of engine") == 1
        assert log.index("engine waits for caller") < log.index("run on engine") < log.index("}")
        assert vision._buffers["frames"][:, 0, 0, 0, 0].tolist() == entered
        assert [where.tolist()[0] for _, where in found] == [0, 5, 10][: len(values)]
        addresses = [tokens.data_ptr() for tokens, _ in found]
        assert addresses == [tokens.data_ptr() for tokens in vision._buffers["tokens"]][: len(values)]
    tokens, positions = vision.encode(torch.stack([frames(value) for value in (1, 2, 3)]))
    assert vision._buffers["frames"][:, 0, 0, 0, 0].tolist() == [1, 2, 3]
    assert (tokens.shape, positions.shape) == ((3, 5, 8), (3, 5))


def test_clips_that_do_not_fit_are_refused_before_anything_is_queued(opened_for_three):
    vision, log = opened_for_three
    for clips, message in (
        ([], "takes 1 to 3 clips at once, got 0"),
        ([frames()] * 4, "takes 1 to 3 clips at once, got 4"),
        ([frames(), frames()[:1]], "this engine takes frames of shape"),
        ([frames(), frames().to("meta")], "frames are on meta and the engine"),
    ):
        with pytest.raises(EngineError, match=message):
            vision.encode_several(clips)
    with pytest.raises(EngineError, match="2 frames of each of 3 videos"):
        vision.encode(frames())
    assert log == []
    vision.close()
    with pytest.raises(RuntimeError, match="closed"):
        vision.encode_several([frames()])


def test_an_engine_for_one_video_takes_one_clip(opened):
    vision, _, _ = opened
    assert vision.batch == 1
    ((tokens, _),) = vision.encode_several([frames(7)])
    assert tokens.data_ptr() == vision._buffers["tokens"].data_ptr()
    with pytest.raises(EngineError, match="takes 1 to 1 clips at once, got 2"):
        vision.encode_several([frames()] * 2)


class RecordedGraph(Replay):
    """A graph whose replay is written down."""

    log: list

    def __init__(self, device):
        super().__init__(device)
        self.reason = None

    def _capture(self, function, rewind):
        function()
        self.log.append("captured")
        return lambda: self.log.append("replayed")


def test_a_call_replays_the_graph_that_was_captured_once(monkeypatch, engine_file):
    log = []
    monkeypatch.setattr(backend, "Replay", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "log", log, raising=False)
    stand_ins(monkeypatch, Engine(SHAPES, Context(log)), log)
    vision = TensorRTVision(engine_file, "tensorrt-rtx")
    assert vision.unreplayed is None
    assert log.count("captured") == 1
    log.clear()
    for value in (3, 4):
        vision.encode(frames(value))
        assert vision._buffers["frames"].unique().tolist() == [value]  # where the graph reads
    assert log.count("replayed") == 2
    assert not any("run on" in line or line == "captured" for line in log)
    vision.close()
    assert vision._replay.reason is not None  # nothing is left to replay on an engine that is gone
    assert (2, 3, 4, 4) not in vision._replay


def test_where_no_graph_can_be_captured_each_call_launches_the_engine(opened):
    vision, _, log = opened
    assert "CUDA graphs need a GPU" in vision.unreplayed
    vision.encode(frames())
    assert "run on engine" in log


@pytest.mark.parametrize("capturable", [True, False])
def test_an_engine_that_says_it_cannot_be_captured_is_not(monkeypatch, engine_file, capturable):
    log = []
    context = Context(log)
    context.is_stream_capturable = lambda stream: log.append(f"asked about {stream}") or capturable
    monkeypatch.setattr(backend, "Replay", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "log", log, raising=False)
    stand_ins(monkeypatch, Engine(SHAPES, context), log)
    vision = TensorRTVision(engine_file, "tensorrt-rtx")
    assert log.count("asked about engine") == 1
    assert log.count("captured") == capturable
    log.clear()
    vision.encode(frames())
    assert ("replayed" in log, "run on engine" in log) == (capturable, not capturable)
    assert (vision.unreplayed is None) == capturable


def test_a_run_that_is_refused(opened):
    vision, context, _ = opened
    context.succeeds = False
    with pytest.raises(EngineError, match=r"tensorrt-rtx refused to run the engine: expecting library version"):
        vision.encode(frames())
    context.succeeds = True
    vision.encode(frames())  # and it is not stuck


def test_one_call_at_a_time_and_none_after_close(opened):
    vision, _, log = opened
    with vision._lock, pytest.raises(RuntimeError, match="busy"):
        vision.encode(frames())
    vision.close()
    vision.close()
    assert log == ["host waits for engine"]
    with pytest.raises(RuntimeError, match="closed"):
        vision.encode(frames())


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (None, r"cannot load .*vision.engine \(expecting library version 1.8\).*rebuild"),
        (Engine(SHAPES, context=None), "cannot run .*--frames"),
    ],
)
def test_an_engine_that_does_not_load(monkeypatch, engine_file, engine, message):
    stand_ins(monkeypatch, engine, [])
    with pytest.raises(EngineError, match=message):
        TensorRTVision(engine_file, "tensorrt-rtx")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"frames": None, "pixels": ((2, 3, 4, 4), "UINT8")}, "takes .'pixels'.*expected frames"),
        ({"positions": None}, "expected frames and tokens, positions"),
        ({"tokens": ((-1, 8), "HALF")}, r"tokens is HALF \[-1, 8\], expected fixed sizes"),
        ({"tokens": ((5, 8), "FP8")}, "tokens is FP8"),
        ({"frames": ((2, 3, 4, 4), "HALF")}, "frames is torch.float16, expected torch.uint8"),
        ({"positions": ((5,), "INT32")}, "positions is torch.int32, expected torch.int64"),
        ({"frames": ((3, 2, 3, 4, 4), "UINT8")}, r"tokens has shape \[5, 8\], expected 3 sizes"),
        ({"tokens": ((1, 5, 8), "HALF")}, r"tokens has shape \[1, 5, 8\], expected 2 sizes"),
    ],
)
def test_tensors_that_are_not_the_contract(tmp_path, change, message):
    tensors = {name: value for name, value in (SHAPES | change).items() if value is not None}
    with pytest.raises(EngineError, match=message):
        engine_tensors(tmp_path, Engine(tensors))


def test_more_outputs_are_fine(tmp_path):
    tensors = engine_tensors(tmp_path, Engine(SHAPES | {"hidden": ((2, 4, 8), "FLOAT")}))
    assert tensors["hidden"] == ((2, 4, 8), torch.float32)


def test_no_such_engine(tmp_path):
    with pytest.raises(EngineError, match=r"vision.engine is missing: rebuild"):
        TensorRTVision(tmp_path / "vision.engine", "tensorrt-rtx")


@pytest.mark.parametrize(("driver", "message"), [((), "none was found"), (((8, 0),), "CUDA build of torch")])
def test_no_gpu_that_torch_can_use(monkeypatch, engine_file, driver, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(seam, "_devices", lambda: driver)
    with pytest.raises(EngineError, match=f"{message}.*use --backend onnxruntime"):
        TensorRTVision(engine_file, "tensorrt-rtx")


def test_a_gpu_but_no_library(monkeypatch, engine_file):
    def missing(name):
        raise ModuleNotFoundError(name, name=name)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(seam.importlib, "import_module", missing)
    with pytest.raises(EngineError, match="tensorrt is not installed: pip install"):
        TensorRTVision(engine_file, "tensorrt")


MATRIX = np.random.default_rng(0).standard_normal((768, 64)).astype(np.float32)


def compile_products(folder, flavour, *videos, target):
    """An engine for `videos` (none: one) at once. A frame's token is its pixels, as one row, times `MATRIX`, which is
    large enough for a kernel that shows as a matrix product; its position is its largest pixel."""
    onnx = pytest.importorskip("onnx")
    from builder.compile import compile_engine

    helper, proto, rank = onnx.helper, onnx.TensorProto, len(videos)
    nodes = [
        helper.make_node("Cast", ["frames"], ["pixels"], to=proto.FLOAT),
        helper.make_node("Reshape", ["pixels", "sizes"], ["rows"]),
        helper.make_node("MatMul", ["rows", "matrix"], ["tokens"], "product"),
        helper.make_node("ReduceMax", ["rows", "last"], ["largest"], keepdims=0),
        helper.make_node("Cast", ["largest"], ["positions"], to=proto.INT64),
    ]
    graph = helper.make_graph(
        nodes,
        "products",
        [helper.make_tensor_value_info("frames", proto.UINT8, (*videos, 4, 3, 16, 16))],
        [
            helper.make_tensor_value_info("tokens", proto.FLOAT, (*videos, 4, 64)),
            helper.make_tensor_value_info("positions", proto.INT64, (*videos, 4)),
        ],
        [
            onnx.numpy_helper.from_array(MATRIX, "matrix"),
            helper.make_tensor("sizes", proto.INT64, (rank + 2,), (*videos, 4, 768)),
            helper.make_tensor("last", proto.INT64, (1,), (rank + 1,)),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10)
    onnx.save(model, folder / "vision.onnx")
    return compile_engine(
        folder / "vision.onnx", folder / "vision.engine", flavour=flavour, dtype="fp32", target=target
    )


def check_products(clip, tokens, positions):
    rows = clip.flatten(1).double()
    torch.testing.assert_close(tokens.double(), rows @ torch.from_numpy(MATRIX).double(), rtol=1e-4, atol=0.1)
    assert positions.tolist() == rows.max(1).values.long().tolist()


@pytest.mark.parametrize("videos", [(), (3,)])
def test_the_engines_of_the_tests_on_a_gpu_can_be_built(tmp_path, videos):
    """As far as a machine without one can tell: their precision is proved, and the products are right."""
    if "tensorrt-rtx" not in seam.flavours():
        pytest.skip("tensorrt-rtx is not installed")
    onnxruntime = pytest.importorskip("onnxruntime")
    report = compile_products(tmp_path, "tensorrt-rtx", *videos, target=(8, 0))
    assert report.layers.flop_shares == {"fp32": 1.0}
    clips = torch.randint(0, 256, (*videos, 4, 3, 16, 16), dtype=torch.uint8)
    tokens, positions = onnxruntime.InferenceSession(tmp_path / "vision.onnx").run(None, {"frames": clips.numpy()})
    each = (clips.view(-1, 4, 3, 16, 16), tokens.reshape(-1, 4, 64), positions.reshape(-1, 4))
    for clip, *found in zip(*each, strict=True):
        check_products(clip, *map(torch.from_numpy, found))


@pytest.mark.gpu
@pytest.mark.skipif(FLAVOUR is None, reason=WHY_NOT)
def test_on_a_gpu(tmp_path):
    """Calls on several streams, of frames here and there, do not disturb each other."""
    compile_products(tmp_path, FLAVOUR, target=torch.cuda.get_device_capability())
    vision = TensorRTVision(tmp_path / "vision.engine", FLAVOUR)
    assert vision.unreplayed is None
    generator = torch.Generator().manual_seed(0)
    for call in range(20):
        clip = torch.randint(0, 256, (4, 3, 16, 16), generator=generator, dtype=torch.uint8)
        with torch.cuda.stream(torch.cuda.Stream()):
            tokens, positions = vision.encode(clip if call % 2 else clip.cuda(non_blocking=True))
            got = (tokens.cpu(), positions.cpu())
        check_products(clip, *got)
    vision.close()


@pytest.mark.gpu
@pytest.mark.skipif(FLAVOUR is None, reason=WHY_NOT)
def test_several_clips_on_a_gpu(tmp_path):
    """Each clip has its own tokens, whatever lies beside it in the batch."""
    compile_products(tmp_path, FLAVOUR, 3, target=torch.cuda.get_device_capability())
    vision = TensorRTVision(tmp_path / "vision.engine", FLAVOUR)
    assert vision.batch == 3
    generator = torch.Generator().manual_seed(0)
    for call in range(12):
        clips = list(torch.randint(0, 256, (1 + call % 3, 4, 3, 16, 16), generator=generator, dtype=torch.uint8))
        where = [clip.cuda() if (call + place) % 2 else clip for place, clip in enumerate(clips)]
        with torch.cuda.stream(torch.cuda.Stream()):
            found = [(tokens.cpu(), positions.cpu()) for tokens, positions in vision.encode_several(where)]
        assert len(found) == len(clips)
        for clip, (tokens, positions) in zip(clips, found, strict=True):
            check_products(clip, tokens, positions)
    vision.close()
