"""Commands answer at once: help and refusals need none of the libraries that take seconds to import, and Ctrl-C while
those are imported ends in one line.

No clock: the commands run in a process where the libraries cannot be found, or where importing one is interrupted.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import earlytom
from tests.runtime.engine.test_manifest import make

ROOT = Path(__file__).parents[1]
BUILD, VERIFY, INSPECT, EVALUATE = "builder.build", "builder.verify", "builder.inspect", "builder.evaluate"
PLUGINS, KERNELS, DOCTOR = "builder.plugins", "builder.kernels", "builder.doctor"
ASK, BENCH, CLIP, TRAIN = "runtime.ask", "runtime.bench", "runtime.clip", "builder.micro.train"
SERVE, EXTRACT = "runtime.serve", "runtime.extract_decoder"
COMMANDS = (BUILD, VERIFY, INSPECT, EVALUATE, PLUGINS, KERNELS, DOCTOR, ASK, BENCH, CLIP, TRAIN, SERVE, EXTRACT)
SLOW = (
    *("torch", "transformers", "tokenizers", "safetensors", "onnx", "onnx_ir", "onnxscript", "onnxruntime"),
    *("polygraphy", "av", "matplotlib", "triton", "tensorrt", "tensorrt_rtx", "torch_tensorrt"),
    *("fastapi", "starlette", "uvicorn", "prometheus_client", "multipart", "PIL", "httpcore2"),
)
# Importable without any of them, and so for whoever only wants settings, errors or an engine's manifest.
LIGHT = (
    *("earlytom", "earlytom.budget", "earlytom.cells.config", "earlytom.config", "earlytom.errors", "earlytom.flops"),
    *(
        "earlytom.families",
        "earlytom.families.published",
        "earlytom.families.bundled",
        "earlytom.micro",
        "earlytom.numbers",
        "runtime",
        "runtime.choices",
        "runtime.cli",
    ),
    *(
        "runtime.engine.layout",
        "runtime.drawing.clips",
        "runtime.show.figure",
        "runtime.show.html",
        "runtime.errors",
        "runtime.engine.manifest",
    ),
    *(
        "runtime.decoder.sampling",
        "runtime.decoder.naming",
        "runtime.serve.settings",
        "runtime.trt",
        "builder",
        "builder.settings.arguments",
        "builder.settings.parser",
    ),
    *("builder.gate.limits", "builder.inspection.comparison", "builder.precision.islands"),
    *("builder.settings.key", "builder.settings.options", "builder.plugins", "builder.show"),
    *COMMANDS,
)


class Refusal(NamedTuple):
    """A command, what is wrong, and the line that says so."""

    command: str
    words: tuple[str, ...]
    line: str


def refusal(command: str, words: str, line: str) -> Refusal:
    return Refusal(command, tuple(words.split()), f"error: {line}\n")


ENGINE = "engine folder nowhere does not exist: build one with python -m builder.build"
REFUSALS = (
    refusal(BUILD, "--ratio x", "--ratio: 'x' is not a number (--help lists the options)"),
    refusal(BUILD, "--ratio 2", "--ratio must be in (0, 1], got 2.0"),
    refusal(BUILD, "--fp16 --fp32", "--fp32: not allowed with argument --fp16 (--help lists the options)"),
    refusal(BUILD, "--preset videomme --ratio 0.3", "preset 'videomme' was not released at retention ratio 0.3: ..."),
    refusal(BUILD, "--calibration nowhere.mp4", "--calibration nowhere.mp4: no such file; give video files that ..."),
    refusal(BUILD, "--verify-text --no-verify", "--verify-text is a step of the gate, which --no-verify ..."),
    refusal(BUILD, "--workspace 0", "--workspace must be more than 0 GiB, got 0.0"),
    refusal(BUILD, "--target a10", "--target 'a10' is neither a100 nor a compute capability such as 8.0"),
    refusal(BUILD, "--frames x", "--frames 'x': give a whole number, or several such as 8,16,32"),
    refusal(BUILD, "--frames 999", "the number of frames must be between 1 and 128, got 999: set --frames"),
    refusal(BUILD, "--frames 8,16 --frame-budget auto", "--frame-budget auto gives a budget for one frame count, ..."),
    refusal(BUILD, "--frames 8,16 --frame-budget 6,4,3", "the frame budget 6,4,3 fits one frame count, got 8,16: ..."),
    refusal(BUILD, "--merge-layers 5,3", "--merge-layers must be different and ascending, got (5, 3)"),
    refusal(BUILD, "--schedule adaptive --frame-budget 0.5", "--frame-budget is for --schedule budget: ..."),
    refusal(BUILD, "--schedule adaptive --batch 2", "in the adaptive schedule each video decides how many frames ..."),
    refusal(BUILD, "--schedule adaptive --chunk 4", "--chunk cuts an engine of static shapes in two: ..."),
    refusal(BUILD, "--batch 0", "the number of videos must be between 1 and 64, got 0: set --batch"),
    refusal(BUILD, "--chunk 3 --frames 8", "--chunk 3 does not divide the 8 frames of a clip: give one of 1, 2, 4, 8"),
    refusal(BUILD, "--chunk 4 --batch 2", "--chunk 4 is for one video of one frame count at a time, got ..."),
    refusal(BUILD, "--fp32 --islands list", "--islands is for --fp16 and --bf16: with --fp32 everything is fp32"),
    refusal(BUILD, "--islands mud", "--islands 'mud': 'mud' is no island; choose among ..."),
    refusal(BUILD, "--islands norms:3", "--islands 'norms:3': only attention and mlp are chosen by layer, ..."),
    refusal(BUILD, "--backend onnx --compression plugin", "--compression plugin cannot be built: ..."),
    refusal(BUILD, "--backend onnx --hardware-compatible", "--hardware-compatible is for --backend tensorrt; ..."),
    refusal(VERIFY, "", "the following arguments are required: ENGINE (--help lists the options)"),
    refusal(VERIFY, "nowhere", "nothing to do with nowhere: give --polygraphy DIR or --layers"),
    refusal(VERIFY, "nowhere --polygraphy there --model x", "--video and --model are for --layers, ..."),
    refusal(VERIFY, "nowhere --polygraphy there", ENGINE),
    refusal(VERIFY, "nowhere --layers", ENGINE),
    refusal(INSPECT, "nowhere", ENGINE),
    refusal(INSPECT, "nowhere --compare", "--compare: expected one argument (--help lists the options)"),
    refusal(EVALUATE, "--clips 0", "--clips must be at least 1, got 0"),
    refusal(EVALUATE, "--ratios 2", "--ratios must be in (0, 1], got 2.0"),
    refusal(EVALUATE, "--merge-layers x", "--merge-layers 'x': give layer numbers such as ..."),
    refusal(EVALUATE, "--tau 4", "tau must be in [-1, 1], got 4.0"),
    refusal(EVALUATE, "--json nowhere/x.json", "cannot write nowhere/x.json: its folder does not exist; ..."),
    refusal(EVALUATE, "--plot x.png", "matplotlib is not installed, which --plot draws with: ..."),
    refusal(EVALUATE, "--engine nowhere", ENGINE),
    refusal(PLUGINS, "--merges -1", "--merges must be 0 or more and --width 1 or more, got -1 and 3584"),
    refusal(PLUGINS, "--frames 999", "--frames must be between 1 and 128, got 999"),
    refusal(PLUGINS, "--target x", "--target 'x' is neither a100 nor a compute capability such as 8.0"),
    refusal(KERNELS, "--size huge", "--size: invalid choice: 'huge' (choose from 'so400m', 'tiny') (--help ..."),
    refusal(KERNELS, "--device cpu --repeats 0", "--repeats must be at least 1, got 0"),
    refusal(DOCTOR, "--minutes 0", "--minutes must be above 0, got 0.0"),
    refusal(ASK, "-- -v.mp4 what", "video '-v.mp4' does not exist; give the path of a video file"),
    refusal(ASK, "", "the following arguments are required: VIDEO, QUESTION (--help lists the options)"),
    refusal(ASK, "nowhere.mp4 What?", "video 'nowhere.mp4' does not exist; give the path of a video file"),
    refusal(ASK, "http://host/a.mp4 What?", "video 'http://host/a.mp4' is an address; ..."),
    refusal(ASK, "README.md What? --max-new-tokens 0", "... must be ..., got 0"),
    refusal(ASK, "README.md What? --backend gpu", "--backend: invalid choice: 'gpu' (choose from 'auto', ..."),
    refusal(ASK, "README.md What? --inner-ratio 0.5", "--inner-ratio 0.5 needs --inner-layer, the layer to ..."),
    refusal(ASK, "README.md What? --temperature nan", "... got nan"),
    refusal(ASK, "README.md What? --top-k 5", "--top-k and --top-p are for sampling, and --temperature 0 ..."),
    refusal(ASK, "README.md What? --engine nowhere", ENGINE),
    refusal(ASK, "README.md What? --picture a.gif", "--picture 'a.gif': give a name that ends in .png or .mp4"),
    refusal(ASK, "README.md What? --picture a.png", "matplotlib is not installed, which --picture draws with: ..."),
    refusal(BENCH, "--repeats 0", "--repeats must be at least 1, got 0"),
    refusal(BENCH, "--variants x", "--variants: 'x' is not one of full, naive, adaptive, budget (or none), nor ..."),
    refusal(BENCH, "--dtype x", "--dtype: invalid choice: 'x' (choose from 'fp16', 'bf16', 'fp32') (--help ..."),
    refusal(BENCH, "--soak 5 --service", "--soak and --service measure different things: give one of them"),
    refusal(BENCH, "--ratio 3", "retention_ratio must be in (0, 1], got 3.0 (--ratio, --merge-layers, --tau)"),
    refusal(BENCH, "--video nowhere.mp4", "video 'nowhere.mp4' is not a file; give the path of a video, or leave ..."),
    refusal(BENCH, "--plot plots", "matplotlib is not installed, which --plot draws with: ..."),
    refusal(BENCH, "--engine nowhere", ENGINE),
    refusal(BENCH, "--serve here", "--serve 'here' is no address: give one as http://127.0.0.1:8000"),
    refusal(BENCH, "--request-rate 3 --added", "--request-rate, --added is about a server: give its address ..."),
    refusal(BENCH, "--serve http://a --request-rate 0", "--request-rate: '0': expected rates above 0, or inf, ..."),
    refusal(BENCH, "--serve http://a --goodput ttft", "--goodput: 'ttft': expected one of ttft, tpot, e2e with ..."),
    refusal(BENCH, "--serve http://a --goodput e2e:1 e2e:2", "--goodput names e2e, e2e: give each latency once"),
    refusal(BENCH, "--serve http://a --burstiness 0", "--burstiness must be above 0, got 0.0"),
    refusal(BENCH, "--serve http://a --repeat 2", "--repeat must be in [0, 1], got 2.0"),
    refusal(BENCH, "--serve http://a --requests 0", "--requests must be at least 1, got 0"),
    refusal(BENCH, "--serve http://a --requests 5 --seconds 5", "--requests and --seconds both say how long ..."),
    refusal(BENCH, "--serve http://a --seconds 5 --request-rate inf", "--seconds with --request-rate inf: ..."),
    refusal(BENCH, "--serve http://a --frames 8", "--serve measures a server from outside: leave out --frames"),
    refusal(BENCH, "--serve http://a --soak 5 --added", "--soak and --added measure different things: give one ..."),
    refusal(BENCH, "--serve http://a --pid 5", "--pid is for --soak, which looks at the server's memory: give ..."),
    refusal(BENCH, "--serve http://a --engine x", "--engine is for --added; a server has its own engine: leave it out"),
    refusal(BENCH, "--serve http://a --added --engine nowhere", ENGINE),
    refusal(BENCH, "--serve http://a --soak 5 --plot x", "--plot draws runs at given rates: leave it out"),
    refusal(BENCH, "--serve http://a --video nowhere.mp4", "video 'nowhere.mp4' is not a file; give the path of ..."),
    refusal(CLIP, "nowhere/a.mp4", "'nowhere/a.mp4' is in a folder that does not exist; give the path of the mp4 ..."),
    refusal(CLIP, "a.mp4 --size 3", "--size: '3' is no size; give WIDTHxHEIGHT, as in 320x240 (--help ..."),
    refusal(CLIP, "a.mp4 --fps 0", "6.0 seconds at 0 frames per second is no clip; give at least 2 frames in all, ..."),
    refusal(CLIP, f"a.mp4 --fps {10**20}", "... is no clip; ... at most 2000000, 1000 per second"),
    refusal(CLIP, "a.mp4 --seconds 1e20", "1e+20 seconds at 24 frames per second is no clip; ..."),
    refusal(CLIP, "a.mp4 --seed -1", "seed is -1; give a whole number of at least 0"),
    refusal(SERVE, "", "the following arguments are required: ENGINE (--help lists the options)"),
    refusal(SERVE, "nowhere", ENGINE),
    refusal(SERVE, "nowhere --port 70000", "--port must be a whole number between 0 and 65535, got 70000"),
    refusal(SERVE, "nowhere --port x", "--port: invalid int value: 'x' (--help lists the options)"),
    refusal(SERVE, "nowhere --max-body much", "--max-body: 'much' is no size: give bytes, or a number with KiB, ..."),
    refusal(SERVE, "nowhere --max-video 0", "--max-video must be a whole number of at least 1, got 0"),
    refusal(SERVE, "nowhere --waiting -1", "--waiting must be a whole number of at least 0, got -1"),
    refusal(SERVE, "nowhere --deadline 0", "--deadline must be above 0, got 0.0"),
    refusal(SERVE, "nowhere --name a/b", "--name 'a/b': give a word that clients can type, without a slash"),
    refusal(SERVE, "nowhere --metrics-prefix 7", "--metrics-prefix '7': give letters, digits, _ and :, as in vllm:"),
    refusal(SERVE, "nowhere --allow-domain http://a", "--allow-domain 'http://a': give a host name, or *.suffix ..."),
    refusal(SERVE, "nowhere --allow-private", "--allow-private is about hosts that are allowed: name them with ..."),
    refusal(SERVE, "nowhere --decoder tensorrt", "--decoder: unknown decoder 'tensorrt': expected torch, ..."),
    refusal(SERVE, "nowhere --decoder http://a:b/v1", "--decoder: --decoder 'http://a:b/v1' is no address of a ..."),
    refusal(SERVE, "nowhere --decoder-key-file x", "--decoder-key-file is about a vLLM server: give its address ..."),
    refusal(SERVE, "nowhere --otlp collector", "--otlp 'collector': give the address of a collector, as http://..."),
    refusal(SERVE, "nowhere --replicas 2", "--replicas and --max-replicas are Ray's: give --ray, too"),
    refusal(EXTRACT, "nowhere out", ENGINE),
    refusal(EXTRACT, "nowhere", "the following arguments are required: OUT (--help lists the options)"),
    refusal(TRAIN, "--scale 2", "--scale must be above 0 and at most 1, got 2.0"),
    refusal(TRAIN, "--scale 0.5", "--scale below 1 does not replace the bundled weights; ..."),
    refusal(TRAIN, "--scale x", "--scale: invalid float value: 'x' (--help lists the options)"),
)

# Runs commands in one process without the slow libraries; prints status, stdout and stderr of each.
WITHOUT = """
import contextlib, importlib, io, json, runpy, sys

class Without:
    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in slow else self.finder.find_spec(name, path, target)

    def __getattr__(self, name):
        return getattr(self.finder, name)

slow, modules, runs = json.load(sys.stdin)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for name in modules:
    importlib.import_module(name)
outcomes = []
for command, words in runs:
    sys.argv = [command, *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            package = command in ("builder.plugins", "builder.doctor", "runtime.serve")
            main = importlib.import_module(command + ".__main__" if package else command)
            runpy.run_path(main.__file__, run_name="__main__")
            status = None
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            status = repr(error)
    outcomes.append((status, out.getvalue(), err.getvalue()))
print(json.dumps(outcomes))
"""


def without(
    *runs: tuple[str, tuple[str, ...]], modules: tuple[str, ...] = (), slow: tuple[str, ...] = SLOW
) -> list[tuple[Any, str, str]]:
    """Import `modules`, then run commands, where the `slow` libraries cannot be found."""
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT],
        input=json.dumps((slow, modules, runs)),
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT), "COLUMNS": "120"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [tuple(outcome) for outcome in json.loads(done.stdout)]


@pytest.fixture(scope="module")
def refused() -> list[tuple[Any, str, str]]:
    return without(*((case.command, case.words) for case in REFUSALS))


def test_help_needs_no_slow_library() -> None:
    outcomes = without(*((command, ("--help",)) for command in COMMANDS))
    for command, (status, out, err) in zip(COMMANDS, outcomes, strict=True):
        assert (status, err) == (0, ""), command
        assert out.startswith(f"usage: python -m {command} "), command


@pytest.mark.parametrize("index", range(len(REFUSALS)), ids=[f"{c.command} {' '.join(c.words)}" for c in REFUSALS])
def test_refusals_need_no_slow_library(refused: list[tuple[Any, str, str]], index: int) -> None:
    """Status 2 and one line; "..." stands for the rest of it."""
    (status, out, err), wanted = refused[index], REFUSALS[index].line
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert re.fullmatch(".*".join(map(re.escape, wanted.split("..."))), err), err


def test_what_only_knows_words_and_numbers_needs_no_slow_library() -> None:
    without(modules=LIGHT)


def test_the_pipeline_needs_transformers_only_when_it_loads_a_model() -> None:
    """Importing it costs what PyTorch costs."""
    slow = tuple(name for name in SLOW if name not in ("torch", "triton", "av", "safetensors"))
    without(modules=("runtime.pipeline",), slow=slow)


def test_the_libraries_are_blocked() -> None:
    """Negative control: something to do, and no library to do it with."""
    ((status, _, _),) = without((BENCH, ()))
    assert status == "ModuleNotFoundError(\"No module named 'torch'\")"


def test_public_names_are_there_without_being_imported_first() -> None:
    assert set(earlytom.__all__) <= set(dir(earlytom))
    for name in earlytom.__all__:
        assert getattr(earlytom, name).__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = earlytom.nonsense


@pytest.fixture
def interrupted(tmp_path: Path) -> Path:
    """A folder of libraries whose import is interrupted, as by Ctrl-C in its midst."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name in ("torch", "av", "onnx", "onnx_ir", "triton"):
        (folder / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    return folder


# The doctor imports none of them: what a library does in a process of its own is one of its findings.
@pytest.mark.parametrize("command", [command for command in COMMANDS if command != DOCTOR])
def test_ctrl_c_during_imports_is_one_line(command: str, interrupted: Path, tmp_path: Path) -> None:
    make(tmp_path / "engine", backend="onnx").write(tmp_path / "engine")
    words = {
        BUILD: ["--backend", "onnx", "--out", "out"],
        VERIFY: ["engine", "--layers"],
        INSPECT: ["engine"],
        EVALUATE: [],
        PLUGINS: [],
        KERNELS: ["--device", "cpu", "--size", "tiny"],
        ASK: ["engine/vision.onnx", "What?", "--engine", "engine"],
        BENCH: [],
        CLIP: ["a.mp4"],
        SERVE: ["engine"],
        EXTRACT: ["engine", "out"],
        TRAIN: ["--scale", "0.001", "--out", "made", "--work", "work"],
    }[command]
    before = {path.name for path in tmp_path.iterdir()}
    done = subprocess.run(
        [sys.executable, "-m", command, *words],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join((str(interrupted), str(ROOT)))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    line = "stopped; the same command goes on from work\n" if command == TRAIN else "interrupted\n"
    assert (done.returncode, done.stdout, done.stderr) == (130, "", line)
    assert {path.name for path in tmp_path.iterdir()} == before
