"""The decoder of a checkpoint without its tower: equal to the whole model's, and in the precision that fits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from earlytom import encode_video
from earlytom.errors import UserError
from earlytom.families.llava_onevision import feature_depth
from earlytom.micro.random_model import random_model
from runtime.checkpoint import PUBLISHED, describe, load_decoder, load_model, load_vision, precision
from runtime.checkpoint.precision import fitting_dtype, free_bytes
from tests.runtime.checkpoint.tiny_checkpoint import (
    Rename,
    answering,
    edit_json,
    middle_name,
    old_name,
    one_line,
    same_name,
    tiny_config,
    write,
    write_weights,
)


def assert_same_decoder(decoder: Any, model: Any) -> None:
    theirs = dict(model.named_parameters())
    ours = dict(decoder.named_parameters())
    assert set(ours) == {name for name in theirs if "vision_tower" not in name and "projector" not in name}
    for name, parameter in ours.items():
        assert parameter.dtype == theirs[name].dtype, name
        assert torch.equal(parameter, theirs[name]), name
    embeds = torch.randn(1, 7, 32, generator=torch.Generator().manual_seed(0)).to(decoder.dtype)
    with torch.no_grad():
        hidden = [one.get_decoder()(inputs_embeds=embeds).last_hidden_state for one in (decoder, model)]
        logits = [one.lm_head(state) for one, state in zip((decoder, model), hidden, strict=True)]
    assert torch.equal(*logits)
    assert decoder.generation_config.eos_token_id == model.generation_config.eos_token_id


@pytest.mark.parametrize("rename", [same_name, middle_name, old_name])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [False, True])
def test_the_decoder_alone_is_that_of_the_whole_model(tmp_path: Path, rename: Rename, shards: int, tied: bool) -> None:
    model: Any = random_model(tiny_config(tied=tied), torch.float32, seed=5)
    source = write(tmp_path / "c", model, rename=rename, shards=shards)
    decoder = load_decoder(source)
    assert_same_decoder(decoder, load_model(source))
    assert (decoder.lm_head.weight is decoder.get_input_embeddings().weight) == tied
    half: Any = load_decoder(source, torch.bfloat16)
    assert_same_decoder(half, load_model(source, torch.bfloat16))
    assert not hasattr(decoder.model, "vision_tower")
    assert not any(parameter.requires_grad for parameter in decoder.parameters())


def test_a_tied_head_that_is_stored_all_the_same_is_not_needed(tmp_path: Path) -> None:
    model: Any = random_model(tiny_config(tied=True), torch.float32)
    source = write(tmp_path / "c", model)
    state = load_file(source / "model.safetensors")
    write_weights(source, state | {"lm_head.weight": state["model.language_model.embed_tokens.weight"].clone()})
    assert_same_decoder(load_decoder(source), load_model(source))


def test_a_random_decoder_is_that_of_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PUBLISHED, "tiny", tiny_config)
    assert_same_decoder(load_decoder("random:tiny", torch.float16), load_model("random:tiny", torch.float16))


def test_a_decoder_does_not_change_with_its_file(tmp_path: Path, original: Any) -> None:
    source = write(tmp_path / "c", original)
    decoder: Any = load_decoder(source)
    before = decoder.lm_head.weight.clone()
    path = source / "model.safetensors"
    with open(path, "r+b") as file:  # in place
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(decoder.lm_head.weight, before)


# Precision


def test_fp32_where_it_fits_and_as_stored_where_it_does_not(
    tmp_path: Path, original: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "c", original)
    state = load_file(source / "model.safetensors")
    found = describe(source)
    assert fitting_dtype(found) == (torch.float32, None)
    monkeypatch.setattr(precision, "free_bytes", lambda: 1000.0)
    assert fitting_dtype(describe(source)) == (torch.float32, None)  # as it is stored: there is nothing smaller
    for dtype, name in ((torch.float16, "fp16"), (torch.bfloat16, "bf16")):
        write_weights(source, {name: tensor.to(dtype) for name, tensor in state.items()})
        chosen, note = fitting_dtype(describe(source))
        assert chosen == dtype
        assert note is not None
        assert f"the decoder runs in {name}" in note
        assert "--dtype fp32" in note
    assert fitting_dtype(describe(source), whole=True)[1] != note


def test_what_is_free_is_known_here_and_a_limit_lowers_it() -> None:
    assert 0 < free_bytes() < 1 << 60
    script = (
        "import resource; from runtime.checkpoint.precision import free_bytes\n"
        "pages = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (pages + (64 << 20), -1)); print(free_bytes())"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=300, check=True
    )
    assert (32 << 20) < float(done.stdout) <= (64 << 20)


def test_a_container_lowers_it_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A control group of version 2 below one with a lower limit; pages of files count as free."""
    inner = tmp_path / "outer" / "inner"
    inner.mkdir(parents=True)
    for folder, limit in ((inner, "max"), (inner.parent, str(3 << 20))):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(f"{1 << 20}\n")
        (folder / "memory.stat").write_text(f"anon 5\ninactive_file {1 << 19}\n")
    lines = tmp_path / "cgroup"
    lines.write_text("0::/outer/inner\n")
    monkeypatch.setattr(precision, "_GROUPS", tmp_path)
    monkeypatch.setattr(precision, "_OWN_GROUPS", lines)
    assert free_bytes() == (3 << 20) - (1 << 20) + (1 << 19)


# A tower of which the last layers are not used


def test_features_of_a_layer_before_the_last_are_transformers_own(tmp_path: Path) -> None:
    config = tiny_config(vision_feature_layer=-2)
    config.vision_config.num_hidden_layers = 4
    model: Any = random_model(config, torch.float32, seed=5)
    source = answering(write(tmp_path / "c", model))
    found = describe(source)
    assert feature_depth(found.config) == 3
    part, whole = load_vision(found), load_model(found)
    pixels = torch.rand(4, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    from earlytom import EarlyTomConfig

    off = EarlyTomConfig(retention_ratio=1.0, merge_layers=())
    with torch.no_grad():
        expected = whole.get_video_features(pixels[None]).pooler_output.flatten(0, -2)
        ours = encode_video(part.vision_tower, part.projector, pixels, off, depth=3).tokens
        wrong = encode_video(part.vision_tower, part.projector, pixels, off, depth=4).tokens
    assert torch.allclose(ours, expected[:-1], atol=1e-5)
    assert not torch.allclose(wrong, expected[:-1], atol=1e-2)


@pytest.mark.parametrize("layer", [-6, 5, -5])
def test_a_layer_that_does_not_exist_is_one_line(tmp_path: Path, original: Any, layer: int) -> None:
    source = write(tmp_path / "c", original)
    edit_json(source / "config.json", vision_feature_layer=layer)
    with pytest.raises(UserError, match=f"vision_feature_layer {layer} does not exist in a tower of 2") as error:
        describe(source)
    one_line(error)
