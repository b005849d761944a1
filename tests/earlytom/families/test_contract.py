"""What holds for every model family, against transformers' own model: a tiny one with random weights."""

from __future__ import annotations

import json
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from earlytom import EarlyTomConfig, UserError, apply_earlytom, token_count
from earlytom.encoder import encode
from earlytom.families import FAMILIES, Family, family_of, geometry
from earlytom.families.qwen3_vl.pixels import packed
from earlytom.methods.earlytom import EarlyTom
from earlytom.standing import frame_spans
from tests.earlytom.tiny import MODELS, made_video

OFF = EarlyTomConfig(retention_ratio=1.0, merge_layers=())
ON = EarlyTomConfig(retention_ratio=0.3, merge_layers=(0, 1, 2), schedule="budget")
F = 6
every = pytest.mark.parametrize("name", FAMILIES)


def family(name: str) -> tuple[Family, Any]:
    return FAMILIES[name], MODELS[name]()


def video(model: Any, kind: str, frames: int = F) -> Tensor:
    return made_video(kind, frames, grid=geometry(model.config).grid)


def as_given(found: Family, model: Any, pixels: Tensor) -> dict[str, Tensor]:
    """One video as the family's processor gives it to the model."""
    if "video_grid_thw" in found.beside_pixels:
        patches, grid = packed(pixels, geometry(model.config).patch)
        return {found.pixels_name: patches, "video_grid_thw": grid}
    return {found.pixels_name: pixels if found.model_type == "internvl" else pixels[None]}


def with_prompt(found: Family, model: Any, ids: Tensor, pixels: Tensor) -> dict[str, Any]:
    """All that `generate` is given of a video and a prompt about it."""
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **as_given(found, model, pixels)}
    if "mm_token_type_ids" in found.beside_pixels:
        given["mm_token_type_ids"] = (ids == found.video_token_id(model.config)).int() * 2
    return given


def own(found: Family, model: Any, pixels: Tensor) -> Tensor:
    """transformers' visual tokens of one video, and behind each what else its language model is given of it, [N, E]."""
    config, given = model.config, as_given(found, model, pixels)
    settings = ("vision_feature_layer", "vision_feature_select_strategy")
    how = {name: getattr(config, name) for name in settings if hasattr(config, name)}
    out = getattr(model.model, found.features_name)(*given.values(), **how)
    tokens = torch.cat(list(out.pooler_output))
    return torch.cat([tokens, *(torch.cat(list(one)) for one in getattr(out, "deepstack_features", ()))], dim=-1)


def closing_ones(found: Family, positions: Tensor, cells: tuple[int, int]) -> int:
    """How many tokens close those that were kept."""
    closes = found.closings(cells).closes
    return len(set((positions // cells[1]).tolist())) if closes == "row" else int(closes == "video")


def prompt(found: Family, model: Any, frames: int = F) -> Tensor:
    """[1, L] ids of a prompt: text, and before every span of a video a text of its own."""
    placeholder = found.video_token_id(model.config)
    spans = [[7, number, *[placeholder] * size, 9] for number, size in enumerate(found.spans(model.config, frames), 50)]
    return torch.tensor([[1, 2, 3, *chain(*spans), 4, 5]])


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
    pixels = video(model, "scenes")
    wanted = own(found, model, pixels)
    frame, closing = geometry(model.config), found.closing(model.model)
    seen = encode(found.vision_of(model.model), pixels, EarlyTom(OFF), depth=frame.depth)
    tokens = found.closings(frame.cells).closed(seen.tokens, seen.positions, closing)
    assert torch.equal(tokens, wanted)
    with apply_earlytom(model, OFF):
        assert torch.equal(own(found, model, pixels), wanted)
    more = video(model, "scenes", F * frame.step)
    merged = encode(found.vision_of(model.model), more, EarlyTom(OFF.replace(merge_layers=(1,), tau=-1.0)))
    assert len(merged.tokens) < F * frame.tokens_per_frame  # negative control


@every
def test_off_answers_as_transformers_do(name: str) -> None:
    found, model = family(name)
    ids, pixels = prompt(found, model), video(model, "scenes")
    given = with_prompt(found, model, ids, pixels)
    wanted = model.generate(**given, max_new_tokens=12, do_sample=False)
    with apply_earlytom(model, OFF):
        assert torch.equal(model.generate(**given, max_new_tokens=12, do_sample=False), wanted)
    with apply_earlytom(model, ON):
        less = model.generate(**given, max_new_tokens=12, do_sample=False)
    assert torch.equal(less[:, : ids.shape[1]], ids)
    assert not torch.equal(less, wanted)  # negative control: it sees less


@every
@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_on_it_keeps_as_many_tokens_as_are_promised(name: str, ratio: float) -> None:
    found, model = family(name)
    on, frame = ON.replace(retention_ratio=ratio), geometry(model.config)
    promised = token_count(F // frame.step, frame.tokens_per_frame, ratio, merges=3)
    given = as_given(found, model, video(model, "scenes"))
    pixels = given.pop(found.pixels_name)
    with apply_earlytom(model, on) as applied:
        seen = applied.encode(video(model, "scenes"))
        short, _, embeds = applied.shorten(prompt(found, model), None, pixels, **given)
    assert len(seen.tokens) == promised < F // frame.step * frame.tokens_per_frame
    assert seen.tokens.shape[1] == frame.token_width
    assert int((short == found.video_token_id(model.config)).sum()) == promised + closing_ones(
        found, seen.positions, frame.cells
    )
    assert embeds.shape == (1, short.shape[1], frame.llm_width)
    kept = [span.number for span in frame_spans(seen.positions, seen.sources, frame.tokens_per_frame)]
    spans = [number for number in range(F) if number + 50 in short[0].tolist()]
    assert spans == (kept if found.span_a_frame else [0])


@every
@torch.no_grad()
def test_a_still_video_keeps_its_own_tokens(name: str) -> None:
    """Frames that are alike are merged into what they were: what is left are tokens of any of them."""
    found, model = family(name)
    pixels, frame = video(model, "still"), geometry(model.config)
    with apply_earlytom(model, ON) as applied:
        seen = applied.encode(pixels)
    one = encode(found.vision_of(model.model), pixels[: frame.step], EarlyTom(OFF), depth=frame.depth).tokens
    assert seen.frames_per_stage[-1] < seen.frames_per_stage[0] == F // frame.step
    torch.testing.assert_close(seen.tokens, one[seen.positions % frame.tokens_per_frame], rtol=0, atol=2e-5)
    moving = encode(found.vision_of(model.model), video(model, "noise"), EarlyTom(ON), depth=frame.depth)
    assert not torch.allclose(moving.tokens, one[moving.positions % frame.tokens_per_frame], atol=0.1)


@every
@torch.no_grad()
def test_shapes_are_those_of_the_geometry(name: str) -> None:
    found, model = family(name)
    frame, pixels = geometry(model.config), video(model, "noise")
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
    assert seen.features.shape == (F // frame.step, frame.tokens_per_frame, frame.token_width)
    assert vision.own(seen.features).shape[2] == frame.llm_width
    assert seen.cells == frame.cells
    assert seen.relevance is not None
    assert torch.equal(seen.relevance, vision.pool(received[:, :, None])[:, :, 0])
    pooled = found.pool(received[:, :, None])[:, :, 0]  # of patches that stand row by row, not window by window
    assert torch.equal(seen.relevance.sort().values, pooled.sort().values)
    for patch in range(0, frame.patches, 3):  # what a patch receives goes to the tokens that it has a part in
        other, one = patches.clone(), torch.zeros_like(received)
        other[0, patch], one[0, patch] = 9.0, 1.0
        changed = vision.features(other, one)
        assert changed.relevance is not None
        assert torch.equal((changed.features != seen.features).any(-1), changed.relevance > 0)
    assert vision.features(patches, None).relevance is None


@every
def test_counts_are_those_of_the_model(name: str) -> None:
    found, model = family(name)
    frame = geometry(model.config)
    rows, steps = frame.cells[0], F // frame.step
    closing = {"row": rows * steps, "video": 1, None: 0}[found.closings(frame.cells).closes or None]
    assert found.placeholders(model.config, F) == steps * frame.tokens_per_frame + closing
    assert found.placeholders(model.config, F) == sum(found.spans(model.config, F))
    assert 0 <= found.video_token_id(model.config) < model.config.text_config.vocab_size
    vision = found.vision_of(model.model)
    parts: list[Any] = [vision.tower.embeddings, *vision.tower.layers[: frame.depth]]
    parts += [module for name, module in vision.tower.model.named_children() if name.startswith("pre")]
    parts += [module for name, module in vars(vision).items() if name in ("projector", "norm")]
    assert found.vision_weights(model.config) == sum(p.numel() for part in parts for p in part.parameters())
    whole, less = (found.vision_flops(model.config, *stages) for stages in (((F,), ()), ((F, 3), (0,))))
    assert found.projector_flops(model.config, F) == 2 * found.projector_flops(model.config, F // 2) < less < whole


@every
@torch.no_grad()
def test_its_own_tokens_are_transformers_features(name: str) -> None:
    found, model = family(name)
    pixels = video(model, "scenes")
    closing = found.closing(model.model)
    tokens = found.own_tokens(model, pixels)
    assert torch.equal(tokens, own(found, model, pixels))
    assert len(tokens) == found.placeholders(model.config, F)
    assert closing is None or torch.equal(tokens[-1], closing)


@every
def test_its_modules_are_made_alone_and_take_the_tensors_of_a_whole_model(name: str) -> None:
    found, model = family(name)
    whole, alone = found.modules(model.model), found.new_modules(model.config)
    state = {found.canonical_name(raw): value for raw, value in model.named_parameters()}
    assert all(raw.startswith((*found.vision_names, *found.decoder_names, *found.unused_names)) for raw in state)
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
    tower, pixels = found.modules(model.model).vision_tower, video(model, "noise", geometry(model.config).step)
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
