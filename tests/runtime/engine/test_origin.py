"""Answers never come from another model's decoder: what an engine remembers of its checkpoint, and what it refuses."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from builder import build
from earlytom.errors import UserError
from earlytom.micro.random_model import random_model
from runtime import ask
from runtime.checkpoint import describe
from runtime.engine.manifest import Manifest
from runtime.engine.origin import checkpoint_of
from runtime.errors import EngineError
from runtime.pipeline import Pipeline
from tests.runtime.checkpoint.tiny_checkpoint import answering, edit_json, old_name, tiny_config, write, write_weights

pytestmark = pytest.mark.usefixtures("each_export_once")

BUILD = ("--backend", "onnx", "--no-verify", "--fp32", "--frames", "4", "--merge-layers", "0", "--ratio", "0.5")
HEAD = "lm_head.weight"


@pytest.fixture(scope="module")
def model() -> Any:
    return random_model(tiny_config(), torch.float32, seed=5)


@pytest.fixture
def first(tmp_path: Path, model: Any) -> Path:
    return answering(write(tmp_path / "runs" / "a" / "checkpoint-500", model))


def build_engine(out: Path, *words: str) -> dict[str, Any]:
    """The builder's JSON line, and what it says before that under "text"."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        build.main([*words, *BUILD, "--out", str(out)])
    *lines, last = printed.getvalue().splitlines()
    return json.loads(last) | {"text": "\n".join(lines)}


def other_decoder(folder: Path) -> None:
    state = load_file(folder / "model.safetensors")
    write_weights(folder, state | {HEAD: state[HEAD].flip(0).contiguous()})


def other_template(folder: Path) -> None:
    path = folder / "chat_template.jinja"
    path.write_text(path.read_text() + " ")


def other_tokenizer(folder: Path) -> None:
    edit_json(folder / "tokenizer_config.json", added="x")


def other_stops(folder: Path) -> None:
    edit_json(folder / "generation_config.json", eos_token_id=[5])


def other_rotation(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["rope_parameters"] = {"rope_type": "default", "rope_theta": 5.0}
    (folder / "config.json").write_text(json.dumps(config))


CHANGES = [other_decoder, other_template, other_tokenizer, other_stops, other_rotation]


def test_two_checkpoints_with_one_vision_part_have_an_engine_each(tmp_path: Path, first: Path) -> None:
    second = shutil.copytree(first, tmp_path / "runs" / "b" / "checkpoint-500")
    other_decoder(second)
    assert describe(first).digest() == describe(second).digest()
    one, two = (build_engine(tmp_path / "engines", "--model", str(folder)) for folder in (first, second))
    assert "unchanged" not in two["text"]
    assert [Path(each["folder"]).name[:16] for each in (one, two)] == ["a-checkpoint-500", "b-checkpoint-500"]
    assert [Manifest.read(each["folder"]).model.source for each in (one, two)] == [str(first), str(second)]
    assert "unchanged" in build_engine(tmp_path / "engines", "--model", str(first))["text"]
    for each, own, other in ((one, first, second), (two, second, first)):
        with Pipeline.load(each["folder"], device="cpu") as pipeline:
            assert pipeline.decoder is not None
            head: Any = pipeline.decoder._lm_head.weight
            assert torch.equal(head, load_file(own / "model.safetensors")[HEAD])
        with pytest.raises(EngineError, match="has another decoder") as error:
            Pipeline.load(each["folder"], str(other), device="cpu")
        assert str(other) in str(error.value)
        assert "--model" in str(error.value)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_whatever_answers_depend_on_counts(first: Path, change: Callable[[Path], None]) -> None:
    before = describe(first)
    before = before.digest(), before.answers_digest()
    change(first)
    after = describe(first)
    assert after.digest() == before[0]
    assert after.answers_digest() != before[1]


def test_what_answers_do_not_depend_on_does_not_count(tmp_path: Path, first: Path) -> None:
    other = shutil.copytree(first, tmp_path / "other")
    (other / "README.md").write_text("a model")
    edit_json(other / "config.json", transformers_version="5.0.0", architectures=["X"])
    assert describe(first).answers_digest() == describe(other).answers_digest()


@pytest.fixture
def manifest(tmp_path: Path, first: Path) -> Manifest:
    return Manifest.read(build_engine(tmp_path / "engines", "--model", str(first))["folder"])


def test_an_engine_refuses_a_checkpoint_that_was_changed_since(manifest: Manifest, first: Path) -> None:
    assert checkpoint_of(manifest).source == str(first)
    other_decoder(first)
    with pytest.raises(EngineError, match="has another decoder"):
        checkpoint_of(manifest)


def test_a_copy_elsewhere_is_the_same_model(manifest: Manifest, first: Path, tmp_path: Path) -> None:
    moved = first.rename(tmp_path / "moved")
    with pytest.raises(EngineError, match=r"is not there any more: give the place of that checkpoint with --model"):
        checkpoint_of(manifest)
    assert checkpoint_of(manifest, moved).source == str(moved)


def test_manifests_of_earlier_versions_are_read(manifest: Manifest, first: Path) -> None:
    values = manifest.to_dict()
    assert "commit" not in values["model"]
    del values["model"]["answers"]
    old = Manifest.from_dict(values)
    assert (old.model.answers, old.model.commit) == (None, None)
    assert old.to_dict() == values
    other_decoder(first)
    assert checkpoint_of(old).source == str(first)  # there is nothing to compare with


@pytest.mark.parametrize("name", ["answers", "commit"])
@pytest.mark.parametrize("value", ["", "xyz", 5, ["a"]])
def test_digests_of_a_manifest_are_hex(manifest: Manifest, name: str, value: Any) -> None:
    with pytest.raises(EngineError, match=rf"model\.{name}: expected"):
        manifest.model.replace(**{name: value})


def test_a_relative_path_works_from_another_folder(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    folder = build_engine(tmp_path / "engines", "--model", "../runs/a/checkpoint-500")["folder"]
    monkeypatch.chdir(tmp_path / "work" / "here")
    assert checkpoint_of(Manifest.read(folder)).source == str(first.resolve())
    monkeypatch.setenv("HOME", str(tmp_path))
    assert describe("~/runs/a/checkpoint-500").source == str(first)
    monkeypatch.chdir(tmp_path / "runs" / "a")
    assert describe("checkpoint-500").source == str(first)


def test_a_link_keeps_the_name_that_the_user_gave(first: Path, tmp_path: Path) -> None:
    link = tmp_path / "current"
    link.symlink_to(first)
    assert describe(link).source == str(link)


@pytest.mark.parametrize(
    ("place", "name"),
    [("llava", "llava"), ("run-7/checkpoint-500", "run-7-checkpoint-500"), ("run-7/final", "run-7-final"),
     ("run-7/merged", "run-7-merged"), ("run-7/checkpoints", "checkpoints")],
)  # fmt: skip
def test_names_say_of_which_training_a_step_is(tmp_path: Path, first: Path, place: str, name: str) -> None:
    assert describe(shutil.copytree(first, tmp_path / place)).name == name


def test_the_same_content_elsewhere_is_said_to_be_built(tmp_path: Path, first: Path) -> None:
    copy = shutil.copytree(first, tmp_path / "copies" / "a" / "checkpoint-500")
    build_engine(tmp_path / "engines", "--model", str(first))
    said = build_engine(tmp_path / "engines", "--model", str(copy))["text"]
    assert f"it was built from {first}" in said


def test_random_weights_and_the_bundled_model_have_digests_of_their_own() -> None:
    names = ("random:llava-onevision-qwen2-7b-ov", "random:llava-onevision-qwen2-0.5b-ov", "micro")
    assert len({describe(name).answers_digest() for name in names}) == 3
    assert describe("micro").source == "micro"


# generation_config.json, on the way to the user


def test_what_is_left_out_is_said_by_build_and_ask(
    tmp_path: Path, first: Path, drawn_clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    edit_json(first / "generation_config.json", repetition_penalty=1.1, do_sample=True, temperature=0.7, top_k=20)
    built = build_engine(tmp_path / "engines", "--model", str(first))
    note = (
        "note: generation_config.json asks for repetition_penalty 1.1, which this runtime leaves out; it samples, and "
        "answers here are greedy unless asked otherwise: give --temperature 0.7 --top-k 20 --top-p 1, or "
        "Sampling(temperature=0.7, top_k=20, top_p=1)"
    )
    assert note in built["text"]
    engine = ["--engine", built["folder"], str(drawn_clip), "What?", "--max-new-tokens", "2", "--device", "cpu"]
    ask.main([*engine, "--dtype", "bf16"])
    assert note in capsys.readouterr().out
    with Pipeline.load(built["folder"], device="cpu") as pipeline:
        assert pipeline.notes == (note.removeprefix("note: "),)
        assert pipeline.decoder is not None
        assert pipeline.decoder.dtype == torch.float32
    with pytest.raises(UserError, match="--dtype"):
        ask.main([*engine, "--dtype", "int8"])


def test_an_engine_of_old_names_and_a_layer_before_the_last(tmp_path: Path, drawn_clip: Path) -> None:
    """As the original release: 27 layers there, of which 26 are used; in the graph as in PyTorch."""
    config = tiny_config(vision_feature_layer=-2)
    config.vision_config.num_hidden_layers = 3
    source = answering(write(tmp_path / "c", random_model(config, torch.float32, seed=5), rename=old_name, shards=2))
    folder = build_engine(tmp_path / "engines", "--model", str(source))["folder"]
    frames = torch.randint(0, 255, (4, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    tokens = []
    for backend in ("onnxruntime", "torch"):
        with Pipeline.load(folder, backend=backend, device="cpu") as pipeline:
            tokens.append(pipeline.vision.encode(frames)[0])
    assert torch.allclose(*tokens, atol=1e-4)
