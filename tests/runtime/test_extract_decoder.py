"""The language model that is written for other servers is the checkpoint's, and the folder is whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from earlytom.errors import UserError
from runtime import extract_decoder
from runtime.checkpoint import describe, language_model, load_decoder, load_tokenizer
from runtime.checkpoint.language_model import load_embeddings, write_language_model
from runtime.decoder.eager import Decoder

pytestmark = pytest.mark.usefixtures("one_thread")


def run(*words: object) -> int:
    return extract_decoder.main([str(word) for word in words])


@pytest.fixture(scope="module")
def written(engine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("extracted") / "lm"
    assert run(engine, out, "--dtype", "fp32") == 0
    return out


def test_it_decodes_as_the_checkpoint_does(written: Path, talkative: Path) -> None:
    loaded: Any = AutoModelForCausalLM.from_pretrained(written)
    assert type(loaded).__name__ == "Qwen2ForCausalLM"
    ours, theirs = Decoder.from_model(load_decoder(talkative)), Decoder.from_model(loaded)
    prompt = torch.randn(1, 40, 256, generator=torch.Generator().manual_seed(0)) * 0.02
    wanted = list(ours.stream(prompt, max_new_tokens=24))
    assert list(theirs.stream(prompt, max_new_tokens=24)) == wanted
    assert len(set(wanted)) > 3
    assert loaded.generation_config.eos_token_id == load_decoder(talkative).generation_config.eos_token_id


def test_the_tokenizer_is_the_checkpoint_s(written: Path, talkative: Path) -> None:
    ours, theirs = load_tokenizer(talkative), AutoTokenizer.from_pretrained(written)
    text = "Which digit is on the circle? <|im_end|> é"
    assert theirs(text)["input_ids"] == ours(text)["input_ids"]
    assert theirs.chat_template == ours.chat_template


def test_tied_weights_are_stored_once_and_nothing_of_the_vision_part(written: Path) -> None:
    with safe_open(written / "model.safetensors", "pt") as tensors:
        names = set(tensors.keys())
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    assert all(name.startswith("model.") for name in names)
    config = json.loads((written / "config.json").read_text())
    assert (config["tie_word_embeddings"], config["dtype"]) == (True, "float32")
    assert {file.stat().st_mode & 0o777 for file in written.iterdir()} == {
        (written / "config.json").stat().st_mode & 0o777
    }


def test_the_weights_are_stored_as_they_are_unless_asked_otherwise(
    engine: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(engine.parent, tmp_path / "lm") == 0  # the newest engine of a folder
    said = capsys.readouterr().out
    assert "Qwen2ForCausalLM, 2,559,744 parameters in float16" in said
    assert "tied to the output layer, stored once" in said
    with pytest.raises(UserError, match="exists: give another folder, or --force"):
        run(engine, tmp_path / "lm")
    (tmp_path / "lm" / "old").touch()
    assert run(engine, tmp_path / "lm", "--force") == 0
    assert not (tmp_path / "lm" / "old").exists()
    (tmp_path / "mine").mkdir()
    with pytest.raises(UserError, match="is no language model, and is not replaced"):
        run(engine, tmp_path / "mine", "--force")
    assert {path.name for path in tmp_path.iterdir()} == {"lm", "mine"}  # nothing is left beside


def test_large_models_come_in_shards(tmp_path: Path, talkative: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(language_model, "SHARD_BYTES", 4_000_000)
    written = write_language_model(describe(talkative), tmp_path, torch.float32)
    assert "model.safetensors.index.json" in written.files
    assert len([name for name in written.files if name.endswith(".safetensors")]) > 2


@pytest.mark.parametrize("source", [None, "random:siglip-base-qwen2-0.5b"])
def test_embeddings_alone_are_those_of_the_whole_decoder(source: str | None) -> None:
    if source is not None:  # half a billion parameters are too many for a test: the names and shapes are enough
        assert load_embeddings(describe(source), torch.float16).values.shape[1] == 896
        return
    found, model = load_embeddings(describe(source), torch.float32), load_decoder(source)
    assert torch.equal(found.values, model.get_input_embeddings().weight)
    assert found.closing is not None
    assert found.generation.eos_token_id == model.generation_config.eos_token_id
