"""A decoder some of whose layers keep a state of one size: prefixes, passes and answers as those of transformers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from earlytom.errors import UserError
from runtime.decoder.eager import Decoder
from tests.earlytom.tiny import tiny_qwen3_5

NEW, L = 12, 21


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_qwen3_5()


def embedded(seed: int = 0, length: int = L) -> Tensor:
    return torch.randn(1, length, 32, generator=torch.Generator().manual_seed(seed))


def own(model: Any, embeds: Tensor) -> list[int]:
    mask = torch.ones(embeds.shape[:2], dtype=torch.int64)
    return model.generate(inputs_embeds=embeds, attention_mask=mask, max_new_tokens=NEW, do_sample=False)[0].tolist()


def test_answers_are_transformers_own_however_often_the_cache_is_used(model: Any) -> None:
    decoder = Decoder.from_model(model)
    for seed, length in ((0, L), (1, 1), (2, 3), (0, L), (3, 70)):
        embeds = embedded(seed, length)
        assert list(decoder.stream(embeds, max_new_tokens=NEW)) == own(model, embeds)
    stream = decoder.stream(embedded(4), max_new_tokens=NEW)
    next(stream)
    stream.close()  # in the middle
    assert list(decoder.stream(embedded(), max_new_tokens=NEW)) == own(model, embedded())


@pytest.mark.parametrize("cut", [1, 2, 4, 9, L - 1])
def test_a_prefix_has_the_states_at_its_end(model: Any, cut: int) -> None:
    decoder, whole = Decoder.from_model(model), embedded()
    prefix = decoder.prefill(whole[:, :cut])
    assert (len(prefix.keys), len(prefix.ends)) == (1, 2)
    assert prefix.bytes == 4 * sum(
        t.numel() for t in (*prefix.keys, *prefix.values, *(t for e in prefix.ends for t in e))
    )
    kept = [tensor.clone() for end in prefix.ends for tensor in end]
    other = embedded(5)
    for rest in (whole[:, cut:], other[:, cut:], whole[:, cut:]):  # the last, after another question
        wanted = own(model, torch.cat([whole[:, :cut], rest], dim=1))
        assert list(decoder.stream(rest, prefix=prefix, max_new_tokens=NEW)) == wanted
    assert all(map(torch.equal, kept, [tensor for end in prefix.ends for tensor in end]))  # no stream changed it
    fresh = Decoder.from_model(model)
    with pytest.raises(UserError, match="another decoder"):
        fresh.stream(whole[:, cut:], prefix=prefix, max_new_tokens=NEW)


def test_a_prefix_goes_into_a_cache_that_was_never_used(model: Any) -> None:
    decoder, whole = Decoder.from_model(model, buckets=[16, 64]), embedded()
    prefix = decoder.prefill(whole[:, :9])  # of the small bucket
    assert list(decoder.stream(whole[:, 9:], prefix=prefix, max_new_tokens=NEW)) == own(model, whole)


def test_logits_behind_a_prefix_are_those_of_the_whole_prompt_to_rounding(model: Any) -> None:
    decoder, whole, found = Decoder.from_model(model), embedded(), []
    for begin in (whole, embedded(6)):
        prefix = decoder.prefill(begin[:, :9])
        next(decoder.stream(whole[:, 9:], prefix=prefix, max_new_tokens=2))
        found.append(decoder._logits.clone())
    next(decoder.stream(whole, max_new_tokens=2))
    torch.testing.assert_close(found[0], decoder._logits, atol=1e-4, rtol=0)
    assert not torch.allclose(found[1], decoder._logits, atol=1e-2)  # negative control


def test_a_bias_on_keys_is_refused_and_steps_are_no_graphs(model: Any) -> None:
    decoder = Decoder.from_model(model)
    with pytest.raises(UserError, match="an attention bias needs full attention, and this language model has others"):
        decoder.stream(embedded(), max_new_tokens=1, bias=torch.zeros(L))
    list(decoder.stream(embedded(), max_new_tokens=2))
    assert not next(iter(decoder._caches.values())).on_device
