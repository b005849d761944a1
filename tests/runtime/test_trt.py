"""The seam to TensorRT: versions, missing and broken installations, which backend is chosen, and the callbacks."""

import importlib
from types import SimpleNamespace

import pytest

from runtime import trt as seam
from runtime.errors import EngineError


def installed(monkeypatch, **modules):
    """Make exactly these modules importable: name -> version, or an exception that its import raises."""

    def import_module(name):
        found = modules.get(name)
        if found is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        if isinstance(found, Exception):
            raise found
        return SimpleNamespace(__version__=found, Builder=object)

    monkeypatch.setattr(importlib, "import_module", import_module)


def devices(monkeypatch, *capabilities):
    monkeypatch.setattr(seam, "_devices", lambda: capabilities)


@pytest.mark.parametrize(
    ("text", "version"),
    [("1.7.1.116", (1, 7, 1, 116)), ("10.15.0.27.post1", (10, 15, 0, 27)), ("11.0.0b2", (11, 0, 0)), ("x", ())],
)
def test_versions_are_tuples(text, version):
    assert seam.version(SimpleNamespace(__version__=text)) == version


@pytest.mark.parametrize("version", ["10.15.0.1", "10.100", "11.4.0"])
def test_supported_versions_load(monkeypatch, version):
    installed(monkeypatch, tensorrt=version)
    assert seam.load("tensorrt").__version__ == version


@pytest.mark.parametrize(
    ("flavour", "version"),
    [("tensorrt", "10.14.1"), ("tensorrt", "9.3"), ("tensorrt", "12.0"), ("tensorrt-rtx", "1.6.9"), ("tensorrt", "x")],
)
def test_other_versions_are_refused(monkeypatch, flavour, version):
    installed(monkeypatch, **{seam.FLAVOURS[flavour].module: version})
    with pytest.raises(EngineError) as error:
        seam.load(flavour)
    assert version in str(error.value)
    assert seam.FLAVOURS[flavour].versions in str(error.value)
    assert "pip install" in str(error.value)


@pytest.mark.parametrize(("flavour", "extra"), [("tensorrt", "tensorrt"), ("tensorrt-rtx", "rtx")])
def test_a_missing_library_names_the_extra(monkeypatch, flavour, extra):
    installed(monkeypatch)
    with pytest.raises(EngineError, match=rf'not installed: pip install "earlytom-engine-builder\[{extra}\]"') as error:
        seam.load(flavour)
    assert isinstance(error.value.__cause__, ModuleNotFoundError)


@pytest.mark.parametrize(
    "cause",
    [
        ImportError("libnvinfer.so.11: cannot open shared object file:\n No such file"),
        ModuleNotFoundError("No module named 'tensorrt_bindings'", name="tensorrt_bindings"),
        FileNotFoundError("Could not find: nvinfer_11.dll"),
        AttributeError("module 'tensorrt' has no attribute 'ILogger'"),
    ],
)
def test_an_installation_without_its_libraries(monkeypatch, cause):
    installed(monkeypatch, tensorrt=cause)
    with pytest.raises(EngineError, match="installed but cannot be loaded") as error:
        seam.load("tensorrt")
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is cause
    assert seam.flavours() == {}


def test_a_leftover_folder_is_no_library(monkeypatch):
    monkeypatch.setattr(importlib, "import_module", lambda name: SimpleNamespace(__name__=name))
    with pytest.raises(EngineError, match="installed but cannot be loaded"):
        seam.load("tensorrt")


def test_an_unknown_flavour():
    with pytest.raises(EngineError, match="'onnx': expected one of tensorrt, tensorrt-rtx"):
        seam.load("onnx")


BOTH = {"tensorrt": "10.16.0", "tensorrt_rtx": "1.7.1"}


def test_the_plugin_module_of_tensorrt(monkeypatch):
    installed(monkeypatch, **BOTH, **{"tensorrt.plugin": "10.16.0"})
    found = importlib.import_module("tensorrt.plugin")
    found.aot_impl = found.KernelLaunchParams = object()
    monkeypatch.setattr(
        importlib, "import_module", lambda name, real=importlib.import_module: found if "." in name else real(name)
    )
    assert seam.load_plugins("tensorrt") is found


@pytest.mark.parametrize(
    ("modules", "flavour", "message"),
    [
        (BOTH, "tensorrt-rtx", "tensorrt-rtx has no plugins: use --compression native, or --backend tensorrt"),
        ({}, "tensorrt", "tensorrt is not installed"),
        (BOTH, "tensorrt", r"10\.16\.0 has no plugin module that can be loaded \(No module named 'tensorrt.plugin'\)"),
        ({**BOTH, "tensorrt.plugin": ImportError("numpy\nis missing")}, "tensorrt", r"\(numpy is missing\).*--upgrade"),
        ({**BOTH, "tensorrt.plugin": "10.16.0"}, "tensorrt", "cannot take plugins compiled ahead of time"),
    ],
)
def test_plugins_that_cannot_be_had(monkeypatch, modules, flavour, message):
    installed(monkeypatch, **modules)
    with pytest.raises(EngineError, match=message) as error:
        seam.load_plugins(flavour)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("modules", "gpus", "backend", "reason"),
    [
        (BOTH, [(8, 0)], "tensorrt", "10.16.0 and a GPU"),
        (BOTH, [], "tensorrt-rtx", "no GPU here"),
        ({"tensorrt_rtx": "1.7.1"}, [(8, 0)], "tensorrt-rtx", "tensorrt cannot be loaded"),
        ({"tensorrt": "10.14", "tensorrt_rtx": "1.7.1"}, [(8, 0)], "tensorrt-rtx", "tensorrt cannot be loaded"),
        ({"tensorrt": "10.16.0"}, [(8, 0)], "tensorrt", "a GPU"),
        ({"tensorrt": "10.16.0"}, [], "onnx", "only the ONNX file"),
        ({}, [], "onnx", "earlytom-engine-builder[rtx]"),
    ],
)
def test_auto(monkeypatch, modules, gpus, backend, reason):
    installed(monkeypatch, **modules)
    devices(monkeypatch, *gpus)
    choice = seam.resolve_backend("auto")
    assert choice.backend == backend
    assert reason in choice.reason


def test_a_backend_by_name_is_not_exchanged(monkeypatch):
    installed(monkeypatch, **BOTH)
    devices(monkeypatch, (8, 0))
    assert [seam.resolve_backend(n).backend for n in ("onnx", "tensorrt", "tensorrt-rtx")] == [
        "onnx",
        "tensorrt",
        "tensorrt-rtx",
    ]
    devices(monkeypatch)
    with pytest.raises(EngineError, match="none was found: use --backend tensorrt-rtx"):
        seam.resolve_backend("tensorrt")
    installed(monkeypatch, tensorrt="10.16.0")
    with pytest.raises(EngineError, match="tensorrt-rtx is not installed"):
        seam.resolve_backend("tensorrt-rtx")
    with pytest.raises(EngineError, match="'trt': expected auto, tensorrt, tensorrt-rtx or onnx"):
        seam.resolve_backend("trt")


class Driver:
    """Stands in for libcuda: status of cuInit, capability of every device."""

    def __init__(self, capabilities, status=0):
        self.capabilities, self.status = capabilities, status

    def cuInit(self, flags):  # noqa: N802
        return self.status

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = len(self.capabilities)
        return 0

    def cuDeviceGetAttribute(self, value, attribute, index):  # noqa: N802
        value._obj.value = self.capabilities[index][attribute - 75]
        return 0


@pytest.mark.parametrize(
    ("driver", "capability"),
    [
        (OSError("libcuda.so.1: cannot open shared object file"), None),
        (Driver([(8, 0)], status=34), None),  # the stub library that comes with the toolkit
        (Driver([(8, 0)], status=100), None),
        (Driver([]), None),
        (Driver([(9, 0), (8, 0)]), (9, 0)),
    ],
)
def test_the_driver_is_asked_for_gpus(monkeypatch, driver, capability):
    def cdll(name):
        if isinstance(driver, Exception):
            raise driver
        return driver

    monkeypatch.setattr(seam.ctypes, "CDLL", cdll)
    monkeypatch.setattr(seam, "_devices", seam._devices.__wrapped__)
    assert seam.gpu_capability() == capability
    assert seam.has_gpu() is (capability is not None)


class ILogger:
    class Severity:
        pass


FAKE = SimpleNamespace(ILogger=ILogger, IStreamWriter=object, IProgressMonitor=object)


@pytest.mark.parametrize(("verbose", "kept"), [(False, ["bad", "hm"]), (True, ["bad", "hm", "detail"])])
def test_the_logger_keeps_what_matters(verbose, kept):
    logger = seam.collecting_logger(FAKE, verbose=verbose)
    for severity, text in (("ERROR", "bad\n  thing"), ("WARNING", "hm"), ("VERBOSE", "detail")):
        logger.log(f"Severity.{severity}", text)
    assert [m.text.split()[0] for m in logger.messages] == kept
    assert seam.errors_of(logger) == ["bad thing"]


def parser_error(index, name, operator, description, stack=()):
    return SimpleNamespace(
        node=lambda: index,
        node_name=lambda: name,
        node_operator=lambda: operator,
        desc=lambda: description,
        local_function_stack=lambda: list(stack),
    )


def test_parser_errors_name_node_operator_and_caller():
    errors = [
        parser_error(3, "nz", "NonZero", "no such\nplugin", ["select (SelectTokens)"]),
        parser_error(-1, "", "", "cannot open file"),
    ]
    parser = SimpleNamespace(num_errors=2, get_error=errors.__getitem__)
    assert seam.parser_errors(parser) == [
        "node 'nz' (NonZero) inside select (SelectTokens): no such plugin",
        "the graph: cannot open file",
    ]


def test_progress_returns_to_the_outer_phase():
    seen = []
    monitor = seam.progress_monitor(FAKE, lambda *state: seen.append(state))
    monitor.phase_start("outer", None, 2)
    assert monitor.step_complete("outer", 0) is True
    monitor.phase_start("inner", "outer", 1)
    monitor.step_complete("inner", 0)
    monitor.phase_finish("inner")
    monitor.phase_finish("outer")
    assert seen == [("outer", 0, 2), ("outer", 1, 2), ("inner", 0, 1), ("inner", 1, 1), ("outer", 1, 2)]


def test_a_write_that_fails_is_kept_not_raised(tmp_path):
    with open(tmp_path / "engine", "wb") as file:
        writer = seam.stream_writer(FAKE, file)
        assert writer.write(b"abc") == 3
        assert (writer.written, writer.error) == (3, None)

    class Full:
        def write(self, data):
            raise OSError(28, "No space left on device")

    writer = seam.stream_writer(FAKE, Full())
    assert [writer.write(b"abc"), writer.write(b"abc")] == [-1, -1]
    assert (writer.written, writer.error.errno) == (0, 28)


def test_what_is_installed_here_is_what_is_reported():
    for flavour, version in seam.flavours().items():
        trt = seam.load(flavour)
        assert str(trt.__version__) == version
        assert seam.version(trt) >= seam.FLAVOURS[flavour].minimum
