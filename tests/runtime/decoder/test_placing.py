"""Positions and a bias on keys: against transformers with a whole mask, all computed again for each token."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from earlytom import apply_inner
from runtime.decoder import placing
from runtime.decoder.eager import Decoder, InnerMerge
from runtime.decoder.placing import Placed, StepPlaces, causal_bias
from runtime.decoder.sampling import Sampling
from tests.runtime.decoder.test_decode_step import live
from tests.runtime.decoder.tiny_decoder import BUCKETS, answer, make_llama, make_qwen, prompt
from tests.runtime.gpu.recorded_graph import RecordedReplay, WaitsForDeviceError, no_waiting

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS: dict[str, Callable[[], Any]] = {
    "qwen2": make_qwen,
    "llama": make_llama,
    "eager attention": lambda: make_qwen(attn_implementation="eager"),
}
CLOSE = 1e-11  # of logits in double precision, in shares of the largest
ROUNDED = 1e-5  # the same where something is computed in single precision
LEAST = torch.finfo(torch.float32).min


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]().double()


@pytest.fixture
def decoder(model: Any) -> Decoder:
    return Decoder.from_model(model, buckets=BUCKETS)


def positions_of(length: int, seed: int = 0) -> Tensor:
    """Ascending, with gaps."""
    gaps = torch.randint(1, 5, (length,), generator=torch.Generator().manual_seed(seed))
    return gaps.cumsum(0) - gaps[0]


def bias_of(length: int, seed: int = 0) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed + 50)) * 2


@torch.no_grad()
def slow_answer(
    model: Any, embeds: Tensor, positions: Tensor | None, bias: Tensor | None, new: int
) -> tuple[list[int], list[Tensor]]:
    """Greedy ids and the logits [V] that each is chosen from, without a cache, with a whole mask every time."""
    embeds = embeds.double()
    positions = torch.arange(embeds.shape[1]) if positions is None else positions
    bias = torch.zeros(embeds.shape[1]) if bias is None else bias
    ids: list[int] = []
    logits: list[Tensor] = []
    for _ in range(new):
        length = embeds.shape[1]
        mask = torch.full((length, length), -1e300, dtype=torch.float64).triu(1) + bias.double()
        out = model(
            inputs_embeds=embeds, attention_mask=mask[None, None], position_ids=positions[None], use_cache=False
        )
        logits.append(out.logits[0, -1])
        ids.append(int(logits[-1].argmax()))
        embeds = torch.cat((embeds, model.get_input_embeddings().weight[ids[-1]][None, None]), 1)
        positions = torch.cat((positions, positions[-1:] + 1))
        bias = torch.cat((bias, torch.zeros(1)))
    return ids, logits


def quick_answer(decoder: Decoder, embeds: Tensor, new: int, **how: Any) -> tuple[list[int], list[Tensor]]:
    """The same of the decoder."""
    ids, logits = [], []
    for token in decoder.stream(embeds, max_new_tokens=new, **how):
        ids.append(token)
        logits.append(decoder._logits.clone())
    return ids, logits


def distance(got: list[Tensor], expected: list[Tensor]) -> float:
    """The largest difference, in shares of the largest logit."""
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, expected, strict=True))


@contextmanager
def arguments(module: nn.Module) -> Iterator[list[dict[str, Any]]]:
    """What each pass of Python through a module is given."""
    found: list[dict[str, Any]] = []
    hook = module.register_forward_pre_hook(lambda _, __, kwargs: found.append(dict(kwargs)), with_kwargs=True)
    try:
        yield found
    finally:
        hook.remove()


# The mask


def test_the_mask_of_a_few_keys() -> None:
    got = causal_bias(torch.tensor([0.5, -1.0, 0.0, 2.0]), range(1, 4), 6, torch.float32)
    assert got.tolist() == [
        [
            [
                [0.5, -1.0, LEAST, LEAST, LEAST, LEAST],
                [0.5, -1.0, 0.0, LEAST, LEAST, LEAST],
                [0.5, -1.0, 0.0, 2.0, LEAST, LEAST],
            ]
        ]
    ]
    fewer = causal_bias(torch.tensor([0.5, -1.0, 0.0, 2.0]), range(1), 2, torch.bfloat16)
    assert fewer.tolist() == [[[[0.5, torch.finfo(torch.bfloat16).min]]]]
    assert fewer.dtype == torch.bfloat16


@pytest.mark.parametrize("elements", [1, 64, 300, 1 << 24])
def test_passes_cover_the_prompt_with_masks_of_bounded_size(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placing, "MASK_ELEMENTS", elements)
    placed = Placed(positions_of(20), bias_of(25))  # five of them in a prefix
    passes = list(placed.passes(31, torch.float32))
    assert [t for p in passes for t in range(p.tokens.start, p.tokens.stop)] == list(range(20))
    whole = causal_bias(bias_of(25), range(5, 25), 31, torch.float32)
    for one in passes:
        mask, columns = one.how["attention_mask"], one.columns
        assert columns is not None
        assert mask.shape[-1] == columns <= 31
        assert torch.equal(mask, whole[:, :, one.tokens, :columns])
        assert torch.equal(one.how["position_ids"], positions_of(20)[None, one.tokens])
        assert mask[..., :25].numel() <= max(elements, 25)
    assert len(passes) == {1: 20, 64: 10, 300: 2, 1 << 24: 1}[elements]


def test_rows_of_masks_begin_where_fused_kernels_take_them() -> None:
    for length, columns in [(1, 8), (8, 8), (9, 16), (30, 32)]:
        assert next(Placed(positions_of(length), bias_of(length)).passes(64, torch.half)).columns == columns


# As transformers, with everything computed again


@pytest.fixture(scope="module")
def qwen() -> Any:
    return make_qwen().double()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_answers_are_those_of_an_explicit_mask(qwen: Any, data: st.DataObject) -> None:
    length, new = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 8))
    embeds = prompt(length, data.draw(st.integers(0, 3)))
    gaps = data.draw(st.none() | st.lists(st.integers(-3, 60), min_size=length, max_size=length))
    drawn = data.draw(st.none() | st.lists(st.floats(-6, 6, width=32), min_size=length, max_size=length))
    positions = None if gaps is None else torch.tensor(gaps).cumsum(0)
    bias = None if drawn is None else torch.tensor(drawn)
    cut = data.draw(st.integers(0, length - 1))
    replay = RecordedReplay() if data.draw(st.booleans()) else None
    decoder = Decoder.from_model(qwen, buckets=BUCKETS, replay=replay)

    expected_ids, expected = slow_answer(qwen, embeds, positions, bias, new)
    how: dict[str, Any] = {"positions": positions, "bias": bias}
    if cut:
        first = {name: None if whole is None else whole[:cut] for name, whole in how.items()}
        how = {name: None if whole is None else whole[cut:] for name, whole in how.items()}
        how["prefix"] = decoder.prefill(embeds[:, :cut], **first)
    ids, logits = quick_answer(decoder, embeds[:, cut:], new, **how)
    assert distance(logits, expected) < CLOSE
    assert ids == expected_ids


def test_families_and_attention_of_transformers_own(model: Any, decoder: Decoder) -> None:
    for length in (1, 8, 9, 30):
        positions, bias = positions_of(length), bias_of(length)
        expected_ids, expected = slow_answer(model, prompt(length), positions, bias, 8)
        ids, logits = quick_answer(decoder, prompt(length), 8, positions=positions, bias=bias)
        assert ids == expected_ids
        assert distance(logits, expected) < (CLOSE if model.config._attn_implementation == "sdpa" else ROUNDED)


def test_a_bias_or_a_position_that_is_off_is_noticed(model: Any, decoder: Decoder) -> None:
    """Negative control of the comparisons."""
    positions, bias = positions_of(20), bias_of(20)
    right = {"positions": positions, "bias": bias}
    _, expected = slow_answer(model, prompt(20), positions, bias, 1)
    moved = positions.clone()
    moved[7] += 1
    for wrong in ({"bias": bias.roll(1)}, {"positions": moved}, {"bias": None}, {"positions": None}):
        _, logits = quick_answer(decoder, prompt(20), 1, **(right | wrong))
        assert distance(logits, expected) > 1e-3


@pytest.mark.parametrize("lost", ["the bias", "the position"])
def test_steps_without_bias_or_position_are_noticed(qwen: Any, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    own = StepPlaces.begin

    def begin(self: StepPlaces, placed: Placed | None) -> None:
        if placed is not None and placed.bias is not None:
            kept = (placed.positions, torch.zeros_like(placed.bias))
            placed = Placed(*(kept if lost == "the bias" else (torch.arange(20), placed.bias)))
        own(self, placed)

    _, expected = slow_answer(qwen, prompt(20), positions_of(20), bias_of(20), 2)
    decoder = Decoder.from_model(qwen, buckets=BUCKETS)
    how = {"positions": positions_of(20), "bias": bias_of(20)}
    assert distance(quick_answer(decoder, prompt(20), 2, **how)[1], expected) < CLOSE
    monkeypatch.setattr(StepPlaces, "begin", begin)
    _, logits = quick_answer(decoder, prompt(20), 2, **how)
    assert distance(logits[:1], expected[:1]) < CLOSE  # the prefill is right
    assert distance(logits[1:], expected[1:]) > 1e-3


# What the bias is for


def test_identical_keys_weigh_as_one_with_the_logarithm_of_their_number() -> None:
    model = make_qwen(num_hidden_layers=1).double()  # in further layers the copies would see each other
    decoder = Decoder.from_model(model, buckets=BUCKETS)
    whole, positions = prompt(12), positions_of(12)
    for at, copies in [(0, 2), (3, 5), (10, 20)]:
        index = torch.arange(12).repeat_interleave(
            torch.ones(12, dtype=torch.int64).index_fill(0, torch.tensor(at), copies)
        )
        bias = torch.zeros(12)
        bias[at] = math.log(copies)
        many = quick_answer(decoder, whole[:, index], 6, positions=positions[index])
        one = quick_answer(decoder, whole, 6, positions=positions, bias=bias)
        assert one[0] == many[0]
        assert distance(one[1], many[1]) < 1e-7  # the bias is in single precision
        none = quick_answer(decoder, whole, 6, positions=positions)
        assert distance(none[1][:1], many[1][:1]) > 1e-3  # negative control


def test_in_all_layers_of_what_sees_itself_alone(qwen: Any) -> None:
    decoder = Decoder.from_model(qwen, buckets=BUCKETS)
    whole = prompt(12)
    many = quick_answer(
        decoder, whole[:, [0] * 9 + list(range(1, 12))], 6, positions=torch.tensor([0] * 9 + list(range(1, 12)))
    )
    bias = torch.zeros(12)
    bias[0] = math.log(9)
    one = quick_answer(decoder, whole, 6, bias=bias)
    assert one[0] == many[0]
    assert distance(one[1], many[1]) < 1e-6


# Nothing special


def test_without_either_the_model_is_asked_as_before(qwen: Any) -> None:
    decoder = Decoder.from_model(qwen, buckets=BUCKETS)
    with arguments(qwen.get_decoder()) as found:
        answer(decoder, prompt(9), 3)
        answer(decoder, prompt(3), 3, prefix=decoder.prefill(prompt(9)))
    assert len(found) == 3 + 1 + 3
    assert {frozenset(how) for how in found} == {frozenset(("inputs_embeds", "past_key_values", "use_cache"))}
    assert all(cache.steps is None and not cache._steps for cache in decoder._caches.values())


def test_positions_alone_leave_the_mask_to_transformers(qwen: Any) -> None:
    decoder = Decoder.from_model(qwen, buckets=BUCKETS)
    with arguments(qwen.get_decoder()) as found:
        answer(decoder, prompt(9), 3, positions=positions_of(9))
    assert not any("attention_mask" in how for how in found)
    assert [how["position_ids"].shape for how in found] == [(1, 9), (1, 1), (1, 1)]


def test_zeros_in_a_row_equal_nothing_and_leave_nothing_behind(model: Any, decoder: Decoder) -> None:
    for length in (1, 7, 24):
        plain_ids, plain = quick_answer(decoder, prompt(length), 8)
        for how in (
            {"bias": torch.zeros(length)},
            {"positions": torch.arange(length)},
            {"bias": torch.zeros(length), "positions": torch.arange(length)},
            {"bias": torch.zeros(length), "positions": torch.arange(length) + 30},  # turned alike: relative
        ):
            ids, logits = quick_answer(decoder, prompt(length), 8, **how)
            assert ids == plain_ids
            assert distance(logits, plain) < ROUNDED
        answer(decoder, prompt(length), positions=positions_of(length), bias=bias_of(length))
        again_ids, again = quick_answer(decoder, prompt(length), 8)
        assert again_ids == plain_ids
        assert all(torch.equal(a, b) for a, b in zip(again, plain, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(qwen: Any, dtype: torch.dtype) -> None:
    decoder = Decoder.from_model(make_qwen().to(dtype), buckets=BUCKETS)
    how = {"positions": positions_of(20), "bias": bias_of(20)}
    _, logits = quick_answer(decoder, prompt(20), 1, **how)
    _, expected = slow_answer(qwen, prompt(20), how["positions"], how["bias"], 1)
    assert distance(logits, expected) < 0.06


# Prefixes


def test_a_prefix_has_its_places_and_counts_them(qwen: Any) -> None:
    decoder = Decoder.from_model(qwen, buckets=BUCKETS)
    plain = decoder.prefill(prompt(9))
    assert plain.position is None
    assert plain.bias is None
    positions, bias = positions_of(9), bias_of(9)
    prefix = decoder.prefill(prompt(9), positions=positions, bias=bias)
    assert prefix.position is not None
    assert prefix.bias is not None
    assert int(prefix.position) == int(positions[-1]) + 1
    assert torch.equal(prefix.bias, bias)
    assert prefix.bias.data_ptr() != bias.data_ptr()  # a copy, as all of it
    assert prefix.bytes == plain.bytes + 9 * 4 + 8
    assert decoder.prefill(prompt(9), bias=bias).position == 9


def test_one_half_may_be_plain(qwen: Any) -> None:
    decoder = Decoder.from_model(qwen, buckets=BUCKETS)
    whole, positions, bias = prompt(20), positions_of(20), bias_of(20)
    consecutive = torch.arange(20)
    behind = torch.cat((positions[:12], positions[11] + 1 + torch.arange(8)))
    zeros = torch.zeros(20)
    rows = [  # of the first twelve, of the rest, of the whole
        ({}, {"bias": bias[12:]}, consecutive, torch.cat((zeros[:12], bias[12:]))),
        ({"bias": bias[:12]}, {}, consecutive, torch.cat((bias[:12], zeros[12:]))),
        ({"positions": positions[:12]}, {}, behind, zeros),
        ({"positions": positions[:12]}, {"bias": bias[12:]}, behind, torch.cat((zeros[:12], bias[12:]))),
        ({}, {"positions": positions[12:]}, torch.cat((consecutive[:12], positions[12:])), zeros),
    ]
    for first, rest, places, weights in rows:
        prefix = decoder.prefill(whole[:, :12], **first)
        ids, logits = quick_answer(decoder, whole[:, 12:], 6, prefix=prefix, **rest)
        expected_ids, expected = slow_answer(qwen, whole, places, weights, 6)
        assert ids == expected_ids
        assert distance(logits, expected) < CLOSE


def test_long_prompts_are_read_in_passes_to_the_same_end(qwen: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder.from_model(qwen, buckets=BUCKETS)
    positions, bias = positions_of(50), bias_of(50)
    expected_ids, expected = slow_answer(qwen, prompt(50), positions, bias, 6)
    monkeypatch.setattr(placing, "MASK_ELEMENTS", 7 * 50)
    with arguments(qwen.get_decoder()) as found:
        ids, logits = quick_answer(decoder, prompt(50), 6, positions=positions, bias=bias)
        prefix = decoder.prefill(prompt(50)[:, :30], positions=positions[:30], bias=bias[:30])
    assert [how["inputs_embeds"].shape[1] for how in found] == [7] * 7 + [1] * 6 + [11, 11, 8]
    assert ids == expected_ids
    assert distance(logits, expected) < CLOSE
    _, logits = quick_answer(decoder, prompt(50)[:, 30:], 6, positions=positions[30:], bias=bias[30:], prefix=prefix)
    assert distance(logits, expected) < CLOSE


# Decode steps in fixed buffers


def test_graphs_of_each_kind_are_captured_once_and_take_turns(qwen: Any) -> None:
    replay = RecordedReplay()
    decoder, eager = Decoder.from_model(qwen, buckets=BUCKETS, replay=replay), Decoder.from_model(qwen, buckets=BUCKETS)
    kinds: list[dict[str, Tensor]] = [
        {},
        {"positions": positions_of(20)},
        {"bias": bias_of(20)},
        {"positions": positions_of(20, 1), "bias": bias_of(20, 1)},
    ]
    sampling = Sampling(1.0, seed=3)
    seen = set()
    for how in (*kinds, *reversed(kinds)):
        with arguments(qwen.get_decoder()) as found:
            ids = answer(decoder, prompt(20), 10, **how)
        assert ids == answer(eager, prompt(20), 10, **how)
        assert answer(decoder, prompt(20), 10, sampling, **how) == answer(eager, prompt(20), 10, sampling, **how)
        seen.add(tuple(ids))
    assert len(found) == 1  # Python runs in the prefill only
    assert len(seen) == 4
    assert replay.captures == [32, (32, "positions"), (32, "bias")]
    assert replay.reason is None


def test_a_graph_is_captured_anew_in_a_cache_that_is_full(qwen: Any) -> None:
    replay = RecordedReplay()
    decoder = Decoder.from_model(qwen, buckets=BUCKETS, replay=replay)
    how = {"positions": positions_of(8), "bias": bias_of(8)}
    first = answer(decoder, prompt(8), 8, **how)  # all 16 slots
    replay.clear()
    assert answer(decoder, prompt(8), 8, **how) == first
    assert replay.captures == [(16, "bias")] * 2


def test_warm_up_captures_the_kind_that_is_asked_for(qwen: Any) -> None:
    replay = RecordedReplay()
    decoder = Decoder.from_model(qwen, buckets=BUCKETS, replay=replay)
    decoder.warm_up([10, 60], positions=True, bias=True)
    assert replay.captures == [(16, "bias"), (64, "bias")]
    answer(decoder, prompt(5), positions=positions_of(5), bias=bias_of(5))
    assert replay.captures == [(16, "bias"), (64, "bias")]
    decoder.warm_up([10], positions=True)
    decoder.warm_up([10])
    assert replay.captures[2:] == [(16, "positions"), 16]


@pytest.mark.parametrize("graphs", [False, True])
def test_buffers_stay_where_they_are_and_memory_is_steady(qwen: Any, graphs: bool) -> None:
    decoder = Decoder.from_model(qwen, buckets=BUCKETS, replay=RecordedReplay() if graphs else None)

    def request(number: int) -> None:
        length = 1 + number * 7 % 50
        how = {"positions": positions_of(length, number), "bias": bias_of(length, number)}
        for kind in (how, {"positions": how["positions"]}, {}):
            answer(decoder, prompt(length), 1 + number % 4, **kind)

    def addresses() -> list[int]:
        steps = [one for cache in decoder._caches.values() for one in cache._steps.values()]
        return [tensor.data_ptr() for one in steps for tensor in vars(one).values() if isinstance(tensor, Tensor)]

    for number in range(30):
        request(number)
    before, held = addresses(), live()
    for number in range(30):
        request(number)
    assert live() == held
    assert addresses() == before
    assert len(before) >= 15  # three buckets, three buffers with a bias and two without
    kept = decoder.prefill(prompt(7), bias=bias_of(7))  # negative control: what is kept is counted
    assert live()[0] == held[0] + 2 * len(kept.keys) + 2


def test_a_step_with_a_bias_makes_no_mask(qwen: Any) -> None:
    decoder = Decoder.from_model(qwen, buckets=BUCKETS)
    with arguments(qwen.get_decoder()) as found:
        answer(decoder, prompt(20), 6, bias=bias_of(20))
    rows = [how["attention_mask"] for how in found[1:]]
    assert {tuple(row.shape) for row in rows} == {(1, 1, 1, 32)}
    assert {row.data_ptr() for row in rows} == {decoder._caches[32].steps._row.data_ptr()}
    assert len({how["position_ids"].data_ptr() for how in found[1:]}) == 1


def test_reading_and_stepping_do_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder.from_model(make_qwen(), buckets=BUCKETS)
    prefix = decoder.prefill(prompt(8), positions=positions_of(8), bias=bias_of(8))
    placed = Placed.of(5, positions_of(5), bias_of(5), prefix, torch.device("cpu"))
    cache = decoder._cleared_cache(32, placed)

    def read() -> None:
        with torch.inference_mode(), no_waiting():
            cache.reset()
            again = Placed.of(5, positions_of(5), bias_of(5), prefix, torch.device("cpu"))
            decoder._read_prompt(prompt(5), cache, None, prefix, again)
            decoder._step(cache, None)

    read()
    monkeypatch.setattr(Placed, "next", property(lambda self: torch.tensor(self.positions[-1].item() + 1)))
    with pytest.raises(WaitsForDeviceError):  # negative control
        read()


# Inner merging


@torch.no_grad()
def merged_by_hand(embeds: Tensor, positions: Tensor, visual: range, inner: InnerMerge, new: int) -> list[int]:
    """What transformers answers step by step on a model to which inner merging is applied."""
    from transformers import DynamicCache

    model = make_qwen(num_hidden_layers=4)
    mask = torch.zeros(1, embeds.shape[1], dtype=torch.bool)
    mask[0, visual.start : visual.stop] = True
    cache, ids = DynamicCache(config=model.config), []
    with apply_inner(model, inner.layer, inner.ratio) as applied, applied.prompt(mask):
        for _ in range(new):
            out = model(inputs_embeds=embeds, position_ids=positions[None], past_key_values=cache)
            ids.append(int(out.logits[0, -1].argmax()))
            embeds, positions = model.get_input_embeddings()(torch.tensor([[ids[-1]]])), positions[-1:] + 1
    return ids


def test_inner_merging_keeps_positions(model: Any) -> None:
    inner = InnerMerge(layer=2, ratio=0.7)
    decoder = Decoder.from_model(make_qwen(num_hidden_layers=4), buckets=BUCKETS, inner=inner)
    differs = 0
    for seed, (length, visual) in enumerate([(20, range(3, 15)), (9, range(2, 6)), (25, range(1, 22))]):
        embeds, positions = prompt(length, seed), positions_of(length, seed)
        got = answer(decoder, embeds, 6, positions=positions, visual=visual)
        assert got == merged_by_hand(embeds, positions, visual, inner, 6)
        differs += got != answer(decoder, embeds, 6, visual=visual)
    assert differs > 0  # negative control: positions change answers
