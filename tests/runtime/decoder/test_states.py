"""States for the first layers and positions on several axes: what transformers' own model makes of such a prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from earlytom import apply_earlytom
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.families.qwen3_vl.pixels import packed
from earlytom.families.qwen3_vl.reading import positions_of
from runtime.decoder.eager import Decoder, InnerMerge
from tests.earlytom.tiny import VIDEO_TOKEN, made_video, tiny_qwen3_vl

OFF = EarlyTomConfig(retention_ratio=1.0, merge_layers=())
NEW = 10


@pytest.fixture(scope="module")
def asked() -> tuple[Any, list[int], Tensor, Tensor, Tensor]:
    """A model, its greedy answer about a video, and the prompt: embeddings, positions [3, L], states [2, L, D]."""
    model = tiny_qwen3_vl(grid=(4, 8))
    pixels, grid = packed(made_video("scenes", 6, grid=(4, 8)), 4)
    ids = [1, 2]
    for number in range(3):
        ids += [50 + number, 124, *[VIDEO_TOKEN] * 8, 125]
    prompt = torch.tensor([[*ids, 4, 5]])
    given = {"pixel_values_videos": pixels, "video_grid_thw": grid}
    more = {"mm_token_type_ids": (prompt == VIDEO_TOKEN).int() * 2}
    answer = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, **given, **more
    )
    with apply_earlytom(model, OFF) as applied, torch.no_grad():
        short, embeds = applied._shortened(prompt, None, pixels, {"video_grid_thw": grid})
    states = torch.zeros(2, *embeds.shape[1:])
    states[:, short.visual[0]] = short.tokens[:, 32:].unflatten(1, (2, 32)).transpose(0, 1)
    return model, answer[0, prompt.shape[1] :].tolist(), embeds, positions_of(short)[:, 0], states


def test_a_stream_is_transformers_answer(asked: tuple[Any, list[int], Tensor, Tensor, Tensor]) -> None:
    model, wanted, embeds, positions, states = asked
    decoder = Decoder.from_model(model)
    for _ in range(2):  # the cache is used again
        assert list(decoder.stream(embeds, max_new_tokens=NEW, positions=positions, states=states)) == wanted
    for less in ({"positions": positions}, {"states": states}, {"positions": positions, "states": states.roll(1, 0)}):
        assert list(decoder.stream(embeds, max_new_tokens=NEW, **less)) != wanted  # negative control


@pytest.mark.parametrize("cut", [15, 30])
def test_a_prefix_with_states_goes_on(asked: tuple[Any, list[int], Tensor, Tensor, Tensor], cut: int) -> None:
    """Wherever it ends: the rest has positions and states of its own."""
    model, wanted, embeds, positions, states = asked
    decoder = Decoder.from_model(model)
    prefix = decoder.prefill(embeds[:, :cut], positions=positions[:, :cut], states=states[:, :cut])
    rest = {"positions": positions[:, cut:], "states": states[:, cut:]}
    for _ in range(2):
        assert list(decoder.stream(embeds[:, cut:], prefix=prefix, max_new_tokens=NEW, **rest)) == wanted


@torch.no_grad()
@pytest.mark.parametrize("cut", [0, 4, 9])
def test_an_answer_stands_behind_the_last_text_of_the_prompt(cut: int) -> None:
    """As in `generate`, even where a video lasts longer: all computed again for each token, without a cache."""
    model = tiny_qwen3_vl()
    embeds = torch.randn(1, 11, 32, generator=torch.Generator().manual_seed(0))
    text = torch.arange(11)
    positions = torch.stack([torch.where((text > 1) & (text < 7), 9 * text, text), text, text])  # [3, L], up to 54

    def wanted(begin: int) -> Tensor:
        places, read = positions, embeds
        for at in range(begin, begin + 3):
            hidden = model.get_decoder()(inputs_embeds=read, position_ids=places[:, None]).last_hidden_state
            logits = model.lm_head(hidden)[0, -1]
            read = torch.cat([read, model.get_input_embeddings()(logits.argmax()[None, None])], dim=1)
            places = torch.cat([places, torch.full((3, 1), at)], dim=1)
        return logits

    decoder = Decoder.from_model(model)
    prefix = decoder.prefill(embeds[:, :cut], positions=positions[:, :cut]) if cut else None
    stream = decoder.stream(embeds[:, cut:], positions=positions[:, cut:], prefix=prefix, max_new_tokens=3)
    assert len(list(stream)) == 3
    torch.testing.assert_close(decoder._logits, wanted(11), rtol=0, atol=1e-4)
    assert not torch.allclose(decoder._logits, wanted(55), rtol=0, atol=1e-4)  # negative control


def test_a_bias_is_read_in_passes_with_the_states_of_each(
    asked: tuple[Any, list[int], Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, wanted, embeds, positions, states = asked
    monkeypatch.setattr("runtime.decoder.placing.MASK_ELEMENTS", 8 * embeds.shape[1])  # eight tokens at a time
    given: dict[str, Any] = {"positions": positions, "states": states, "bias": torch.zeros(embeds.shape[1])}
    assert list(Decoder.from_model(model).stream(embeds, max_new_tokens=NEW, **given)) == wanted


@pytest.mark.parametrize("shape", [(4, 5, 32), (2, 4, 32), (2, 5, 31), (5, 32)])
def test_states_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    decoder = Decoder.from_model(tiny_qwen3_vl())
    with pytest.raises(ValueError, match=r"states must be floats \[K, 5, 32\] for up to 2 layers, got"):
        decoder.stream(torch.zeros(1, 5, 32), max_new_tokens=1, states=torch.zeros(shape))


def test_states_that_are_not_finite_are_said_to_be() -> None:
    decoder = Decoder.from_model(tiny_qwen3_vl())
    with pytest.raises(UserError, match="the prompt's states of layers hold values that are not finite"):
        list(decoder.stream(torch.zeros(1, 5, 32), max_new_tokens=1, states=torch.full((1, 5, 32), torch.nan)))


def test_inner_merging_takes_no_states() -> None:
    from tests.earlytom.tiny import tiny_llava

    decoder = Decoder.from_model(tiny_llava(), inner=InnerMerge(1, 0.5))
    with pytest.raises(UserError, match="inner merging does not know states of layers"):
        decoder.stream(torch.zeros(1, 5, 32), max_new_tokens=1, visual=[1, 2], states=torch.zeros(1, 5, 32))
