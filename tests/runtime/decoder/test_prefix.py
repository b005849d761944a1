"""A prompt whose beginning was read before gives what the whole prompt gives, question after question."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from earlytom.errors import UserError
from runtime.decoder.eager import Decoder, InnerMerge
from runtime.decoder.prefix import Prefix
from runtime.decoder.sampling import Sampling
from tests.runtime.decoder.tiny_decoder import (
    BUCKETS,
    CONTEXT,
    SLIDING,
    WIDTH,
    answer,
    lengths_read,
    make_llama,
    make_qwen,
    prompt,
)
from tests.runtime.gpu.recorded_graph import WaitsForDeviceError, no_waiting

pytestmark = pytest.mark.usefixtures("one_thread")
MODELS: dict[str, Callable[[], Any]] = {
    "qwen2": make_qwen,
    "llama": make_llama,
    "sliding window": lambda: make_qwen(**SLIDING),
    "eager attention": lambda: make_qwen(attn_implementation="eager"),
}


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    return MODELS[request.param]()


@pytest.fixture
def decoder(model: Any) -> Decoder:
    return Decoder.from_model(model, buckets=BUCKETS)


def logits(decoder: Decoder, embeds: Tensor, prefix: Prefix | None = None, new: int = 8) -> Tensor:
    """The logits [V] after the prompt."""
    stream = decoder.stream(embeds, max_new_tokens=new, prefix=prefix)
    next(stream)
    after = decoder._logits.clone()
    stream.close()
    return after


def distance(got: Tensor, expected: Tensor) -> float:
    """Of logits: the largest difference, in shares of the largest logit."""
    return float((got - expected).abs().max() / expected.abs().max())


# The same as in one piece


# Around the window of 6, around buckets of 16 and 32, and so that prefix and whole need different buckets.
@pytest.mark.parametrize(
    ("first", "rest"), [(1, 1), (1, 9), (5, 1), (5, 2), (6, 5), (7, 1), (9, 7), (15, 1), (16, 1), (16, 8), (20, 30)]
)
def test_logits_and_tokens_equal_a_prefill_in_one_piece(decoder: Decoder, first: int, rest: int) -> None:
    whole, other = prompt(first + rest), prompt(first + rest, seed=1)
    prefix = decoder.prefill(whole[:, :first])
    assert prefix.length == first
    assert distance(logits(decoder, whole[:, first:], prefix), logits(decoder, whole)) < 1e-5
    assert answer(decoder, whole[:, first:], 12, prefix=prefix) == answer(decoder, whole, 12)
    for wrong in (decoder.prefill(other[:, :first]), None):  # negative control: what the prefix holds matters
        assert distance(logits(decoder, whole[:, first:], wrong), logits(decoder, whole)) > 1e-2


def test_nothing_but_rounding_tells_them_apart() -> None:
    decoder = Decoder.from_model(make_qwen(**SLIDING).double(), buckets=BUCKETS)
    for first, rest in [(1, 1), (5, 2), (9, 7), (16, 1), (20, 30)]:
        whole = prompt(first + rest)
        prefix = decoder.prefill(whole[:, :first])
        assert distance(logits(decoder, whole[:, first:], prefix), logits(decoder, whole)) < 1e-12


def test_an_answer_may_fill_the_last_bucket(decoder: Decoder) -> None:
    prefix = decoder.prefill(prompt(CONTEXT - 10)[:, : CONTEXT - 20])
    assert answer(decoder, prompt(CONTEXT - 10)[:, CONTEXT - 20 :], 10, prefix=prefix) == answer(
        decoder, prompt(CONTEXT - 10), 10
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    decoder = Decoder.from_model(make_qwen().to(dtype), buckets=BUCKETS)
    whole = prompt(20)
    prefix = decoder.prefill(whole[:, :12])  # float32 embeddings are converted
    assert {tensor.dtype for tensor in (*prefix.keys, *prefix.values)} == {dtype}
    assert distance(logits(decoder, whole[:, 12:], prefix), logits(decoder, whole)) < 0.03


def test_sampling_gives_the_tokens_of_one_piece(decoder: Decoder) -> None:
    sampling = Sampling(temperature=1.0, top_k=20, seed=5)
    prefix = decoder.prefill(prompt(12)[:, :8])
    assert answer(decoder, prompt(12)[:, 8:], 20, sampling, prefix=prefix) == answer(decoder, prompt(12), 20, sampling)


# What it costs


def test_only_the_question_is_read_and_no_logits_are_made_for_the_prefix(model: Any, decoder: Decoder) -> None:
    heads: list[int] = []
    hook = model.lm_head.register_forward_hook(lambda *_: heads.append(1))
    with lengths_read(model.get_decoder()) as lengths:
        prefix = decoder.prefill(prompt(20))
        assert (lengths, heads) == ([20], [])
        answer(decoder, prompt(5), 3, prefix=prefix)
        answer(decoder, prompt(4), 3, prefix=prefix)
    hook.remove()
    assert lengths == [20, 5, 1, 1, 4, 1, 1]


def test_its_tensors_are_copies_and_counted(decoder: Decoder, model: Any) -> None:
    prefix = decoder.prefill(prompt(5))
    heads, width = model.config.num_key_value_heads, WIDTH // model.config.num_attention_heads
    tensors = [*prefix.keys, *prefix.values]
    assert len(prefix.keys) == len(prefix.values) == model.config.num_hidden_layers
    assert all(tensor.is_contiguous() for tensor in tensors)
    assert {tuple(tensor.shape) for tensor in tensors} == {(1, heads, 5, width)}
    assert prefix.bytes == sum(tensor.untyped_storage().nbytes() for tensor in tensors)  # nothing more is kept alive
    assert prefix.bytes == 2 * model.config.num_hidden_layers * heads * 5 * width * 4
    owned = {layer.keys.untyped_storage().data_ptr() for cache in decoder._caches.values() for layer in cache.layers}
    assert not owned & {tensor.untyped_storage().data_ptr() for tensor in tensors}


def test_a_prefix_does_not_keep_its_decoder_alive() -> None:
    decoder = Decoder.from_model(make_qwen(), buckets=BUCKETS)
    prefix = decoder.prefill(prompt(5))
    gone = weakref.ref(decoder)
    del decoder
    gc.collect()
    assert gone() is None
    assert prefix.length == 5


def test_reading_a_prompt_does_not_wait_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder.from_model(make_qwen(), buckets=BUCKETS)
    prefix = decoder.prefill(prompt(8))
    cache = decoder._cleared_cache(32)

    def read(prefix: Prefix | None) -> None:
        with torch.inference_mode(), no_waiting():
            cache.reset()
            decoder._read_prompt(prompt(5), cache, None, prefix)

    read(prefix)
    read(None)
    monkeypatch.setattr(type(cache), "get_query_offset", lambda self, layer=0: self.get_seq_length(layer))
    with pytest.raises(WaitsForDeviceError):  # negative control: transformers' own way
        read(prefix)


# Again and again


def test_questions_take_turns_and_leave_prefixes_as_they_were(decoder: Decoder) -> None:
    clips = [prompt(14, seed=1), prompt(20, seed=2)]
    questions = [prompt(6, seed=3), prompt(3, seed=4), prompt(25, seed=5)]
    fresh = {
        (c, q): answer(decoder, torch.cat((clip, question), 1))
        for c, clip in enumerate(clips)
        for q, question in enumerate(questions)
    }
    assert len({tuple(tokens) for tokens in fresh.values()}) == 6  # or mixing them up would not be seen
    prefixes = [decoder.prefill(clip) for clip in clips]
    before = [[tensor.clone() for tensor in (*prefix.keys, *prefix.values)] for prefix in prefixes]
    for c, q in [(0, 0), (1, 0), (0, 1), (0, 0), (1, 2), (1, 1), (0, 2), (1, 0), (0, 0)]:
        assert answer(decoder, questions[q], prefix=prefixes[c]) == fresh[c, q]
        assert answer(decoder, questions[q]) != fresh[c, q]  # without one nothing is left of it
    for prefix, tensors in zip(prefixes, before, strict=True):
        for now, then in zip((*prefix.keys, *prefix.values), tensors, strict=True):
            assert torch.equal(now, then)


def test_a_stream_that_was_closed_leaves_the_prefix_usable(decoder: Decoder) -> None:
    prefix = decoder.prefill(prompt(12)[:, :8])
    stream = decoder.stream(prompt(12)[:, 8:], max_new_tokens=8, prefix=prefix)
    next(stream)
    with pytest.raises(RuntimeError, match="already streaming"):
        decoder.prefill(prompt(3))
    stream.close()
    assert answer(decoder, prompt(12)[:, 8:], prefix=prefix) == answer(decoder, prompt(12))


def test_it_works_in_a_cache_that_no_pass_has_used(decoder: Decoder) -> None:
    expected = answer(decoder, prompt(40), 20)
    prefix = decoder.prefill(prompt(40)[:, :10])
    decoder._caches.clear()
    assert answer(decoder, prompt(40)[:, 10:], 20, prefix=prefix) == expected


# What cannot work


def test_a_prefix_of_another_decoder_is_refused_at_once(model: Any, decoder: Decoder) -> None:
    prefix = Decoder.from_model(model, buckets=BUCKETS).prefill(prompt(5))
    with pytest.raises(UserError, match="made by another decoder") as caught:
        decoder.stream(prompt(3), max_new_tokens=3, prefix=prefix)
    assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused_at_once(decoder: Decoder) -> None:
    prefix = decoder.prefill(prompt(100))
    assert len(answer(decoder, prompt(20), 8, prefix=prefix)) == 8
    with pytest.raises(UserError, match=r"121 tokens \(100 of them a prefix\) and 8 new ones need 129 positions"):
        decoder.stream(prompt(21), max_new_tokens=8, prefix=prefix)
    assert decoder.prefill(prompt(CONTEXT - 2)).length == CONTEXT - 2
    with pytest.raises(UserError, match=r"127 tokens leaves no room .* 128 positions"):
        decoder.prefill(prompt(CONTEXT - 1))
    for embeds in (torch.zeros(4, WIDTH), torch.zeros(1, 4, WIDTH + 1), torch.zeros(1, 0, WIDTH)):
        with pytest.raises(ValueError, match="embed"):
            decoder.prefill(embeds)
        with pytest.raises(ValueError, match="embed"):
            decoder.stream(embeds, max_new_tokens=3, prefix=prefix)


def test_embeddings_that_are_not_finite_are_not_kept(decoder: Decoder) -> None:
    broken = prompt(10)
    broken[0, 3, 2] = torch.nan
    with pytest.raises(UserError, match="check the vision engine"):
        decoder.prefill(broken)
    assert decoder.prefill(prompt(10)).length == 10


def test_inner_merging_and_a_prefix_exclude_each_other() -> None:
    decoder = Decoder.from_model(make_qwen(num_hidden_layers=4), buckets=BUCKETS, inner=InnerMerge(2))
    with pytest.raises(UserError, match="leave out --inner-layer"):
        decoder.prefill(prompt(12), visual=range(2, 9))
    text = decoder.prefill(prompt(12)[:, :8])  # nothing to merge in it
    with pytest.raises(UserError, match="leave out --inner-layer"):
        decoder.stream(prompt(12)[:, 8:], max_new_tokens=4, visual=range(9, 11), prefix=text)
    plain = Decoder.from_model(make_qwen(num_hidden_layers=4), buckets=BUCKETS)
    list(decoder.stream(prompt(12), max_new_tokens=4, visual=range(2, 9)))  # its cache remembers what was merged
    assert answer(decoder, prompt(12)[:, 8:], 4, prefix=text) == answer(plain, prompt(12), 4)


def test_inner_merging_of_nothing_does_not_stand_in_the_way() -> None:
    decoder = Decoder.from_model(make_qwen(), buckets=BUCKETS, inner=InnerMerge(1, ratio=0.0))
    prefix = decoder.prefill(prompt(12)[:, :8], visual=range(2, 7))
    assert answer(decoder, prompt(12)[:, 8:], 4, prefix=prefix, visual=range(2, 7)) == answer(decoder, prompt(12), 4)
