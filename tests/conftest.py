"""What the tests of the whole path share: a model, its engines and a clip, each made once a session.

The bundled model answers in a word or two. What has to hold for long answers too is tested with a model of the same
architecture that talks on: its weights are random.
"""

from __future__ import annotations

import os

# The workers fill the cores: further threads, also of commands that tests start, would wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ.setdefault(name, "1")

import torch

# Kernels run in Triton's interpreter where there is no GPU. That is decided when Triton is imported, which transformers
# may do: so before all else.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import contextlib
import gc
import io
import json
import re
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers

from earlytom import micro
from earlytom.families.bundled import architecture
from earlytom.families.tokens import SPECIAL_TOKENS
from earlytom.micro.checkpoint import write_checkpoint
from earlytom.micro.random_model import random_model
from runtime.drawing.clips import draw_clip
from tests import golden_vectors
from tests.shared import Shared, name_of

# Of the small checkpoint below: vision layers, decoder layers.
SMALL = (4, 1)
# What is slow is so because the machine is busy: no example fails for that.
_ANY_SPEED = {"deadline": None, "suppress_health_check": [hypothesis.HealthCheck.too_slow]}
hypothesis.settings.register_profile("any speed", **_ANY_SPEED)
hypothesis.settings.load_profile("any speed")


def pytest_addoption(parser: pytest.Parser) -> None:
    golden_vectors.add_option(parser)


def pytest_collection_finish() -> None:
    """What is imported stays: looking through it for garbage, which an export brings about often, is a sixth of the
    time of one."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)


@pytest.fixture(scope="session", autouse=True)
def _interruptible() -> None:
    """A shell starts what runs in the background with SIGINT ignored, and every command tested would inherit that."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    """Folders that are made once for all workers. Read only: copy what is to be changed."""
    own = tmp_path_factory.getbasetemp()
    made = Shared((own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "shared", own / "copies")
    yield made
    assert made.changed() == [], "a test changed what others read"


@pytest.fixture(scope="session")
def each_export_once(shared: Shared) -> Iterator[None]:
    """The builds of this process export equal graphs once a run, and quickly. For whoever asks: it imports the
    builder."""
    from builder import stages
    from tests.exports import once, quick

    patch = pytest.MonkeyPatch()
    for name in ("export", "export_counts", "export_stages"):
        patch.setattr(stages, name, once(shared, getattr(stages, name)))
    patch.setattr(torch.onnx, "export", quick(torch.onnx.export))
    yield
    patch.undo()


@pytest.fixture(scope="session")
def build_engine(shared: Shared, each_export_once: None) -> Callable[..., Path]:
    """`build_engine("--fp32")`: the folder that the builder's own command makes for ONNX Runtime, unverified, as the
    gate has its own tests."""

    def make(*words: str) -> Path:
        def build_it(out: Path) -> None:
            from builder import build

            with contextlib.redirect_stdout(io.StringIO()):
                build.main([*words, "--backend", "onnx", "--out", str(out), "--no-verify", "--json"])

        return engine_in(shared.copy(name_of("engine", words), build_it))

    return make


def engine_in(out: Path) -> Path:
    """The only engine of the folder `out`."""
    (folder,) = (path for path in out.iterdir() if path.is_dir())
    return folder


@pytest.fixture(scope="session")
def small_checkpoint(shared: Shared) -> Path:
    """The bundled model cut to `SMALL` layers, as a checkpoint folder of the user would be."""
    return shared("small", lambda place: write_small(place / "small")) / "small"


def write_small(folder: Path) -> None:
    source = Path(micro.PATH)
    folder.mkdir()
    for path in source.iterdir():
        if path.suffix in (".json", ".jinja"):
            shutil.copy(path, folder)
    config = json.loads((source / "config.json").read_text())
    config["vision_config"]["num_hidden_layers"], config["text_config"]["num_hidden_layers"] = SMALL
    config["text_config"] |= {"layer_types": ["full_attention"] * SMALL[1], "max_window_layers": SMALL[1]}
    (folder / "config.json").write_text(json.dumps(config))

    def kept(name: str) -> bool:
        layer = re.search(r"layers\.(\d+)\.", name)
        return layer is None or int(layer[1]) < SMALL["vision" not in name]

    weights = load_file(source / "model.safetensors")
    save_file({name: w for name, w in weights.items() if kept(name)}, folder / "model.safetensors", {"format": "pt"})


@pytest.fixture(scope="session")
def talkative(shared: Shared) -> Path:
    """Checkpoint folder like the bundled one, with weights whose greedy texts are long and differ from clip to clip."""
    return shared("talkative", write_talkative) / "checkpoint"


def write_talkative(place: Path) -> None:
    model: Any = random_model(architecture(), torch.float16, seed=6)
    with torch.no_grad():  # single bytes and special tokens are unlikely, so that texts are words and go on
        embeddings = model.get_input_embeddings().weight
        embeddings[: len(pre_tokenizers.ByteLevel.alphabet())] *= 0.25
        embeddings[-len(SPECIAL_TOKENS) :] *= 0.25
    stage = {"stage": "none", "steps": 0, "frames": 0, "seconds": 0.0}
    about = {"seed": 6, "stages": [stage], "hardware": "nothing", "torch": torch.__version__}
    write_checkpoint(place / "checkpoint", model, about, trained=False)


@pytest.fixture(scope="session")
def engine(build_engine: Callable[..., Path], talkative: Path) -> Path:
    """Engine folder of the talkative model in fp32, ratio 0.3. Read only: copy it to change it."""
    return build_engine("--model", str(talkative), "--ratio", "0.3", "--fp32")


@pytest.fixture(scope="session")
def half_engine(build_engine: Callable[..., Path], talkative: Path) -> Path:
    """The same in fp16."""
    return build_engine("--model", str(talkative), "--ratio", "0.3", "--fp16")


@pytest.fixture(scope="session")
def chunked_engine(build_engine: Callable[..., Path], talkative: Path) -> Path:
    """The talkative model in fp32 for 8 frames that come two at a time."""
    return build_engine(*f"--model {talkative} --frames 8 --chunk 2 --ratio 0.3 --fp32".split())


@pytest.fixture(scope="session")
def bundled_engine(build_engine: Callable[..., Path]) -> Path:
    """Engine folder of the bundled model, as the README's first command builds it."""
    return build_engine("--ratio", "0.3", "--fp16")


@pytest.fixture(scope="session")
def drawn_clip(shared: Shared) -> Path:
    """The demo's clip: 6 seconds of 320x240."""
    return shared("drawn_clip", lambda folder: draw_clip(folder / "drawn.mp4")) / "drawn.mp4"


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """The bundled model is so small that a second thread only waits for the first, at length on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
