"""When `Replay` captures, replays and calls, with recordings in place of CUDA graphs, which test_decoder_gpu.py has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from runtime.gpu.graphs import WARM_UP_RUNS, Replay, ToHost
from tests.runtime.gpu.recorded_graph import RecordedReplay

CPU = torch.device("cpu")


class Adder:
    """A function of fixed buffers: `total` grows by twice `amount`."""

    def __init__(self) -> None:
        self.amount, self.total = torch.ones(3), torch.zeros(3)
        self.calls = 0

    def __call__(self) -> None:
        self.calls += 1
        self.total += 2 * self.amount

    def rewind(self) -> None:
        self.total.zero_()


def test_without_a_gpu_functions_are_called_and_the_reason_is_told() -> None:
    replay, add = Replay(CPU), Adder()
    replay.prepare("add", add, add.rewind)
    assert add.calls == 0  # nothing to prepare
    assert "add" not in replay
    for _ in range(3):
        replay("add", add)
    assert add.calls == 3
    assert add.total.tolist() == [6, 6, 6]
    assert replay.reason == "CUDA graphs need a GPU, and this runs on cpu"


def test_a_capture_is_made_once_and_then_replayed() -> None:
    replay, add = RecordedReplay(), Adder()
    for _ in range(3):
        replay.prepare("add", add, add.rewind)
    assert replay.captures == ["add"]
    assert add.calls == WARM_UP_RUNS + 1
    add.rewind()
    address = add.total.data_ptr()
    for _ in range(3):
        replay("add", add)
    assert add.calls == WARM_UP_RUNS + 1  # Python does not run again
    assert add.total.tolist() == [6, 6, 6]
    add.amount.copy_(torch.tensor([1.0, 0.0, -1.0]))  # a changed input changes the output
    replay("add", add)
    assert add.total.tolist() == [8, 6, 4]
    assert add.total.data_ptr() == address


def test_rewind_comes_before_every_run() -> None:
    replay, add, order = RecordedReplay(), Adder(), list[str]()

    def noted(name: str, function: Callable[[], None]) -> Callable[[], None]:
        return lambda: (order.append(name), function())[1]

    replay.prepare("add", noted("run", add), noted("rewind", add.rewind))
    assert order == ["rewind", "run"] * (WARM_UP_RUNS + 1)


def test_keys_are_told_apart() -> None:
    replay, one, two = RecordedReplay(), Adder(), Adder()
    replay.prepare(1, one, one.rewind)
    replay.prepare(2, two, two.rewind)
    one.rewind(), two.rewind()
    replay(2, two)
    assert (one.total.tolist(), two.total.tolist()) == ([0, 0, 0], [2, 2, 2])
    replay(3, one)  # never prepared: called
    assert one.total.tolist() == [2, 2, 2]


def test_clear_forces_a_new_capture_and_buffers_that_moved_need_it() -> None:
    replay, add = RecordedReplay(), Adder()
    replay.prepare("add", add, add.rewind)
    add.total = torch.zeros(3)
    replay("add", add)
    assert add.total.tolist() == [0, 0, 0]  # negative control: the graph writes to where the buffer was
    replay.clear()
    assert "add" not in replay
    replay("add", add)
    assert add.total.tolist() == [2, 2, 2]  # called
    replay.prepare("add", add, add.rewind)
    assert replay.captures == ["add", "add"]
    add.rewind()
    replay("add", add)
    assert add.total.tolist() == [2, 2, 2]


def test_a_capture_that_fails_is_the_reason_until_clear() -> None:
    replay, add = RecordedReplay(), Adder()
    replay.prepare("before", add, add.rewind)
    replay.fail = "operation not permitted when stream is capturing"
    replay.prepare("add", add, add.rewind)
    assert replay.reason == "the capture failed: operation not permitted when stream is capturing"
    replay.fail = "something else"
    calls = add.calls
    replay.prepare("other", add, add.rewind)
    assert add.calls == calls  # no second try
    assert "operation not permitted" in str(replay.reason)
    add.rewind()
    for key in ("add", "other", "before"):
        replay(key, add)
    assert add.total.tolist() == [6, 6, 6]
    assert add.calls == calls + 2  # "before" was captured, and still is replayed
    replay.fail = None
    replay.clear()
    assert replay.reason is None
    replay.prepare("add", add, add.rewind)
    assert "add" in replay


def test_a_function_that_waits_cannot_be_captured() -> None:
    replay, add = RecordedReplay(), Adder()

    def waits() -> None:
        add()
        if add.total.sum() > 100:
            add.rewind()

    replay.prepare("waits", waits, add.rewind)
    assert "waits" not in replay
    assert "_local_scalar_dense" in str(replay.reason)


def test_a_function_that_fails_as_it_is_fails_as_it_is() -> None:
    replay = RecordedReplay()

    def fails() -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        replay.prepare("fails", fails, lambda: None)
    assert replay.reason is None
    assert "fails" not in replay


class FakeCuda:
    """What `Replay` asks of `torch.cuda`, noted in order; captures and streams do nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail: bool = False) -> None:
        self.order: list[str] = []
        self.now = "main"
        self.fail = fail
        for name in ("Stream", "CUDAGraph", "current_stream", "device", "stream", "graph", "graph_pool_handle"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    class _Stream:
        def __init__(self, cuda: FakeCuda, name: str) -> None:
            self.cuda, self.name = cuda, name

        def wait_stream(self, other: FakeCuda._Stream) -> None:
            self.cuda.order.append(f"{self.name} waits for {other.name}")

    def Stream(self, device: torch.device) -> _Stream:  # noqa: N802  (the name in torch.cuda)
        self.order.append(f"new stream on {device}")
        return self._Stream(self, "side")

    def CUDAGraph(self) -> SimpleNamespace:  # noqa: N802
        return SimpleNamespace(replay=lambda: self.order.append(f"replay on {self.now}"))

    def current_stream(self) -> _Stream:
        return self._Stream(self, self.now)

    def device(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def graph_pool_handle(self) -> str:
        return "pool"

    @contextlib.contextmanager
    def stream(self, stream: _Stream) -> Iterator[None]:
        before, self.now = self.now, stream.name
        try:
            yield
        finally:
            self.now = before

    @contextlib.contextmanager
    def graph(self, graph: object, *, pool: str, stream: _Stream, capture_error_mode: str) -> Iterator[None]:
        assert (pool, stream.name, capture_error_mode) == ("pool", "side", "thread_local")
        self.order.append("capture")
        try:
            yield
        finally:
            self.order.append("end")
            if self.fail:
                self.now = "side"  # as torch leaves it when the end of a capture fails
                raise RuntimeError("CUDA error: capture is invalid\nCompile with TORCH_USE_CUDA_DSA")


# What fails: nothing; the end of the capture; something in it, and therefore its end.
@pytest.mark.parametrize("fail", ["", "capture is invalid", "not permitted"])
def test_a_capture_runs_on_its_own_stream_between_two_waits(monkeypatch: pytest.MonkeyPatch, fail: str) -> None:
    cuda = FakeCuda(monkeypatch, bool(fail))
    replay = Replay(torch.device("cuda", 0))
    assert replay.reason is None

    def run() -> None:
        cuda.order.append(f"run on {cuda.now}")
        if fail == "not permitted" and "capture" in cuda.order:
            raise RuntimeError("CUDA error: not permitted")

    def rewind() -> None:
        cuda.order.append(f"rewind on {cuda.now}")

    replay.prepare("step", run, rewind)
    warm_up = ["rewind on side", "run on side"] * WARM_UP_RUNS
    capture = ["rewind on side", "capture", "run on side", "end"]
    waits = ["side waits for main", *warm_up, *capture, "main waits for side"]
    assert cuda.order == ["new stream on cuda:0", *waits]
    assert cuda.now == "main"
    cuda.order.clear()
    replay("step", run)
    assert cuda.order == (["run on main"] if fail else ["replay on main"])
    assert replay.reason == (f"the capture of a CUDA graph failed: CUDA error: {fail}" if fail else None)
    cuda.order.clear()
    replay.prepare("other", run, rewind)
    assert cuda.order == ([] if fail else waits)  # the stream is there


def test_a_number_is_read() -> None:
    read, number = ToHost(CPU), torch.tensor(7)
    assert read(number) == 7
    number.fill_(-1)
    assert read(number) == -1
