"""The recipe for CI in `builder.gate.kept_reference`, executed as written there: it passes what is right, notices
damage."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from builder import build, verify
from builder.export import functions
from builder.gate import kept_reference
from builder.gate.kept_reference import COMPARE_FILE
from builder.settings.parser import parser as build_parser
from earlytom.budget import most_tokens
from runtime import cli
from runtime.engine import layout
from runtime.engine.manifest import Manifest, describe_files
from tests.builder.gate.shell import shell

Edit = Callable[[onnx.ModelProto], None]


def recipe() -> list[str]:
    """The commands of the docstring: keep a reference, build, compare."""
    assert kept_reference.__doc__ is not None
    text = kept_reference.__doc__.split("**Polygraphy in CI.**")[1]
    return [line.strip() for line in text.splitlines() if line.startswith("    ")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where CI works: the engine that was accepted is engines/NAME."""
    folder = tmp_path_factory.mktemp("ci")
    words = shlex.split(recipe()[1])[3:]
    out = words.index("--out") + 1
    words[out] = str(folder / "accepted")
    assert build.main([*words, "--backend", "onnx", "--no-verify-text", "--json"]) == 0
    (engine,) = (folder / "accepted").iterdir()
    (folder / "engines").mkdir()
    shutil.copytree(engine, folder / "engines" / "NAME")
    return folder


@pytest.fixture(scope="module")
def reference(place: Path) -> Path:
    """What the recipe's first command keeps."""
    done = shell(recipe()[0], place)
    assert (done.returncode, done.stderr) == (0, "")
    assert "sh reference/compare.sh" in done.stdout
    return place / "reference"


@pytest.fixture
def compare(place: Path, reference: Path, bundled_engine: Path) -> Callable[..., tuple[int, str]]:
    """Runs the recipe's last command on what was built, after `edit` was applied to it: status, everything printed."""

    def run(edit: Edit | None = None) -> tuple[int, str]:
        shutil.rmtree(place / "built", ignore_errors=True)
        shutil.copytree(bundled_engine, place / "built" / bundled_engine.name)
        if edit is not None:
            path = place / "built" / bundled_engine.name / layout.ONNX_FILE
            model = onnx.load(str(path))
            edit(model)
            onnx.save(model, str(path))
        done = shell(recipe()[2], place, torch=False)
        return done.returncode, done.stdout + done.stderr

    return run


def scale(name: str | int, factor: float) -> Edit:
    """Multiply one weight tensor, by the end of its name or as the matrix of the n-th product."""

    def edit(model: onnx.ModelProto) -> None:
        weights = {tensor.name: tensor for tensor in model.graph.initializer}
        if isinstance(name, int):
            matrices = [n.input[1] for n in model.graph.node if n.op_type == "MatMul" and n.input[1] in weights]
            tensor = weights[matrices[name]]
        else:
            (tensor,) = (tensor for key, tensor in weights.items() if key.endswith(name))
        array = numpy_helper.to_array(tensor)
        tensor.CopyFrom(numpy_helper.from_array((array * factor).astype(array.dtype), tensor.name))

    return edit


def more_places(more: int) -> Edit:
    """Another number of tokens a frame."""

    def edit(model: onnx.ModelProto) -> None:
        (node,) = (node for node in model.graph.node if node.op_type == functions.SELECT_TOKENS)
        (attribute,) = (a for a in node.attribute if a.name == "places")
        attribute.i += more

    return edit


def rename_positions(model: onnx.ModelProto) -> None:
    """They are "raw" now."""
    (node,) = (node for node in model.graph.node if layout.POSITIONS in node.output)
    node.output[list(node.output).index(layout.POSITIONS)] = "raw"
    for other in model.graph.node:
        other.input[:] = ["raw" if name == layout.POSITIONS else name for name in other.input]


def shift_positions(model: onnx.ModelProto) -> None:
    rename_positions(model)
    model.graph.initializer.append(numpy_helper.from_array(np.array(1, np.int64), "one"))
    model.graph.node.append(helper.make_node("Add", ["raw", "one"], [layout.POSITIONS]))


def lose_positions(model: onnx.ModelProto) -> None:
    rename_positions(model)
    kept = [output for output in model.graph.output if output.name != layout.POSITIONS]
    del model.graph.output[:]
    model.graph.output.extend(kept)


def test_the_recipe_is_three_commands_that_exist() -> None:
    keep, make, hold = map(shlex.split, recipe())
    assert keep[:3] == ["python", "-m", "builder.verify"]
    assert verify.parser().parse_args(keep[3:]).polygraphy == Path("reference")
    assert make[:3] == ["python", "-m", "builder.build"]
    options = build_parser().parse_args(make[3:])
    assert options.verify  # the build's own gate is part of the job
    assert hold == ["sh", f"reference/{COMPARE_FILE}", f"{options.out}/*/{layout.ONNX_FILE}"]


def test_the_same_sources_pass(compare: Callable[..., tuple[int, str]], place: Path, reference: Path) -> None:
    """What was built in another process, at another time, is held against the reference that was kept."""
    status, printed = compare()
    assert status == 0, printed[-2000:]
    for name in layout.OUTPUTS:
        assert f"PASSED | Output: '{name}'" in printed
    assert {path.name for path in reference.iterdir()} == {
        layout.REFERENCE_INPUTS_FILE,
        layout.REFERENCE_OUTPUTS_FILE,
        COMPARE_FILE,
    }
    Manifest.read(place / "engines" / "NAME")  # nothing was written there


def test_a_difference_that_half_precision_allows_passes(compare: Callable[..., tuple[int, str]]) -> None:
    """Negative control of the failures below: not every change fails."""
    status, printed = compare(scale("projector.linear_2.bias", 1.001))
    assert status == 0, printed[-2000:]


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        pytest.param(scale(0, 1.1), "Mismatched outputs: ['tokens'", id="first matrix"),
        pytest.param(scale(-1, 1.1), "Mismatched outputs: ['tokens']", id="last matrix"),
        pytest.param(scale("projector.linear_2.bias", np.nan), "NaN Detected", id="nan"),
        pytest.param(more_places(2), "ShapeInferenceError", id="two tokens more"),
        pytest.param(more_places(-2), "ShapeInferenceError", id="two tokens fewer"),
        pytest.param(shift_positions, "Mismatched outputs: ['positions']", id="positions"),
        pytest.param(lose_positions, "outputs were not found in the model: {'positions'}", id="output"),
    ],
)
def test_a_regression_fails_with_a_message(compare: Callable[..., tuple[int, str]], edit: Edit, says: str) -> None:
    status, printed = compare(edit)
    assert status == 1, printed[-2000:]
    assert says in printed
    assert "[E] FAILED" in printed or "[ONNXRuntimeError] : 1 : FAIL" in printed


@pytest.mark.parametrize("words", ["", "a.onnx b.onnx", "built/*/missing.onnx"])
def test_the_script_wants_one_graph(place: Path, reference: Path, words: str) -> None:
    """Two engines under built/, or none, are no success."""
    for name in ("a.onnx", "b.onnx"):
        (place / name).touch()
    done = shell(f"sh reference/{COMPARE_FILE} {words}", place, torch=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("usage: sh reference/compare.sh VISION.ONNX")


def test_the_script_works_from_anywhere(place: Path, reference: Path, tmp_path: Path) -> None:
    moved = tmp_path / "a folder"
    shutil.copytree(reference, moved)
    graph = place / "engines" / "NAME" / layout.ONNX_FILE
    done = shell(f"sh {shlex.quote(str(moved / COMPARE_FILE))} {shlex.quote(str(graph))}", tmp_path, torch=False)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr


def as_chain(engine: Path, folder: Path) -> Path:
    """An engine as if it had the adaptive schedule."""
    shutil.copytree(engine, folder)
    old = Manifest.read(folder)
    stages, frames = len(old.frames_per_stage), old.frames
    for stage in range(stages):
        shutil.copy(folder / layout.ONNX_FILE, folder / layout.stage_file(layout.ONNX_FILE, stage))
    old.replace(
        earlytom=old.earlytom | {"schedule": "adaptive"},
        frames_per_stage=(frames,) * stages,
        frames_kept=((frames,) * 3,) * stages,
        tokens=most_tokens(frames, old.tokens_per_frame, old.earlytom["retention_ratio"], merges=stages - 1),
        files=describe_files(folder),
        polygraphy="",
    ).write(folder)
    return folder


def test_what_has_no_reference_is_refused(
    place: Path, bundled_engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    accepted = place / "engines" / "NAME"
    half = Path(shutil.copytree(accepted, tmp_path / "bf16"))
    Manifest.read(half).replace(dtype="bf16", polygraphy="").write(half)
    (tmp_path / "file").touch()
    chain = as_chain(accepted, tmp_path / "chain")
    for engine, out, says in (
        (chain, tmp_path / "out", "build with --schedule budget"),
        (bundled_engine, tmp_path / "out", "build it without --no-verify"),
        (half, tmp_path / "out", "build with --fp16"),
        (tmp_path / "nothing", tmp_path / "out", "does not exist"),
        (accepted, accepted, "name another folder with --polygraphy"),
        (accepted, tmp_path / "file", "is a file: give a folder"),
    ):
        capsys.readouterr()
        assert cli.run(verify.main, [str(engine), "--polygraphy", str(out)]) == 2
        captured = capsys.readouterr()
        assert says in captured.err
        assert (captured.out, captured.err.count("\n")) == ("", 1)
    for option in ("--video", "--model"):
        assert cli.run(verify.main, [str(accepted), "--polygraphy", str(tmp_path / "out"), option, "x"]) == 2
        assert "are for --layers" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    Manifest.read(accepted)
    assert cli.run(verify.main, [str(accepted), "--polygraphy", str(tmp_path / "out"), "--json"]) == 0
    line = json.loads(capsys.readouterr().out)
    assert line == {
        "engine": str(accepted),
        "reference": str(tmp_path / "out"),
        "script": str(tmp_path / "out" / "compare.sh"),
    }
    assert Path(line["script"]).is_file()
