"""Decode steps as graphs: recordings stand for CUDA graphs (see recorded_graph.py), so that their discipline is tested
on any machine. With them a decoder answers as without."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import StaticCache

from earlytom.errors import UserError
from runtime.decoder.eager import Decoder, InnerMerge
from runtime.decoder.prefix import Prefix
from runtime.decoder.sampling import GREEDY, Sampling
from tests.runtime.decoder.tiny_decoder import (
    BUCKETS,
    CONTEXT,
    SLIDING,
    answer,
    lengths_read,
    make_llama,
    make_qwen,
    prompt,
)
from tests.runtime.gpu.recorded_graph import RecordedReplay

pytestmark = pytest.mark.usefixtures("one_thread")
SAMPLINGS = [GREEDY, Sampling(1.0, seed=3), Sampling(0.7, top_p=0.9, top_k=20, seed=4)]


@pytest.fixture
def model() -> Any:
    return make_qwen()


@pytest.fixture
def eager(model: Any) -> Decoder:
    return Decoder.from_model(model, buckets=BUCKETS)


@pytest.fixture
def replay() -> RecordedReplay:
    return RecordedReplay()


@pytest.fixture
def decoder(model: Any, replay: RecordedReplay) -> Decoder:
    return Decoder.from_model(model, buckets=BUCKETS, replay=replay)


# The same answers


@pytest.mark.parametrize("make", [make_qwen, make_llama])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_replayed_steps_answer_as_called_ones(make: Callable[[], Any], sampling: Sampling) -> None:
    model, replay = make(), RecordedReplay()
    eager = Decoder.from_model(model, buckets=BUCKETS)
    decoder = Decoder.from_model(model, buckets=BUCKETS, replay=replay)
    seen = set()
    for length, new, seed in [(3, 8, 0), (9, 8, 1), (3, 8, 2), (40, 24, 0), (3, 13, 3), (100, 28, 0), (9, 8, 4)]:
        tokens = answer(decoder, prompt(length, seed), new, sampling)
        assert tokens == answer(eager, prompt(length, seed), new, sampling)
        seen.add(tuple(tokens))
    assert len(seen) == 7  # a changed input changes the output
    assert replay.captures == [16, 32, 64, 128]  # once a bucket
    assert replay.replays == sum(new - 1 for new in (8, 8, 8, 24, 13, 28, 8))
    assert replay.reason is None


def test_a_replayed_step_has_the_logits_of_a_called_one(decoder: Decoder, eager: Decoder) -> None:
    streams = [d.stream(prompt(20), max_new_tokens=12) for d in (decoder, eager)]
    for _ in range(12):
        assert next(streams[0]) == next(streams[1])
        torch.testing.assert_close(decoder._logits, eager._logits, atol=1e-6, rtol=1e-6)


def test_prefixes_go_into_the_cache_that_was_captured(decoder: Decoder, eager: Decoder) -> None:
    prefixes: list[tuple[Prefix, Prefix]] = [
        (decoder.prefill(prompt(9, seed)), eager.prefill(prompt(9, seed))) for seed in (0, 1)
    ]
    for which, new in [(0, 8), (1, 8), (0, 40), (1, 8), (0, 8)]:
        mine, theirs = prefixes[which]
        assert answer(decoder, prompt(4), new, prefix=mine) == answer(eager, prompt(4), new, prefix=theirs)


def test_python_runs_in_prefills_only(decoder: Decoder, model: Any) -> None:
    answer(decoder, prompt(8))
    with lengths_read(model.get_decoder()) as lengths:
        answer(decoder, prompt(8))
        answer(decoder, prompt(6))
    assert lengths == [8, 6]


def test_buffers_stay_where_they_are(decoder: Decoder) -> None:
    def addresses() -> list[int]:
        layers = [layer for cache in decoder._caches.values() for layer in cache.layers]
        tensors = [t for layer in layers for t in (layer.keys, layer.values, layer.cumulative_length)]
        return [tensor.data_ptr() for tensor in (decoder._chosen, decoder._logits, *tensors)]

    decoder.warm_up([10, 20])
    before = addresses()
    prefix = decoder.prefill(prompt(12))
    for sampling in SAMPLINGS:
        answer(decoder, prompt(3), sampling=sampling)
        answer(decoder, prompt(3), sampling=sampling, prefix=prefix)
    assert addresses() == before


# Weights


def test_weights_that_change_in_place_are_followed_and_those_that_move_need_clear(
    decoder: Decoder, eager: Decoder, replay: RecordedReplay, model: Any
) -> None:
    first = answer(decoder, prompt(9))
    weight = model.get_decoder().layers[1].mlp.down_proj.weight
    with torch.no_grad():
        weight.mul_(-1)
    second = answer(decoder, prompt(9))
    assert first != second == answer(eager, prompt(9))
    with torch.no_grad():
        weight.data = -weight  # elsewhere, as after `.to(...)`
    assert answer(decoder, prompt(9)) != answer(eager, prompt(9)) == first  # the prefill has them, the graph has not
    replay.clear()
    assert answer(decoder, prompt(9)) == first
    assert replay.captures == [32, 32]


def test_clearing_in_the_middle_of_an_answer_changes_nothing(
    decoder: Decoder, eager: Decoder, replay: RecordedReplay
) -> None:
    stream = decoder.stream(prompt(9), max_new_tokens=8)
    tokens = [next(stream), next(stream)]
    replay.clear()
    assert tokens + list(stream) == answer(eager, prompt(9))
    assert answer(decoder, prompt(9)) == answer(eager, prompt(9))  # captured anew, in a cache that is not empty


# Where there are no graphs


def test_a_capture_that_fails_costs_no_answer(decoder: Decoder, eager: Decoder, replay: RecordedReplay) -> None:
    replay.fail = "out of memory"
    for length in (3, 9, 40):
        assert answer(decoder, prompt(length)) == answer(eager, prompt(length))
    assert decoder.replay.reason == "the capture failed: out of memory"
    assert (replay.captures, replay.replays) == ([], 0)


def test_sliding_windows_are_called_and_say_why() -> None:
    model, replay = make_qwen(**SLIDING), RecordedReplay()
    decoder = Decoder.from_model(model, buckets=BUCKETS, replay=replay)
    eager = Decoder.from_model(model, buckets=BUCKETS)
    for length in (3, 20, 4):
        assert answer(decoder, prompt(length), 12) == answer(eager, prompt(length), 12)
    assert "sliding window" in str(replay.reason)
    assert replay.captures == []


def test_without_that_refusal_sliding_windows_would_go_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control of the test above, and of recordings: Python's counters stand still in them."""
    from runtime.decoder.cache import DecoderCache

    decoder = Decoder.from_model(make_qwen(**SLIDING), buckets=BUCKETS, replay=RecordedReplay())
    monkeypatch.setattr(DecoderCache, "on_device", True)
    with pytest.raises(IndexError, match="out of bounds for dimension 2 with size 6"):
        answer(decoder, prompt(3), 12)


def test_merged_prompts_are_called_and_others_replayed() -> None:
    replay, inner = RecordedReplay(), InnerMerge(2, 0.7)
    decoder = Decoder.from_model(make_qwen(num_hidden_layers=4), buckets=BUCKETS, inner=inner, replay=replay)
    merging = Decoder.from_model(make_qwen(num_hidden_layers=4), buckets=BUCKETS, inner=inner)
    plain = Decoder.from_model(make_qwen(num_hidden_layers=4), buckets=BUCKETS)
    differ = 0
    for seed in range(3):
        embeds = prompt(20, seed)
        assert answer(decoder, embeds) == answer(plain, embeds)
        before = replay.replays
        tokens = answer(decoder, embeds, visual=range(3, 15))
        assert replay.replays == before
        assert tokens == answer(merging, embeds, visual=range(3, 15))
        differ += tokens != answer(plain, embeds)
    assert replay.replays == 3 * 7
    assert differ > 0


def test_an_answer_that_broke_off_does_not_break_the_next_capture(decoder: Decoder, eager: Decoder, model: Any) -> None:
    """After logits that are not finite the token is -1, which no embedding has."""
    weight = model.get_decoder().layers[1].mlp.down_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
    with pytest.raises(UserError, match="not finite"):
        answer(decoder, prompt(9))
    assert int(decoder._chosen) == -1
    with torch.no_grad():
        weight.copy_(kept)
    assert answer(decoder, prompt(40)) == answer(eager, prompt(40))
    assert answer(decoder, prompt(9)) == answer(eager, prompt(9))


def test_the_smallest_cache_has_room_for_a_capture(model: Any, replay: RecordedReplay) -> None:
    decoder = Decoder.from_model(model, buckets=(2, 128), replay=replay)
    assert answer(decoder, prompt(1), 1) == answer(Decoder.from_model(model), prompt(1), 1)
    assert replay.captures == [2]


# Before and between requests


def test_warm_up_leaves_nothing_to_allocate_or_capture(
    decoder: Decoder, eager: Decoder, replay: RecordedReplay
) -> None:
    decoder.warm_up([10, 60, 12])
    assert list(decoder._caches) == [16, 64] == replay.captures
    assert all(layer.is_initialized for cache in decoder._caches.values() for layer in cache.layers)
    caches = {id(cache) for cache in decoder._caches.values()}
    assert answer(decoder, prompt(5)) == answer(eager, prompt(5))
    assert answer(decoder, prompt(50)) == answer(eager, prompt(50))
    assert {id(cache) for cache in decoder._caches.values()} == caches
    assert replay.captures == [16, 64]
    answer(decoder, prompt(20))  # negative control: a bucket that was not warmed up
    assert replay.captures == [16, 64, 32]


def test_warm_up_refuses_what_no_request_could_have(decoder: Decoder) -> None:
    with pytest.raises(ValueError, match="at least 3"):
        decoder.warm_up([2])
    with pytest.raises(UserError, match="positions"):
        decoder.warm_up([CONTEXT + 1])
    stream = decoder.stream(prompt(4), max_new_tokens=4)
    next(stream)
    with pytest.raises(RuntimeError, match="already streaming"):
        decoder.warm_up([10])
    stream.close()


def live() -> tuple[int, int, int]:
    """Tensors, bytes of them, and caches that there are."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
    found = [tensor for tensor in found if tensor.layout == torch.strided]  # others' examples have no storage
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in found}
    return len(found), sum(storages.values()), sum(issubclass(type(thing), StaticCache) for thing in gc.get_objects())


@pytest.mark.parametrize("graphs", [False, True])
def test_memory_is_steady_over_many_requests(model: Any, graphs: bool) -> None:
    decoder = Decoder.from_model(model, buckets=BUCKETS, replay=RecordedReplay() if graphs else None)
    prefix = decoder.prefill(prompt(10))

    def request(number: int) -> None:
        sampling = SAMPLINGS[number % 3]
        stream = decoder.stream(
            prompt(1 + number * 7 % 50),
            max_new_tokens=1 + number % 4,
            sampling=sampling,
            prefix=prefix if number % 5 == 0 else None,
        )
        if number % 11 == 0:
            next(stream)  # dropped in the middle
        else:
            list(stream)
        del stream
        if number % 50 == 0:
            decoder.prefill(prompt(7))

    for number in range(30):
        request(number)
    decoder.warm_up(BUCKETS)
    before = live()
    for number in range(110):
        request(number)
    assert live() == before
    kept = decoder.prefill(prompt(7))  # negative control: what is kept is counted
    assert live()[0] == before[0] + 2 * len(kept.keys)
