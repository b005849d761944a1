"""The compiled decoder answers as `Decoder` does; programs are made once, checked, kept, and made again when damaged.

On a CPU nothing is compiled: `ExportOnly` keeps the exported programs as they are, so that everything around the
compiler runs. The compiler itself needs a GPU (the tests marked so) and is tested here for how it refuses.
"""

from __future__ import annotations

import gc
import hashlib
import importlib.util
import json
import shutil
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import ExportedProgram

from earlytom.errors import UserError
from runtime import trt
from runtime.decoder import compiler
from runtime.decoder.compiled import CompiledDecoder, Size, default_size
from runtime.decoder.compiler import TorchTensorRT
from runtime.decoder.eager import Decoder
from runtime.decoder.sampling import Sampling
from runtime.decoder.store import PROGRAM_FILE, ProgramStore
from runtime.errors import EngineError
from runtime.parts import DECODER_FOLDER
from runtime.pipeline import Pipeline
from tests.runtime.decoder.tiny_decoder import answer, make_llama, make_qwen, prompt

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = (Size(16, 24), Size(32, 64), Size(16, 64))
CPU = torch.device("cpu")
LOADED: dict[bytes, Any] = {}  # programs by what their file holds, as most tests load the same


class ExportOnly:
    """A `Compiler` that compiles nothing and says so: a program's file is the exported program itself."""

    device = CPU

    def __init__(self, device: torch.device = CPU, spoil: Callable[..., Any] | None = None) -> None:
        self.compiled = self.loaded = 0
        self.version = "1"
        self._spoil = spoil

    def identity(self) -> Mapping[str, str]:
        return {"compiler": f"none {self.version}"}

    def compile(self, program: ExportedProgram, file: Path) -> None:
        self.compiled += 1
        torch.export.save(program, file)

    def load(self, file: Path) -> Any:
        self.loaded += 1
        content = hashlib.sha256(file.read_bytes()).digest()
        if content not in LOADED:
            LOADED[content] = torch.export.load(file).module()
        program = LOADED[content]
        return program if self._spoil is None else lambda *inputs: self._spoil(program, *inputs)


@pytest.fixture(scope="module")
def eager() -> Decoder:
    return Decoder.from_model(make_qwen())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with the programs of `SIZES`. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("store")
    CompiledDecoder.compile(make_qwen(), ExportOnly(), ProgramStore(folder), SIZES)
    return folder


@pytest.fixture(scope="module")
def decoder(folder: Path) -> CompiledDecoder:
    return CompiledDecoder.compile(make_qwen(), ExportOnly(), ProgramStore(folder), SIZES)


# The same answers


@pytest.mark.parametrize(
    ("length", "new"),
    [(1, 8), (2, 22), (7, 8), (15, 8), (16, 8), (16, 9), (16, 48), (17, 8), (31, 1), (32, 32)],
)
def test_greedy_tokens_are_those_of_the_decoder(
    decoder: CompiledDecoder, eager: Decoder, length: int, new: int
) -> None:
    for seed in range(3):
        assert answer(decoder, prompt(length, seed), new) == answer(eager, prompt(length, seed), new)
    assert len({tuple(answer(decoder, prompt(length, seed), new)) for seed in range(3)}) > 1


def test_a_shifted_step_would_be_noticed(folder: Path, eager: Decoder) -> None:
    """Negative control of the test above."""
    decoder = CompiledDecoder.compile(make_qwen(), ExportOnly(), ProgramStore(folder), SIZES[:1])
    for size, program in decoder._programs.items():
        if size.kind == "decode":
            decoder._programs[size] = lambda embeds, last, *caches, program=program: program(embeds, last + 1, *caches)
    shifted = answer(decoder, prompt(7))
    assert shifted[0] == answer(eager, prompt(7))[0]  # the prefill's
    assert shifted != answer(eager, prompt(7))


@pytest.mark.parametrize("sampling", [Sampling(1.0, seed=3), Sampling(0.7, top_p=0.9, top_k=20, seed=4)])
def test_sampling_is_that_of_the_decoder(decoder: CompiledDecoder, eager: Decoder, sampling: Sampling) -> None:
    assert answer(decoder, prompt(9), 12, sampling) == answer(eager, prompt(9), 12, sampling)


def test_a_prefix_is_refused_at_once(decoder: CompiledDecoder, eager: Decoder) -> None:
    for refused in (
        lambda: decoder.prefill(prompt(5)),
        lambda: decoder.stream(prompt(5), max_new_tokens=3, prefix=eager.prefill(prompt(5))),
    ):
        with pytest.raises(UserError, match="use --decoder torch, or ask without a prefix"):
            refused()


def test_a_warm_up_of_any_length_is_none(decoder: CompiledDecoder) -> None:
    """What loads a decoder need not know which: no size holds the last of these."""
    before = dict(decoder._programs)
    decoder.warm_up([10, 64, 128])
    assert decoder._programs == before


def test_nothing_leaks_into_the_next_request(decoder: CompiledDecoder, eager: Decoder) -> None:
    want = answer(eager, prompt(5))
    assert answer(decoder, prompt(5)) == want
    answer(decoder, prompt(16, 1))  # the same size, filled
    for _ in decoder.stream(prompt(12), max_new_tokens=8):
        break  # dropped
    decoder.stream(prompt(9), max_new_tokens=8)  # never started
    broken = prompt(10)
    broken[0, 3] = torch.nan
    with pytest.raises(UserError, match="embeddings hold values that are not finite"):
        answer(decoder, broken)
    assert answer(decoder, prompt(5)) == want


def test_the_dtype_is_the_models(tmp_path: Path) -> None:
    model = make_qwen(num_hidden_layers=1).bfloat16()
    made = CompiledDecoder.compile(model, ExportOnly(), ProgramStore(tmp_path), SIZES[:1])
    assert made.dtype == torch.bfloat16
    eager = Decoder.from_model(model)  # rounds elsewhere, so near ties may go the other way
    same = [answer(made, prompt(n), 1) == answer(eager, prompt(n), 1) for n in range(4, 16)]  # converted from float32
    assert sum(same) >= 10


# Positions and a bias


@pytest.fixture(scope="module")
def placed_decoder(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> CompiledDecoder:
    """Made in a store that has the programs of `SIZES` without places."""
    store = ProgramStore(Path(shutil.copytree(folder, tmp_path_factory.mktemp("placed") / "store")))
    counting = ExportOnly()
    made = CompiledDecoder.compile(make_qwen(), counting, store, SIZES[:2], placed=True)
    assert counting.compiled == 4  # they are other programs
    again = ExportOnly()
    CompiledDecoder.compile(make_qwen(), again, store, SIZES[:2])
    CompiledDecoder.compile(make_qwen(), again, store, SIZES[:2], placed=True)
    assert again.compiled == 0
    return made


def places_of(length: int, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1000 * seed + length)
    return {
        "positions": torch.randint(1, 5, (length,), generator=generator).cumsum(0),
        "bias": torch.randn(length, generator=generator) * 2,
    }


@pytest.mark.parametrize(("length", "new"), [(1, 8), (15, 9), (16, 8), (16, 9), (31, 8), (32, 32)])
def test_with_places_the_tokens_are_those_of_the_decoder(
    placed_decoder: CompiledDecoder, eager: Decoder, length: int, new: int
) -> None:
    seen = set()
    for seed in range(2):
        places = places_of(length, seed)
        for how in ({}, {"positions": places["positions"]}, {"bias": places["bias"]}, places):
            got = list(placed_decoder.stream(prompt(length), max_new_tokens=new, **how))
            assert got == list(eager.stream(prompt(length), max_new_tokens=new, **how))
            seen.add(tuple(got))
    assert len(seen) > (3 if length > 1 else 0)  # they change answers; a first token sees itself alone


def test_a_position_that_stands_still_would_be_noticed(placed_decoder: CompiledDecoder, eager: Decoder) -> None:
    """Negative control of the test above."""
    kept = dict(placed_decoder._programs)
    for size, program in kept.items():
        if size.kind == "decode":
            placed_decoder._programs[size] = lambda embeds, last, position, *rest, program=program: program(
                embeds, last, position * 0, *rest
            )
    try:
        got = list(placed_decoder.stream(prompt(9), max_new_tokens=8, **places_of(9)))
    finally:
        placed_decoder._programs = kept
    assert got != list(eager.stream(prompt(9), max_new_tokens=8, **places_of(9)))


def test_programs_without_places_refuse_them_at_once(decoder: CompiledDecoder) -> None:
    for name, values in places_of(9).items():
        with pytest.raises(UserError, match="--decoder torch, or --no-bias --positions consecutive") as error:
            decoder.stream(prompt(9), max_new_tokens=8, **{name: values})
        assert "\n" not in str(error.value)


# Sizes


def test_a_request_takes_the_smallest_size(decoder: CompiledDecoder) -> None:
    assert decoder.sizes == (Size(16, 24), Size(16, 64), Size(32, 64))
    assert (decoder.limit, decoder.buckets) == (64, (24, 64))
    chosen = [decoder._size(*need) for need in ((16, 24), (16, 25), (17, 18), (32, 64))]
    assert chosen == [Size(16, 24), Size(16, 64), Size(32, 64), Size(32, 64)]


def test_what_no_size_holds_is_refused_at_once(decoder: CompiledDecoder) -> None:
    with pytest.raises(UserError, match=r"prompt of 33 tokens and 8 new ones fit none .* 32 of 64\).*--decoder torch"):
        decoder.stream(prompt(33), max_new_tokens=8)
    with pytest.raises(UserError, match="65 positions, the decoder has 64"):
        decoder.stream(prompt(30), max_new_tokens=35)


@pytest.mark.parametrize("sizes", [[], [Size(1, 24)], [Size(24, 24)], [Size(16, 129)], [Size(0, 8)]])
def test_sizes_that_cannot_be_are_refused(tmp_path: Path, sizes: list[Size]) -> None:
    with pytest.raises(ValueError, match=r"prompt < cache <= 128|positive"):
        CompiledDecoder.compile(make_qwen(), ExportOnly(), ProgramStore(tmp_path), sizes)


@pytest.mark.parametrize(("visual", "context"), [(1, 4096), (627, 32768), (6273, 32768), (500, 600), (5000, 600)])
def test_default_size_leaves_room_for_text_and_answer(visual: int, context: int) -> None:
    size = default_size(visual, context)
    assert 2 <= size.prompt < size.cache <= context
    if visual + 1024 <= context:
        assert size.prompt >= visual + 256
        assert size.cache == size.prompt + 512


# The store, with a model of one layer


def make_small(seed: int = 0) -> Any:
    return make_qwen(seed, num_hidden_layers=1)


@pytest.fixture(scope="module")
def small_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with its programs. Read only: copy it to change it."""
    folder = tmp_path_factory.mktemp("small")
    assert compiled(ProgramStore(folder)) == 2
    return folder


@pytest.fixture
def copy(small_folder: Path, tmp_path: Path) -> ProgramStore:
    return ProgramStore(Path(shutil.copytree(small_folder, tmp_path / "copy")))


def compiled(store: ProgramStore, model: Any = None, compiler: ExportOnly | None = None) -> int:
    """How many programs had to be made."""
    compiler = compiler or ExportOnly()
    CompiledDecoder.compile(model or make_small(), compiler, store, SIZES[:1])
    return compiler.compiled


def test_programs_are_made_once(folder: Path) -> None:
    again = ExportOnly()
    CompiledDecoder.compile(make_qwen(), again, ProgramStore(folder), SIZES)
    assert (again.compiled, again.loaded) == (0, 5)  # three prefills, two steps: sizes with the same cache share one
    manifests = [json.loads(path.read_text()) for path in folder.glob("*/manifest.json")]
    sizes = sorted((m["identity"]["kind"], m["identity"]["tokens"], m["identity"]["cache"]) for m in manifests)
    assert sizes == [
        ("decode", 1, 24),
        ("decode", 1, 64),
        ("prefill", 16, 24),
        ("prefill", 16, 64),
        ("prefill", 32, 64),
    ]
    for manifest in manifests:
        assert manifest["identity"]["compiler"] == "none 1"
        assert manifest["identity"]["torch"] == torch.__version__
        assert manifest["identity"]["dtype"] == "float32"
        assert manifest["figures"]["relative_error"] < 1e-6
        assert manifest["figures"]["compile_seconds"] > 0


def test_other_weights_are_made_anew_and_kept_apart(copy: ProgramStore) -> None:
    other = make_small(seed=1)
    made = CompiledDecoder.compile(other, ExportOnly(), copy, SIZES[:1])
    want = answer(Decoder.from_model(other), prompt(9))
    assert answer(made, prompt(9)) == want
    assert answer(Decoder.from_model(make_small()), prompt(9)) != want  # a program of the other model would be noticed
    assert compiled(copy) == 0
    assert compiled(copy, other) == 0


def test_another_compiler_makes_them_anew(copy: ProgramStore) -> None:
    newer = ExportOnly()
    newer.version = "2"
    assert compiled(copy, compiler=newer) == 2
    assert compiled(copy) == 0


def test_a_damaged_program_is_made_again(copy: ProgramStore) -> None:
    for file in copy.folder.glob(f"prefill-*/{PROGRAM_FILE}"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    assert compiled(copy) == 1
    assert compiled(copy) == 0


def test_a_program_that_cannot_be_loaded_is_an_error_and_not_stored(copy: ProgramStore, tmp_path: Path) -> None:
    class Broken(ExportOnly):
        def load(self, file: Path) -> Any:
            raise EngineError(f"cannot load {file}")

    with pytest.raises(EngineError, match=r"cannot load .*(prefill|decode)-"):
        compiled(copy, compiler=Broken())
    empty = ProgramStore(tmp_path / "empty")
    with pytest.raises(EngineError, match="cannot load"):
        compiled(empty, compiler=Broken())
    assert not list(empty.folder.glob("*/*"))


def test_a_full_store_is_enough_where_nothing_can_be_written(
    copy: ProgramStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(ProgramStore, "locked", read_only)
    assert compiled(copy) == 0
    with pytest.raises(OSError, match="Read-only"):
        compiled(copy, make_small(seed=1))


def test_two_threads_make_each_program_once(tmp_path: Path) -> None:
    compilers, models = [ExportOnly(), ExportOnly()], [make_small(), make_small()]
    with ThreadPoolExecutor(2) as threads:
        counts = list(threads.map(compiled, [ProgramStore(tmp_path)] * 2, models, compilers))
    assert sorted(counts) == [0, 2]
    assert sum(compiler.loaded for compiler in compilers) == 2 + 2 + 2  # what one made is checked, then both load it


# The check


def shifted(program: Any, embeds: Tensor, last: Tensor, *caches: Tensor) -> Any:
    return program(embeds, last - 1, *caches)


def not_finite(program: Any, *inputs: Tensor) -> Any:
    logits, *caches = program(*inputs)
    return (logits * torch.nan, *caches)


def forgets_a_slot(program: Any, embeds: Tensor, last: Tensor, *caches: Tensor) -> Any:
    logits, *after = program(embeds, last, *caches)
    after[-1][:, :, int(last)] = 0
    return (logits, *after)


def slightly_off(program: Any, *inputs: Tensor) -> Any:
    return tuple(tensor * 1.001 for tensor in program(*inputs))


@pytest.mark.parametrize("spoil", [shifted, not_finite, forgets_a_slot])
def test_a_program_that_computes_something_else_is_not_kept(tmp_path: Path, spoil: Callable[..., Any]) -> None:
    with pytest.raises(EngineError, match=r"computes something else than PyTorch .*--decoder torch"):
        compiled(ProgramStore(tmp_path), compiler=ExportOnly(spoil=spoil))
    assert not list(tmp_path.glob("*/*"))


def test_rounding_is_allowed(tmp_path: Path) -> None:
    """Negative control: what the check refuses is not any difference."""
    assert compiled(ProgramStore(tmp_path), compiler=ExportOnly(spoil=slightly_off)) == 2


def test_a_model_that_overflows_is_told_apart(tmp_path: Path) -> None:
    model = make_small().half()
    with torch.no_grad():
        model.get_decoder().layers[0].mlp.down_proj.weight.fill_(6e4)
    with pytest.raises(EngineError, match=r"overflow in float16.*bfloat16"):
        compiled(ProgramStore(tmp_path), model)


def test_other_families_are_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="only a qwen2 decoder can be compiled, this model's is llama"):
        CompiledDecoder.compile(make_llama(), ExportOnly(), ProgramStore(tmp_path), SIZES)


def test_the_layers_are_let_go(small_folder: Path) -> None:
    model = make_small()
    layer = weakref.ref(model.get_decoder().layers[0].mlp.up_proj.weight)
    made = CompiledDecoder.compile(model, ExportOnly(), ProgramStore(small_folder), SIZES[:1])
    del model
    gc.collect()
    assert layer() is None
    assert len(answer(made, made.embed(torch.tensor([[1, 2, 3]])))) == 8


# Refusals


def one_line(error: pytest.ExceptionInfo[EngineError]) -> str:
    line = str(error.value)
    assert "\n" not in line
    assert "--decoder torch" in line or "torch" in line
    return line


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt, "has_gpu", lambda: False)


@pytest.fixture
def gpu_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine with a GPU, as far as the checks before the import go."""
    monkeypatch.setattr(trt, "has_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_driver_it_says_so() -> None:
    with pytest.raises(EngineError, match="needs an NVIDIA GPU and its driver, none was found") as error:
        TorchTensorRT(torch.device("cuda", 0))
    assert one_line(error).endswith("use --decoder torch")


@pytest.mark.usefixtures("gpu_shown")
def test_on_the_cpu_it_says_so() -> None:
    with pytest.raises(EngineError, match=r"runs on a GPU.*on cpu: use --device cuda") as error:
        TorchTensorRT(CPU)
    one_line(error)


@pytest.mark.usefixtures("gpu_shown")
def test_where_the_package_is_missing_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiler.sys.modules, "torch_tensorrt", None)
    with pytest.raises(EngineError, match=r"not installed: pip install .*\[torch-tensorrt\]") as error:
        TorchTensorRT(torch.device("cuda", 0))
    one_line(error)


@pytest.mark.parametrize(
    "source",
    ["print('noise'); raise Exception('import error when try to import\\nthe libraries')", "import no_such_library"],
)
@pytest.mark.usefixtures("gpu_shown")
def test_where_the_package_does_not_load_it_says_why(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "torch_tensorrt").mkdir()
    (tmp_path / "torch_tensorrt" / "__init__.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(compiler.sys.modules, "torch_tensorrt", raising=False)
    with pytest.raises(EngineError, match="installed but cannot be loaded") as error:
        TorchTensorRT(torch.device("cuda", 0))
    assert torch.__version__ in one_line(error)
    assert capsys.readouterr().out == ""


# The whole path


@pytest.mark.usefixtures("no_gpu")
def test_a_pipeline_refuses_before_it_loads_anything(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.parts.load_decoder", None)
    monkeypatch.setattr("runtime.parts.open_backend", None)
    with pytest.raises(EngineError, match="needs an NVIDIA GPU") as error:
        Pipeline.load(engine, device="cpu", decoder="torch-tensorrt")
    one_line(error)
    with pytest.raises(UserError, match="unknown decoder 'tensorrt': expected torch, torch-tensorrt, vllm"):
        Pipeline.load(engine, device="cpu", decoder="tensorrt")


def test_a_pipeline_with_programs_answers_as_one_without(
    engine: Path, drawn_clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(engine, tmp_path / "engine"))
    monkeypatch.setattr(compiler, "TorchTensorRT", ExportOnly)
    question = {"prompt": "What happens?", "max_new_tokens": 20}
    with Pipeline.load(copied, device="cpu") as pipeline:
        want = pipeline.ask(drawn_clip, **question)
    with Pipeline.load(copied, device="cpu", decoder="torch-tensorrt") as pipeline:
        assert isinstance(pipeline.decoder, CompiledDecoder)
        got = pipeline.ask(drawn_clip, **question)
    assert (got.text, got.tokens, got.finish) == (want.text, want.tokens, want.finish)
    kinds = sorted(path.parent.name.split("-")[0] for path in (copied / DECODER_FOLDER).glob("*/manifest.json"))
    assert kinds == ["decode", "prefill"]
    with Pipeline.load(copied, device="cpu") as pipeline:  # the folder is still an engine's
        assert isinstance(pipeline.decoder, Decoder)


# With a GPU


def missing() -> str:
    """Why torch_tensorrt cannot be tried here; empty if it can."""
    if not (trt.has_gpu() and torch.cuda.is_available()):
        return "no NVIDIA GPU that torch can use"
    return "" if importlib.util.find_spec("torch_tensorrt") else "torch_tensorrt is not installed"


@pytest.mark.gpu
@pytest.mark.skipif(bool(missing()), reason=missing() or "not skipped")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_compiled_with_torch_tensorrt(tmp_path: Path, dtype: torch.dtype) -> None:
    device = torch.device("cuda", 0)
    model = make_qwen().to(device, dtype)
    eager = Decoder.from_model(make_qwen().to(device, dtype))
    compiler, store = TorchTensorRT(device), ProgramStore(tmp_path)
    for _ in range(2):  # made, then loaded
        made = CompiledDecoder.compile(model, compiler, store, SIZES[1:2])
        for length in (1, 7, 32):
            want = answer(eager, prompt(length))
            got = answer(made, prompt(length))
            assert got[0] == want[0]
            if dtype == torch.float32:
                assert got == want
