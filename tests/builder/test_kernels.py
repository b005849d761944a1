"""The measurement of the operators: what is counted, what is shown, what is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from builder import kernels
from builder.operators import times
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError

TINY = kernels.SIZES["tiny"]
CONFIG = EarlyTomConfig(merge_layers=TINY.merge_layers, schedule="budget")
CPU = torch.device("cpu")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert kernels.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_operator_and_the_whole_path_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    figures = run(capsys, "--device", "cpu", "--size", "tiny", "--repeats", "1", "--dtype", "fp32")
    names = {operator["name"] for operator in figures["operators"]}
    assert {"frame_similarity", "frame_plan", "received_attention", "select_tokens"} < names
    for operator in figures["operators"]:
        assert operator["ours"] > 0
        assert operator["pytorch"] > 0
        assert operator["floor"] == pytest.approx(
            max(operator["bytes"] / figures["bandwidth"], operator["flops"] / figures["matmul"])
        )
        assert operator["of_floor"] == pytest.approx(operator["floor"] / operator["ours"])
    assert figures["path_share"] == pytest.approx(figures["path_seconds"] / figures["encoder_seconds"])


def test_operators_and_plain_formulations_agree() -> None:
    for case in times.cases(TINY, torch.float32, CPU, CONFIG):
        mine, theirs = case.ours(*case.inputs[0]), case.plain(*case.inputs[0])
        mine, theirs = (x[0] if isinstance(x, tuple) else x for x in (mine, theirs))
        assert torch.allclose(mine, theirs, atol=1e-5), case.name


def test_bytes_are_those_of_what_is_read_and_written() -> None:
    found = {case.name: case for case in times.cases(TINY, torch.float16, CPU, CONFIG)}
    hidden, (query, key) = found["frame_similarity"].inputs[0][0], found["received_attention"].inputs[0]
    assert found["frame_similarity"].bytes == hidden.nbytes
    assert found["received_attention"].bytes == query.nbytes + key.nbytes + 4 * query.shape[0] * query.shape[2]
    weights, x = found["merge (matrix product)"].inputs[0]
    assert found["merge (matrix product)"].bytes == x.nbytes + x[: len(weights)].nbytes
    tokens, positions = found["select_tokens"].ours(*found["select_tokens"].inputs[0])
    received = found["select_tokens"].inputs[0][1]
    assert found["select_tokens"].bytes == 2 * tokens.nbytes + positions.nbytes + received.nbytes


def test_the_largest_size_is_that_of_llava_onevision() -> None:
    size = kernels.SIZES["so400m"]
    assert (size.tokens, size.cells, size.frames) == (729, 196, 32)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--repeats", "0"], "--repeats must be at least 1"),
        (["--ratio", "1.5"], r"--ratio must be in \(0, 1\]"),
        (["--size", "huge"], "--size"),
    ],
)
def test_bad_options_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        kernels.main(["--device", "cpu", *words])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_what_can_be_done() -> None:
    with pytest.raises(UserError, match=r"no CUDA GPU .* --device cpu --size tiny"):
        kernels.main([])
