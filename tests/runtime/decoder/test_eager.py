"""The decoder against transformers' own `generate`, and everything that could leak from one request into the next."""

import threading
from collections.abc import Iterator

import pytest
import torch
from transformers import (
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
    SiglipVisionConfig,
)

from earlytom import apply_inner
from earlytom.errors import UserError
from runtime.decoder.eager import Decoder, InnerMerge
from runtime.decoder.sampling import GREEDY, Sampling
from tests.processes import HANG_SECONDS
from tests.runtime.decoder.tiny_decoder import BUCKETS, CONTEXT, TEXT, WIDTH, answer, make_qwen, prompt

pytestmark = pytest.mark.usefixtures("one_thread")


def make_llava() -> PreTrainedModel:
    torch.manual_seed(1)
    vision = SiglipVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    text = Qwen2Config(**TEXT)
    return LlavaOnevisionForConditionalGeneration(LlavaOnevisionConfig(text_config=text, vision_config=vision)).eval()


@pytest.fixture(scope="module")
def qwen() -> PreTrainedModel:
    return make_qwen()


@pytest.fixture
def decoder(qwen: PreTrainedModel) -> Decoder:
    return Decoder.from_model(qwen, buckets=BUCKETS)


def generated(model: PreTrainedModel, embeds: torch.Tensor, new: int) -> list[int]:
    """What transformers itself answers, greedily."""
    return model.generate(inputs_embeds=embeds, do_sample=False, max_new_tokens=new)[0].tolist()


def end_of(stream: Iterator[int]) -> tuple[list[int], str]:
    tokens = []
    while True:
        try:
            tokens.append(next(stream))
        except StopIteration as stop:
            return tokens, stop.value


# Greedy equals transformers


@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 24, 40])
def test_greedy_equals_generate_around_bucket_boundaries(qwen: PreTrainedModel, decoder: Decoder, length: int) -> None:
    expected = generated(qwen, prompt(length), 8)
    assert answer(decoder, prompt(length)) == expected
    assert answer(decoder, prompt(length, seed=1)) != expected  # the answer depends on the prompt


@pytest.mark.parametrize("new", [1, 8, 9, 56, 120])
def test_greedy_equals_generate_when_the_answer_fills_a_bucket(
    qwen: PreTrainedModel, decoder: Decoder, new: int
) -> None:
    assert answer(decoder, prompt(8), new) == generated(qwen, prompt(8), new)


def test_greedy_equals_generate_for_llava_onevision() -> None:
    model = make_llava()
    decoder = Decoder.from_model(model, buckets=BUCKETS)
    assert answer(decoder, prompt(20), 12) == generated(model, prompt(20), 12)


def test_greedy_equals_generate_with_sliding_window_layers() -> None:
    model = make_qwen(use_sliding_window=True, sliding_window=6, max_window_layers=1)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    decoder = Decoder.from_model(model, buckets=BUCKETS)
    for length in (3, 20, 4):
        assert answer(decoder, prompt(length), 12) == generated(model, prompt(length), 12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_equals_generate(dtype: torch.dtype) -> None:
    model = make_qwen().to(dtype)
    decoder = Decoder.from_model(model, buckets=BUCKETS)
    expected = model.generate(
        inputs_embeds=prompt(10).to(dtype), do_sample=False, max_new_tokens=8, cache_implementation="static"
    )
    assert answer(decoder, prompt(10)) == expected[0].tolist()  # a float32 prompt is converted


def test_prefill_computes_logits_for_the_last_position_only(qwen: PreTrainedModel, decoder: Decoder) -> None:
    shapes = []
    hook = qwen.lm_head.register_forward_hook(lambda _, args, out: shapes.append(tuple(args[0].shape)))
    try:
        answer(decoder, prompt(9), 3)
    finally:
        hook.remove()
    assert shapes == [(1, WIDTH)] * 3  # and no step is computed for a token that nobody asks for


# One request after another


def pointers(decoder: Decoder) -> list[int]:
    return [layer.keys.data_ptr() for cache in decoder._caches.values() for layer in cache.layers]


def test_cache_is_allocated_once_per_bucket(decoder: Decoder) -> None:
    answer(decoder, prompt(8))  # 16 positions
    answer(decoder, prompt(9))  # 17: the next bucket
    assert list(decoder._caches) == [16, 32]
    before = pointers(decoder)
    for length in (3, 20, 8):
        answer(decoder, prompt(length))
    assert list(decoder._caches) == [16, 32]
    assert pointers(decoder) == before


def test_nothing_leaks_from_a_longer_request(qwen: PreTrainedModel, decoder: Decoder) -> None:
    answer(decoder, prompt(24))
    assert answer(decoder, prompt(10)) == generated(qwen, prompt(10), 8)


def test_without_clearing_the_longer_request_would_leak(
    qwen: PreTrainedModel, decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Negative control of the test above: it notices a cache that is not cleared."""
    answer(decoder, prompt(10, seed=1), 7)  # fills 16 of 32 positions
    monkeypatch.setattr(type(decoder._caches[32]), "reset", lambda self: None)
    assert answer(decoder, prompt(10), 7) != generated(qwen, prompt(10), 7)


def test_closing_early_leaves_the_decoder_usable(qwen: PreTrainedModel, decoder: Decoder) -> None:
    stream = decoder.stream(prompt(12), max_new_tokens=8)
    next(stream)
    stream.close()
    for _ in decoder.stream(prompt(11), max_new_tokens=8):
        break  # dropped without close
    decoder.stream(prompt(9), max_new_tokens=8)  # never started
    assert answer(decoder, prompt(10)) == generated(qwen, prompt(10), 8)


def test_second_stream_is_refused_and_does_not_disturb_the_first(qwen: PreTrainedModel, decoder: Decoder) -> None:
    first = decoder.stream(prompt(12), max_new_tokens=8)
    tokens = [next(first)]
    with pytest.raises(RuntimeError, match="already streaming"):
        next(decoder.stream(prompt(9), max_new_tokens=8))
    assert tokens + list(first) == generated(qwen, prompt(12), 8)
    assert answer(decoder, prompt(9)) == generated(qwen, prompt(9), 8)


def test_second_stream_from_another_thread_is_refused(decoder: Decoder) -> None:
    first = decoder.stream(prompt(12), max_new_tokens=8)
    next(first)
    errors: list[BaseException] = []

    def other() -> None:
        try:
            answer(decoder, prompt(9))
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=other)
    thread.start()
    thread.join(HANG_SECONDS)
    assert len(errors) == 1
    first.close()


def test_inference_mode_does_not_leak_into_the_caller(decoder: Decoder) -> None:
    for _ in decoder.stream(prompt(4), max_new_tokens=2):
        assert not torch.is_inference_mode_enabled()
        assert torch.is_grad_enabled()
    with torch.inference_mode():
        inside = answer(decoder, prompt(4), 2)
    assert answer(decoder, prompt(4), 2) == inside  # caches made inside and outside work in both


def test_embed_gives_a_tensor_that_can_be_written(qwen: PreTrainedModel, decoder: Decoder) -> None:
    embeds = decoder.embed(torch.tensor([[1, 2, 3]]))
    assert torch.equal(embeds, qwen.get_input_embeddings().weight[None, 1:4])
    embeds[0, 1] = 0
    assert not embeds.requires_grad
    assert answer(decoder, embeds, 4) == generated(qwen, embeds, 4)


# How a stream ends


def test_stop_ids_end_the_answer_and_are_not_yielded(qwen: PreTrainedModel, decoder: Decoder) -> None:
    full = generated(qwen, prompt(10), 8)
    stop = full[3]
    kept, reason = end_of(decoder.stream(prompt(10), max_new_tokens=8, stop_ids=(100, stop)))
    assert kept == full[: full.index(stop)]
    assert reason == "stop"


def test_the_token_limit_ends_the_answer(decoder: Decoder) -> None:
    tokens, reason = end_of(decoder.stream(prompt(10), max_new_tokens=5))
    assert (len(tokens), reason) == (5, "length")


# Sampling


def test_sampling_is_reproducible_with_a_seed(decoder: Decoder) -> None:
    sampling = Sampling(temperature=1.0, seed=7)
    first = answer(decoder, prompt(10), 20, sampling)
    assert answer(decoder, prompt(10), 20, sampling) == first
    assert answer(decoder, prompt(10), 20, Sampling(temperature=1.0, seed=8)) != first
    assert answer(decoder, prompt(10), 20, Sampling(temperature=1.0)) != first


@pytest.mark.parametrize("sampling", [Sampling(1.0, top_k=1), Sampling(1.0, top_p=1e-6), Sampling(1e-6)])
def test_sampling_from_one_candidate_is_greedy(decoder: Decoder, sampling: Sampling) -> None:
    assert answer(decoder, prompt(10), 20, sampling) == answer(decoder, prompt(10), 20)


# What cannot work


def test_a_prompt_that_does_not_fit_is_refused_at_once(decoder: Decoder) -> None:
    with pytest.raises(UserError, match=r"121 tokens and 8 new ones need 129 positions, the decoder has 128"):
        decoder.stream(prompt(121), max_new_tokens=8)
    assert len(answer(decoder, prompt(120), 8)) == 8  # one fewer fits


def test_malformed_prompts_are_refused_at_once(decoder: Decoder) -> None:
    for embeds in (
        torch.zeros(4, WIDTH),
        torch.zeros(2, 4, WIDTH),
        torch.zeros(1, 4, WIDTH + 1),
        torch.zeros(1, 0, WIDTH),
    ):
        with pytest.raises(ValueError, match="embed"):
            decoder.stream(embeds, max_new_tokens=8)
    with pytest.raises(UserError, match="at least 1"):
        decoder.stream(prompt(4), max_new_tokens=0)


def test_prompt_with_nan_points_at_the_vision_engine(decoder: Decoder) -> None:
    good = answer(decoder, prompt(10))
    broken = prompt(10)
    broken[0, 3] = torch.nan
    with pytest.raises(UserError, match="embeddings hold values that are not finite: check the vision engine"):
        answer(decoder, broken)
    assert answer(decoder, prompt(10)) == good


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=1.0, seed=0)])
def test_overflow_inside_the_model_names_the_dtype(sampling: Sampling) -> None:
    model = make_qwen().half()
    decoder = Decoder.from_model(model, buckets=BUCKETS)
    weight = model.get_decoder().layers[0].mlp.down_proj.weight
    kept = weight.detach().clone()
    good = answer(decoder, prompt(10), sampling=sampling)
    with torch.no_grad():
        weight.fill_(6e4)
    with pytest.raises(UserError, match="token 1 in float16"):
        answer(decoder, prompt(10), sampling=sampling)
    with torch.no_grad():
        weight.copy_(kept)
    assert answer(decoder, prompt(10), sampling=sampling) == good


def test_stale_nans_need_a_zeroed_cache(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    """A masked position has weight 0, but 0 times NaN is NaN: rewinding the cache without zeroing it is not enough."""
    good = answer(decoder, prompt(10))
    layers = decoder._caches[32].layers

    def poison() -> None:
        with torch.inference_mode():
            for layer in layers:
                layer.values.fill_(torch.nan)

    poison()
    assert answer(decoder, prompt(10)) == good
    monkeypatch.setattr(
        type(decoder._caches[32]), "reset", lambda self: [la.cumulative_length.zero_() for la in layers]
    )
    poison()
    with pytest.raises(UserError, match="not finite"):
        answer(decoder, prompt(10))


# Buckets


def test_default_buckets_double_up_to_the_context(qwen: PreTrainedModel) -> None:
    assert Decoder.from_model(qwen).buckets == (CONTEXT,)
    assert Decoder.from_model(make_qwen(max_position_embeddings=1500)).buckets == (512, 1024, 1500)
    assert Decoder.from_model(make_qwen(max_position_embeddings=1024)).buckets == (512, 1024)


def test_given_buckets_bound_the_context(qwen: PreTrainedModel) -> None:
    assert Decoder.from_model(qwen, buckets=(64, 16, 4096)).buckets == (16, 64, CONTEXT)
    assert Decoder.from_model(qwen, buckets=(64, 16)).limit == 64
    for wrong in ((), (0,), (-1, 16)):
        with pytest.raises(ValueError, match="positive"):
            Decoder.from_model(qwen, buckets=wrong)


# --- merging inside the decoder


def merged_by_generate(embeds: torch.Tensor, visual: range, inner: InnerMerge, new: int) -> list[int]:
    """What `generate` answers on a model to which inner merging is applied."""
    model = make_qwen(num_hidden_layers=4)
    mask = torch.zeros(1, embeds.shape[1], dtype=torch.bool)
    mask[0, visual.start : visual.stop] = True
    with apply_inner(model, inner.layer, inner.ratio) as applied, applied.prompt(mask):
        return generated(model, embeds, new)


def test_inner_merging_answers_as_generate_does_request_after_request() -> None:
    inner = InnerMerge(layer=2, ratio=0.7)
    decoder = Decoder.from_model(make_qwen(num_hidden_layers=4), buckets=BUCKETS, inner=inner)
    differs = 0
    for seed, (length, visual) in enumerate(
        [(20, range(3, 15)), (9, range(2, 6)), (25, range(1, 22)), (20, range(3, 15))]
    ):
        embeds = prompt(length, seed)
        answer = list(decoder.stream(embeds, max_new_tokens=6, visual=visual))
        assert answer == merged_by_generate(embeds, visual, inner, 6)
        differs += answer != generated(make_qwen(num_hidden_layers=4), embeds, 6)
    assert differs > 1  # negative control: merging changes answers


def test_without_visual_tokens_inner_merging_changes_nothing() -> None:
    decoder = Decoder.from_model(make_qwen(num_hidden_layers=4), buckets=BUCKETS, inner=InnerMerge(2))
    list(decoder.stream(prompt(12), max_new_tokens=4, visual=range(2, 9)))
    plain = list(decoder.stream(prompt(12), max_new_tokens=4))
    assert plain == generated(make_qwen(num_hidden_layers=4), prompt(12), 4)


@pytest.mark.parametrize(
    ("inner", "message"),
    [(InnerMerge(4), "layers 0 to 3"), (InnerMerge(0), "layers 0 to 3"), (InnerMerge(2, 1.0), "ratio")],
)
def test_inner_merging_that_does_not_fit_is_refused(inner: InnerMerge, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Decoder.from_model(make_qwen(num_hidden_layers=4), inner=inner)
