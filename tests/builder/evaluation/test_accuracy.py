"""The bundled model has not become worse: the first clips of the test split, held against what was right of them.

`tests/golden/accuracy.json` has how many questions about each clip were right (`int8`: cells at 0.10 in int8),
measured together with the record of the whole split, `earlytom/micro/accuracy.json` (`python -m builder.evaluate
--record`): other weights need both anew, this one by `python -m tests.builder.evaluation.test_accuracy`. Clips,
questions and weights are the same, so chance plays no part, and a few near-ties are all that may fall otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from threadpoolctl import threadpool_limits

from builder.build import build_engine
from builder.evaluation import record
from builder.evaluation.bench import Answers, EvaluationBench, EvaluationJob, run
from builder.evaluation.statistics import accuracy
from builder.micro.scoring import Scorer
from builder.settings.arguments import parse
from earlytom.cells.config import CellsConfig
from earlytom.config import EarlyTomConfig
from runtime.checkpoint import describe, load_decoder
from runtime.checkpoint.narrow import NarrowLinear
from runtime.engine.manifest import Manifest, describe_files
from tests import golden_vectors

GOLDEN = golden_vectors.HOME / "accuracy.json"
FLIPS = 2  # answers of a row that another machine's kernels may turn
ENGINE_ROW = 1  # behind that of all tokens
MARGIN = 0.01  # of the record, beyond the interval of these clips

pytestmark = pytest.mark.skipif(
    not describe().trained, reason="the bundled model's weights are not trained (python -m builder.micro.train)"
)


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(GOLDEN.read_text("utf-8"))
    return found


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return record.read()


def job(recorded: dict[str, Any]) -> EvaluationJob:
    config, cells = EarlyTomConfig.from_dict(recorded["settings"]), CellsConfig.from_dict(recorded["cells"])
    return EvaluationJob("micro", config, ("budget", "cells-rounds"), (0.1,), cells=cells)


def answered(recorded: dict[str, Any], clips: int, engine: Path | None = None) -> tuple[EvaluationBench, Answers]:
    """In this process, on one core: other tests have the others. An engine alone, with its twin."""
    asked = job(recorded)
    if engine is not None:
        asked = dataclasses.replace(asked, methods=(), engine=str(engine))
    bench = EvaluationBench(asked)
    with threadpool_limits(1, "blas"):
        return bench, run(bench.job, clips, 1, lambda done: None, bench)


def int8_engine(place: Path) -> Path:
    """Cells in int8, with scales of the clips that a build takes by itself."""
    config = parse(["--int8", "--fp16", "--method", "cells", "--ratio", "0.1", "--backend", "onnx", "--no-verify"])[1]
    return build_engine(config, place, say=lambda _: None)


def cut_off(engine: Path, place: Path) -> Path:
    """The same engine with a range of what enters a product that is a sixth of what it was."""
    shutil.copytree(engine, place)
    model = onnx.load(place / "vision.onnx")
    scales = {node.input[1] for node in model.graph.node if node.op_type == "QuantizeLinear"}
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) / np.float16(6), tensor.name))
    onnx.save(model, place / "vision.onnx")
    Manifest.read(engine).replace(files=describe_files(place)).write(place)
    return place


def holds(right: Any, wanted: list[int]) -> bool:
    return int(np.sum(right)) >= sum(wanted) - FLIPS


@pytest.mark.usefixtures("one_thread")
def test_accuracy_has_not_dropped(recorded: dict[str, Any], golden: dict[str, Any]) -> None:
    assert golden["weights"] == recorded["weights"]
    bench, answers = answered(recorded, len(golden["asked"]))
    assert answers.asked().tolist() == golden["asked"]
    assert [f"{one.method.name} {one.ratio}" for one in bench.settings] == list(golden["right"])
    whole = {f"{one['method']} {one['ratio']}": one["accuracy"][0] for one in recorded["results"]}
    for row, (name, wanted) in enumerate(golden["right"].items()):
        right = answers.correct(row)
        assert holds(right, wanted), (name, right.tolist())
        assert accuracy(right, answers.asked()).high >= whole[name] - MARGIN, name


@pytest.mark.usefixtures("one_thread")
def test_a_decoder_with_weights_in_int8_answers_alike(recorded: dict[str, Any], golden: dict[str, Any]) -> None:
    """On few clips; the negative control is one whose weights are those of the next row."""
    bench = EvaluationBench(job(recorded))
    narrow, broken = load_decoder(int8=True), load_decoder(int8=True)
    for linear in broken.get_decoder().modules():
        if isinstance(linear, NarrowLinear):
            linear.weight.data = linear.weight.data.roll(1, 0)
    (setting,) = (one for one in bench.settings if one.method.name == "cells-rounds")
    clips, known = zip(*map(bench.clip, range(len(golden["asked"]))), strict=True)
    visual = [setting.visual(clip) for clip in clips]
    told = [setting.standing(clip, one) for clip, one in zip(clips, visual, strict=True)]
    packs = [bench.scorer.pack(clip.questions) for clip in known]
    right = [
        [one.right for row in scorer.score([one.tokens for one in visual], packs, told) for one in row]
        for scorer in (bench.scorer, Scorer(narrow, bench.tokenizer), Scorer(broken, bench.tokenizer))
    ]
    asked = len(right[0])
    assert asked > 100
    assert abs(sum(right[0]) - sum(right[1])) <= 0.02 * asked
    assert sum(map(operator.ne, right[0], right[1])) <= 0.03 * asked
    assert sum(right[0]) - sum(right[2]) > 0.2 * asked


@pytest.mark.usefixtures("one_thread")
def test_an_int8_engine_answers_as_well(recorded: dict[str, Any], golden: dict[str, Any], tmp_path: Path) -> None:
    """The negative control is a graph that cuts off most of what enters its products."""
    engine, wanted = int8_engine(tmp_path), golden["int8"]
    _, answers = answered(recorded, len(wanted), engine)
    assert answers.asked().tolist() == golden["asked"][: len(wanted)]
    assert holds(answers.correct(ENGINE_ROW), wanted), answers.correct(ENGINE_ROW).tolist()
    assert holds(answers.correct(ENGINE_ROW), golden["right"]["cells-rounds 0.1"][: len(wanted)])
    some = len(wanted) // 2
    _, answers = answered(recorded, some, cut_off(engine, tmp_path / "cut"))
    assert not holds(answers.correct(ENGINE_ROW), wanted[:some])


def test_a_model_that_sees_nothing_would_be_noticed(recorded: dict[str, Any], golden: dict[str, Any]) -> None:
    """Negative control, on half of the clips, with all of the others right."""
    bench = EvaluationBench(job(recorded))
    some = len(golden["asked"]) // 2
    questions = [bench.clip(index)[1].questions for index in range(some)]
    nothing = torch.zeros(400, bench.model.config.text_config.hidden_size)
    outcomes = bench.scorer.score([nothing] * some, [bench.scorer.pack(asked) for asked in questions])
    right = [sum(outcome.right for outcome in row) for row in outcomes]
    for name, wanted in golden["right"].items():
        assert not holds(right + golden["asked"][some:], wanted), (name, right)


if __name__ == "__main__":  # what the tests above go by, anew
    found = record.read()
    made, counted = answered(found, 24)
    rows = {
        f"{one.method.name} {one.ratio}": counted.correct(row).astype(int).tolist()
        for row, one in enumerate(made.settings)
    }
    lines = ",\n  ".join(f"{json.dumps(name)}: {row}" for name, row in rows.items())
    with tempfile.TemporaryDirectory() as folder:
        int8 = answered(found, 12, int8_engine(Path(folder)))[1].correct(ENGINE_ROW).astype(int).tolist()
    weights, asked = json.dumps(found["weights"]), counted.asked().astype(int).tolist()
    text = f'{{\n "weights": {weights},\n "asked": {asked},\n "right": {{\n  {lines}\n }},\n "int8": {int8}\n}}\n'
    GOLDEN.write_text(text, "utf-8")
