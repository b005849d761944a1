"""What holds for every model family, against transformers' own model: a tiny one with random weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from earlytom import EarlyTomConfig, UserError, apply_earlytom
from earlytom.encoder import encode
from earlytom.families import FAMILIES, Family, family_of, geometry
from earlytom.methods.earlytom import EarlyTom
from tests.earlytom.tiny import made_video, tiny_llava

OFF = EarlyTomConfig(retention_ratio=1.0, merge_layers=())
F = 6
MODELS: dict[str, Callable[[], Any]] = {"llava_onevision": tiny_llava}
"""A tiny model of every family, whose frames are those of `made_video`."""

every = pytest.mark.parametrize("name", FAMILIES)


def family(name: str) -> tuple[Family, Any]:
    return FAMILIES[name], MODELS[name]()


def test_every_family_is_tested_here() -> None:
    assert MODELS.keys() == FAMILIES.keys()


@every
def test_it_is_found_by_its_configuration(name: str) -> None:
    found, model = family(name)
    assert family_of(model.config) is found
    assert type(model).__name__ == found.model_class


@pytest.mark.parametrize("config", [SimpleNamespace(model_type="qwen2_vl"), SimpleNamespace()])
def test_another_family_is_refused(config: Any) -> None:
    wanted = repr(getattr(config, "model_type", None))
    with pytest.raises(UserError, match=f"model family {wanted} is not supported; supported: {', '.join(FAMILIES)}$"):
        family_of(config)


@every
@torch.no_grad()
def test_off_is_transformers_own_features_bit_for_bit(name: str) -> None:
    found, model = family(name)
    pixels = made_video("scenes", F)
    wanted = model.get_video_features(pixels[None]).pooler_output.flatten(0, 1)
    frame, closing = geometry(model.config), found.closing(model.model)
    seen = encode(found.vision_of(model.model), pixels, EarlyTom(OFF), depth=frame.depth)
    tokens = seen.tokens if closing is None else torch.cat([seen.tokens, closing[None]])
    assert torch.equal(tokens, wanted)
    with apply_earlytom(model, OFF):
        assert torch.equal(model.model.get_video_features(pixels[None]).pooler_output.flatten(0, 1), wanted)
    merged = encode(found.vision_of(model.model), pixels, EarlyTom(OFF.replace(merge_layers=(0,), tau=-1.0)))
    assert len(merged.tokens) < len(seen.tokens)  # negative control


@every
@torch.no_grad()
def test_shapes_are_those_of_the_geometry(name: str) -> None:
    found, model = family(name)
    frame, pixels = geometry(model.config), made_video("noise", F)
    assert pixels.shape[2:] == frame.size
    assert frame.grid == tuple(side // frame.patch for side in frame.size)
    assert frame.cells == found.cells(frame.grid)
    vision = found.vision_of(model.model)
    hidden = vision.tower.embed(pixels)
    assert hidden.shape == (F // frame.step, frame.patches + vision.tower.prefix, frame.width)
    assert 1 <= frame.depth <= len(vision.tower.layers)
    patches = hidden[:, vision.tower.prefix :]
    received = torch.rand(patches.shape[:2])
    seen = vision.features(patches, received)
    assert seen.features.shape == (F // frame.step, frame.tokens_per_frame, frame.llm_width)
    assert seen.cells == frame.cells
    assert seen.relevance is not None
    assert torch.equal(seen.relevance, vision.pool(received[:, :, None])[:, :, 0])
    assert torch.equal(seen.relevance, found.pool(received[:, :, None])[:, :, 0])
    assert vision.features(patches, None).relevance is None


@every
def test_counts_are_those_of_the_model(name: str) -> None:
    found, model = family(name)
    frame = geometry(model.config)
    closing = found.closing(model.model)
    assert found.placeholders(model.config, F) == F * frame.tokens_per_frame + (closing is not None)
    assert found.video_token_id(model.config) == model.config.video_token_id
    vision = found.vision_of(model.model)
    parts: list[Any] = [vision.tower.model.embeddings, *vision.tower.layers[: frame.depth]]
    parts.append(vision.projector)  # type: ignore[attr-defined]
    assert found.vision_weights(model.config) == sum(p.numel() for part in parts for p in part.parameters())
    whole, less = (found.vision_flops(model.config, *stages) for stages in (((F,), ()), ((F, 3), (0,))))
    assert found.projector_flops(model.config, F) == 2 * found.projector_flops(model.config, F // 2) < less < whole


@every
@torch.no_grad()
def test_its_own_tokens_are_transformers_features(name: str) -> None:
    found, model = family(name)
    pixels = made_video("scenes", F)
    closing = found.closing(model.model)
    tokens = found.own_tokens(model, pixels)
    assert torch.equal(tokens, model.get_video_features(pixels[None]).pooler_output.flatten(0, 1))
    assert len(tokens) == found.placeholders(model.config, F)
    assert closing is None or torch.equal(tokens[-1], closing)


@every
def test_its_modules_are_made_alone_and_take_the_tensors_of_a_whole_model(name: str) -> None:
    found, model = family(name)
    whole, alone = found.modules(model.model), found.new_modules(model.config)
    state = {found.canonical_name(raw): value for raw, value in model.named_parameters()}
    assert all(raw.startswith((*found.vision_names, *found.decoder_names)) for raw in state)
    names = [raw for raw in state if raw.startswith(found.vision_names)]
    assert not any(raw.startswith(found.decoder_names) for raw in names)
    assert (whole.closing is None) == (found.closing_name is None)
    for modules in (whole, alone):
        assert whole.closing is None or modules.closing is not None
        parts = {field: getattr(modules, field) for field in ("vision_tower", "projector")}
        shapes = {f"{part}.{raw}": p.shape for part, module in parts.items() for raw, p in module.named_parameters()}
        shapes |= {} if modules.closing is None else {"closing": modules.closing.shape}
        assert shapes == {found.module_name(raw): state[raw].shape for raw in names}


@every
@torch.no_grad()
def test_buffers_that_are_stored_nowhere_come_back(name: str) -> None:
    found, model = family(name)
    tower, pixels = found.modules(model.model).vision_tower, made_video("scenes", 1)
    wanted = found.vision_of(model.model).tower.embed(pixels)
    for module in tower.modules():
        for buffer in module._non_persistent_buffers_set:
            setattr(module, buffer, getattr(module, buffer).to("meta"))
    found.restore_buffers(tower)
    assert torch.equal(found.vision_of(model.model).tower.embed(pixels), wanted)


@every
def test_without_vision_the_decoder_and_the_closing_are_left(name: str) -> None:
    found, model = family(name)
    closing, whole = found.closing(model.model), dict(model.named_parameters())
    found.drop_vision(model)
    left = {found.canonical_name(raw) for raw, _ in model.named_parameters()}
    decoder = {raw for raw in map(found.canonical_name, whole) if raw.startswith(found.decoder_names)}
    assert left == decoder | ({found.closing_name} - {None})
    assert found.closing(model.model) is closing
    assert found.embeddings_name in left


@every
def test_its_settings_are_read_from_a_configuration(name: str) -> None:
    found, model = family(name)
    raw = model.config.to_dict()
    found.check(raw)
    config = found.config(raw)
    assert type(found.new_model(config)).__name__ == found.model_class
    assert found.geometry(config) == found.geometry(model.config)
    assert config.vision_config.model_type in found.towers
    assert all(hasattr(config, setting) for setting in (*found.activations, *found.token_ids, found.layer_setting))
    settings = found.vision_settings(config)
    assert json.loads(json.dumps(settings)) == settings
    config.vision_config.hidden_size += 1
    assert found.vision_settings(config) != settings  # negative control


@every
def test_names_there_and_back(name: str) -> None:
    """Every name that a release of transformers gives a tensor is one canonical name, and that is its own."""
    found, model = family(name)
    names = [raw for raw, _ in model.named_parameters()]
    canonical = [found.canonical_name(raw) for raw in names]
    assert len(set(canonical)) == len(names)
    assert [found.canonical_name(one) for one in canonical] == canonical
    state = {found.canonical_name(raw): value for raw, value in model.state_dict().items()}
    assert set(canonical) <= state.keys()
