"""Inner merging in a Qwen2 decoder: against a slow decoder, in every way to generate, off, undone and refused."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaOnevisionForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

from earlytom import EarlyTomConfig, UserError, apply_earlytom
from earlytom.inner_decoder import AppliedInner, Held, InnerPrompt, apply_inner, later_mask
from tests.earlytom.slow_decoder import Model, slow_answer, slow_logits
from tests.earlytom.test_model import batch
from tests.earlytom.tiny import VIDEO_TOKEN, VOCABULARY, made_video, randomise, tiny_llava, video_prompt
from tests.processes import HANG_SECONDS

DEPTH, WIDTH = 4, 32
FULL: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}


# --- in a model


@pytest.fixture(scope="module")
def model() -> LlavaOnevisionForConditionalGeneration:
    """The tiny LLaVA-OneVision with a decoder of four layers."""
    config = copy.deepcopy(tiny_llava().config)
    text = config.text_config.to_dict() | {"num_hidden_layers": DEPTH, "layer_types": None}
    config.text_config = Qwen2Config(**text)
    return randomise(LlavaOnevisionForConditionalGeneration(config), 3)


@pytest.fixture(scope="module")
def qwen() -> Qwen2ForCausalLM:
    settings: Any = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 64}
    heads: Any = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return randomise(Qwen2ForCausalLM(Qwen2Config(**settings, **heads, num_hidden_layers=DEPTH)), 5)


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _left_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does to a shared model, it must be undone."""
    names = {"model", "qwen"} & set(request.fixturenames)
    shared: list[Model] = [request.getfixturevalue(name) for name in names]
    yield
    for each in shared:
        decoder = each.get_decoder()
        assert "_earlytom_inner" not in vars(decoder)
        assert not any("forward" in vars(layer) for layer in decoder.layers)


def inputs(
    frames: int = 4, *, kind: str = "drift", seed: int = 0, before: int = 4, after: int = 3
) -> dict[str, Tensor]:
    ids = video_prompt(frames, seed=seed, before=before, after=after)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": made_video(kind, frames, seed=seed)[None],
    }


def settings(layer: int | None = 2, ratio: float = 0.5, **changes: Any) -> EarlyTomConfig:
    whole: dict[str, Any] = {"retention_ratio": 1.0, "merge_layers": ()}  # nothing is left out before
    return EarlyTomConfig(**(whole | changes), inner_layer=layer, inner_ratio=ratio)


def text_prompt(tokens: int = 24, *, rows: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Ids [B, T], and a mask of the ones in the middle, which are to be merged."""
    ids = torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
    visual = torch.zeros(rows, tokens, dtype=torch.bool)
    visual[:, 5:-4] = True
    return ids, visual


def lengths(cache: Any) -> list[int]:
    return [int(cache.get_seq_length(layer)) for layer in range(DEPTH)]


@pytest.mark.parametrize(("layer", "ratio"), [(1, 0.5), (2, 0.5), (3, 0.75), (2, 0.3)])
def test_generate_is_the_slow_decoder(model: Model, layer: int, ratio: float) -> None:
    row = inputs()
    with apply_earlytom(model, settings(layer, ratio)) as applied:
        got = model.generate(**row, **GREEDY, **FULL)
        ids, _, embeds = applied.shorten(**row)
    visual = (ids[0] == VIDEO_TOKEN).nonzero().flatten().tolist()
    assert len(visual) == 37
    want, logits = slow_answer(model, embeds[0], visual, 6, layer, ratio)
    assert got.sequences[0, row["input_ids"].shape[1] :].tolist() == want
    for a, b in zip(got.logits, logits, strict=True):
        assert torch.allclose(a[0].double(), b, atol=1e-4)
    other = slow_logits(model, embeds[0], visual, embeds.shape[1] - 1, layer, 0.6)
    assert not torch.allclose(logits[0], other, atol=1e-2)  # negative control: the logits depend on what is folded


def test_the_slow_decoder_without_merging_is_the_model(model: Model) -> None:
    row = inputs()
    want = model.generate(**row, **GREEDY, **FULL)
    with apply_earlytom(model, settings(None)) as applied:
        embeds = applied.shorten(**row)[2][0]
    ids, logits = slow_answer(model, embeds, [], 2, 2, 0.5)
    assert want.sequences[0, row["input_ids"].shape[1] :][:2].tolist() == ids
    assert torch.allclose(want.logits[1][0].double(), logits[1], atol=1e-4)


@pytest.mark.parametrize("config", [settings(None), settings(2, 0.0), settings(None, 0.3)], ids=str)
def test_off_is_the_untouched_model_bit_for_bit(model: Model, config: EarlyTomConfig) -> None:
    row = inputs()
    want = model.generate(**row, **GREEDY, **FULL)
    with apply_earlytom(model, config):
        got = model.generate(**row, **GREEDY, **FULL)
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
    with apply_earlytom(model, settings(2)):  # negative control
        on = model.generate(**row, **GREEDY, **FULL)
    assert not torch.allclose(on.logits[0], want.logits[0], atol=1e-3)


def test_what_was_not_announced_is_left_alone(qwen: Model) -> None:
    ids, _ = text_prompt()
    want = qwen.generate(ids, **GREEDY, **FULL)
    with apply_inner(qwen, 2):
        got = qwen.generate(ids, **GREEDY, **FULL)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))


@pytest.mark.parametrize("layer", [1, 2, 3])
def test_earlier_layers_see_all_and_later_ones_less(qwen: Model, layer: int) -> None:
    """The caches have the right lengths, and what they hold is as it should be: exactly the untouched model's up to
    layer k-1, and in layer k for the text, too. So attention of layer k-1 stayed causal, and text was not touched."""
    ids, visual = text_prompt()
    plain: Any = DynamicCache()
    merged: Any = DynamicCache()
    qwen(ids, past_key_values=plain)
    with apply_inner(qwen, layer) as inner, inner.prompt(visual):
        out = qwen(ids, past_key_values=merged)
    left = 24 - 15 + 8  # 7.5 is rounded to the even number
    assert out.logits.shape == (1, left, VOCABULARY)
    assert lengths(merged) == [24] * layer + [left] * (DEPTH - layer)
    pairs = list(zip(merged.layers, plain.layers, strict=True))
    for ours, untouched in pairs[:layer]:
        assert torch.equal(ours.keys, untouched.keys)
        assert torch.equal(ours.values, untouched.values)
    ours, untouched = pairs[layer]
    for text in (slice(0, 5), slice(-4, None)):
        assert torch.allclose(ours.keys[:, :, text], untouched.keys[:, :, text], atol=1e-5)
        assert torch.allclose(ours.values[:, :, text], untouched.values[:, :, text], atol=1e-5)
    assert not torch.allclose(ours.values[:, :, 5:9], untouched.values[:, :, 5:9], atol=1e-3)


def test_what_does_not_stay_can_be_left_out(qwen: Model) -> None:
    """Without folding, layer k gets what layer k-1 gave for the tokens that stay, and those are the same tokens."""
    ids, visual = text_prompt()
    plain, folded, dropped = DynamicCache(), DynamicCache(), DynamicCache()
    qwen(ids, past_key_values=plain)
    with apply_inner(qwen, 2) as inner, inner.prompt(visual):
        qwen(ids, past_key_values=folded)
    with apply_inner(qwen, 2, fold=False) as inner, inner.prompt(visual):
        qwen(ids, past_key_values=dropped)
    kept = dropped._earlytom_inner.kept  # type: ignore[attr-defined]
    assert torch.equal(kept, folded._earlytom_inner.kept)  # type: ignore[attr-defined]
    ours, others, untouched = (cache.layers[2].values for cache in (dropped, folded, plain))
    assert torch.allclose(ours, untouched[:, :, kept[0]], atol=1e-5)
    assert not torch.allclose(others, ours, atol=1e-3)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("padding", [0, 8])
def test_a_prompt_that_is_not_causal_in_one_layer(qwen: Model, implementation: str, padding: int) -> None:
    """As one released form has it, in layer k-1: every token of the prompt sees it whole, and none what comes after."""
    ids, visual = (torch.nn.functional.pad(x, (0, padding)) for x in text_prompt())
    real, last = slice(0, 24), torch.tensor([23])
    found: dict[bool, list[Tensor]] = {}
    qwen.set_attn_implementation(implementation)
    try:
        for causal in (True, False):
            with apply_inner(qwen, 2, causal=causal) as inner, inner.prompt(visual, last=last):
                found[causal] = list(qwen(ids, output_hidden_states=True).hidden_states[1:3])
        layer, entering = qwen.model.layers[1], found[True][0]
        rotary = qwen.model.rotary_emb(entering[:, real], torch.arange(24)[None])
        qwen.set_attn_implementation("eager")  # which takes no mask for none
        open_ = layer(entering[:, real], attention_mask=None, position_embeddings=rotary)
    finally:
        qwen.set_attn_implementation("sdpa")
    assert torch.equal(found[False][0], entering)
    assert torch.allclose(found[False][1][:, real], open_, atol=1e-5)
    assert not torch.allclose(found[True][1][:, real], open_, atol=1e-3)
    assert torch.allclose(found[False][1][:, 24:], found[True][1][:, 24:], atol=1e-5)


def test_hidden_states_have_the_length_of_their_layer(qwen: Model) -> None:
    ids, visual = text_prompt()
    with apply_inner(qwen, 2) as inner, inner.prompt(visual):
        states = qwen(ids, output_hidden_states=True).hidden_states
    assert [state.shape[1] for state in states] == [24, 24, 24, 17, 17]


def test_later_layers_keep_the_original_positions(qwen: Model) -> None:
    """In the rotary embedding. The ids would have gaps, which some kernels read as borders between sequences."""
    ids, visual = text_prompt()
    got: dict[int, dict[str, Any]] = {}
    hooks = [
        layer.self_attn.register_forward_pre_hook(lambda _, args, given, n=n: got.update({n: given}), with_kwargs=True)
        for n, layer in enumerate(qwen.model.layers)
    ]
    cache: Any = DynamicCache()
    try:
        with apply_inner(qwen, 2) as inner, inner.prompt(visual):
            qwen(ids, past_key_values=cache)
            passed = dict(got)
            qwen(ids[:, :1], past_key_values=cache)
    finally:
        for hook in hooks:
            hook.remove()
    kept = cache._earlytom_inner.kept[0]
    assert len(kept) == 17
    for early, late in zip(passed[1]["position_embeddings"], passed[3]["position_embeddings"], strict=True):
        assert torch.equal(late[0], early[0, kept])
    assert passed[1]["position_ids"].tolist() == [list(range(24))]
    assert passed[3]["position_ids"] is None
    assert got[1]["position_ids"].tolist() == got[3]["position_ids"].tolist() == [[24]]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_whole_pass_needs_no_values(qwen: Model, implementation: str) -> None:
    """The host waits for nothing: on the meta device there is nothing to wait for. Prefill and a step after it."""
    meta: Model = Qwen2ForCausalLM._from_config(qwen.config, attn_implementation=implementation).to("meta")
    ids, visual = text_prompt(rows=2)
    visual[1, 8:] = False
    cache: Any = DynamicCache()
    with apply_inner(meta, 2) as inner, inner.prompt(visual):
        assert meta(ids.to("meta"), past_key_values=cache).logits.shape == (2, 24 - 1, VOCABULARY)  # of 3 tokens 2 stay
        assert meta(ids[:, :1].to("meta"), past_key_values=cache).logits.shape == (2, 1, VOCABULARY)


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"cache_implementation": "static", "disable_compile": True}])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_ways_to_generate(qwen: Model, options: dict[str, Any], implementation: str) -> None:
    """Beams have the tokens of several rows; a static cache and eager attention have masks."""
    ids, visual = text_prompt()
    plain = {name: value for name, value in options.items() if name == "num_beams"}
    with apply_inner(qwen, 2) as inner:
        with inner.prompt(visual):
            want = qwen.generate(ids, **GREEDY, **plain, **FULL)
        qwen.set_attn_implementation(implementation)
        try:
            with inner.prompt(visual):
                got = qwen.generate(ids, **GREEDY, **options, **FULL)
        finally:
            qwen.set_attn_implementation("sdpa")
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(got.logits, want.logits, strict=True))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static", "disable_compile": True}], ids=str)
@pytest.mark.parametrize("kind", ["text", "tokens"])
def test_a_batch_equals_each_alone(model: Model, kind: str, options: dict[str, Any]) -> None:
    """Prompts whose texts differ in length, or whose videos keep different numbers of tokens."""
    config, one, two = settings(), inputs(), inputs(kind="noise", seed=1, before=2)
    if kind == "tokens":
        config = settings(retention_ratio=0.25, merge_layers=(1, 2), tau=0.3)
        one, two = inputs(8, kind="still"), inputs(8, kind="noise", seed=1)
    rows = batch(one, two)
    with apply_earlytom(model, config) as applied:
        assert len({len(video) for video in applied.features(rows["pixel_values_videos"])}) == 1 + (kind == "tokens")
        got = model.generate(**rows, **GREEDY, **options, **FULL)
        for n, row in enumerate((one, two)):
            alone = model.generate(**row, **GREEDY, **FULL)
            new = alone.sequences[0, row["input_ids"].shape[1] :]
            assert torch.equal(got.sequences[n, rows["input_ids"].shape[1] :], new)
            for x, y in zip(got.logits, alone.logits, strict=True):
                assert torch.allclose(x[n], y[0], atol=1e-4)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "options", [{}, {"num_beams": 2}, {"cache_implementation": "static", "disable_compile": True}], ids=str
)
def test_rows_that_differ_after_the_merge_only(qwen: Model, options: dict[str, Any], implementation: str) -> None:
    """Nothing is padded in the prompts, so there is no mask, and the later layers need one. One row has no video."""
    ids, visual = text_prompt(rows=3)
    visual[1, 8:] = False
    visual[2] = False
    qwen.set_attn_implementation(implementation)
    try:
        with apply_inner(qwen, 2) as inner:
            with inner.prompt(visual):
                got = qwen.generate(ids, **GREEDY, **options)
                logits = qwen(ids.repeat_interleave(2, 0)).logits[:, -1]  # each prompt twice, as for beams
            for n in range(3):
                with inner.prompt(visual[n : n + 1]):
                    alone = {name: value for name, value in options.items() if name == "num_beams"}
                    assert torch.equal(got[n], qwen.generate(ids[n : n + 1], **GREEDY, **alone)[0])
                    assert torch.allclose(logits[2 * n : 2 * n + 2], qwen(ids[n : n + 1]).logits[:, -1], atol=1e-4)
    finally:
        qwen.set_attn_implementation("sdpa")


def test_a_prompt_padded_to_a_bucket(qwen: Model) -> None:
    """Padding on the right, which causal attention hides: all shapes are those of the bucket."""
    ids, visual = text_prompt()
    with apply_inner(qwen, 2) as inner:
        with inner.prompt(visual):
            want = qwen(ids).logits[:, -1]
        ids, visual = (torch.nn.functional.pad(x, (0, 8)) for x in (ids, visual))
        with inner.prompt(visual, last=torch.tensor([23])):
            got = qwen(ids).logits
        with inner.prompt(visual):  # negative control: ranked by the padding
            other = qwen(ids).logits
    assert got.shape[1] == 17 + 8
    assert torch.allclose(got[:, 16], want, atol=1e-5)
    assert not torch.allclose(other[:, 16], want, atol=1e-3)


def step_by_step(qwen: Model, cache: Any, first: Tensor, steps: int) -> list[int]:
    """Greedy decoding with a cache that holds the prompt, by hand."""
    ids = [int(first[0, -1].argmax())]
    for _ in range(steps):
        ids.append(int(qwen(torch.tensor([ids[-1:]]), past_key_values=cache).logits[0, -1].argmax()))
    return ids


@pytest.mark.parametrize(
    "new", [DynamicCache, lambda: StaticCache(config=Qwen2Config(num_hidden_layers=DEPTH), max_cache_len=64)]
)
def test_a_cache_is_continued_reset_and_used_again(qwen: Model, new: Callable[[], Any]) -> None:
    """By hand, as a runtime does it: inside the block and after it, and with text alone in the same cache."""
    ids, visual = text_prompt()
    longer, more = text_prompt(30, seed=1)
    cache, alone = new(), text_prompt(12, seed=2)[0]
    plain = qwen.generate(alone, **GREEDY)[0, 12:].tolist()
    with apply_inner(qwen, 2) as inner:
        with inner.prompt(visual):
            want = qwen.generate(ids, **GREEDY)[0, 24:].tolist()
        with inner.prompt(more):
            want_more = qwen.generate(longer, **GREEDY)[0, 30:].tolist()
        with inner.prompt(visual):
            first = qwen(ids, past_key_values=cache).logits
            kept = copy.deepcopy(cache)
            assert step_by_step(qwen, cache, first, 5) == want
        assert step_by_step(qwen, kept, first, 5) == want
        cache.reset()
        with inner.prompt(more):
            first = qwen(longer, past_key_values=cache).logits
            assert step_by_step(qwen, cache, first, 2) == want_more[:3]
        assert lengths(cache) == [32, 32, 32 - 11, 32 - 11]  # of 21 visual tokens 10 stay
        cache.reset()
        assert step_by_step(qwen, cache, qwen(alone, past_key_values=cache).logits, 5) == plain
        assert lengths(cache) == [17] * DEPTH


def test_several_generations_in_one_block(qwen: Model) -> None:
    ids, visual = text_prompt(rows=2)
    longer, more = text_prompt(30, seed=1)
    with apply_inner(qwen, 2) as inner, inner.prompt(visual):
        once = qwen.generate(ids, **GREEDY, **FULL)
        with inner.prompt(more):
            qwen.generate(longer, **GREEDY)
        twice = qwen.generate(ids, **GREEDY, **FULL)
        assert inner._local.run is None  # nothing of a pass outlives it
    assert all(torch.equal(a, b) for a, b in zip(once.logits, twice.logits, strict=True))
    assert lengths(twice.past_key_values) == [29, 29, 22, 22]


def test_without_a_cache(qwen: Model) -> None:
    """Prompt and answer read once more from the start: the prompt's last token still decides, not the answer's."""
    ids, visual = text_prompt()
    with apply_inner(qwen, 2) as inner, inner.prompt(visual):
        out = qwen.generate(ids, **GREEDY, **FULL)
        whole = qwen(out.sequences, use_cache=False).logits
    assert torch.allclose(whole[0, -7:-1], torch.cat(out.logits), atol=1e-4)


def test_a_prompt_is_announced_anew_for_every_step(qwen: Model) -> None:
    """As a generator does, which must not hold a block open while its caller runs."""
    ids, visual = text_prompt()
    prompt, cache = InnerPrompt.of(visual), DynamicCache()
    with apply_inner(qwen, 2) as inner:
        with inner.prompt(visual):
            want = qwen.generate(ids, **GREEDY)[0, 24:].tolist()
        with inner.prompt(prompt):
            first = qwen(ids, past_key_values=cache).logits
        with inner.prompt(prompt):
            assert step_by_step(qwen, cache, first, 5) == want


@pytest.mark.parametrize("count", [6, 30])
def test_several_tokens_after_the_prompt(qwen: Model, count: int) -> None:
    """Another turn of a conversation, read into the cache at once, is what it is token by token; it may be longer than
    the prompt."""
    ids, visual = text_prompt()
    turn = text_prompt(count, seed=7)[0]
    with apply_inner(qwen, 2) as inner, inner.prompt(visual):
        at_once, one_by_one = DynamicCache(), DynamicCache()
        for cache in (at_once, one_by_one):
            qwen(ids, past_key_values=cache)
        got = qwen(turn, past_key_values=at_once).logits
        want = torch.cat([qwen(turn[:, n : n + 1], past_key_values=one_by_one).logits for n in range(count)], 1)
    assert torch.allclose(got, want, atol=1e-4)


def test_two_threads_do_not_see_each_others_prompts(qwen: Model) -> None:
    ids, visual = text_prompt()
    want = qwen(ids).logits
    found = []
    with apply_inner(qwen, 2) as inner, inner.prompt(visual):
        thread = threading.Thread(target=lambda: found.append(qwen(ids).logits))
        thread.start()
        thread.join(HANG_SECONDS)
        assert not torch.equal(qwen(ids).logits[:, -1], want[:, -1])
    assert torch.equal(found[0], want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(qwen: Model, dtype: torch.dtype) -> None:
    half = copy.deepcopy(qwen).to(dtype)
    ids, visual = text_prompt()
    with apply_inner(half, 2) as inner, inner.prompt(visual):
        logits = half(ids).logits
    assert logits.dtype == dtype
    assert logits.shape[1] == 17
    assert bool(torch.isfinite(logits).all())


# --- masks


def held(kept: list[list[int]], length: int, real: list[list[bool]] | None = None) -> Held:
    return Held(length, torch.tensor(kept), None if real is None else torch.tensor(real))


def test_flash_attentions_masks_are_of_padding_alone() -> None:
    """That kernel is not on a CPU, its masks [B, columns] are."""
    inner = held(kept=[[0, 0, 2, 3], [0, 1, 2, 3]], length=4, real=[[False, True, True, True], [True] * 4])
    padding = torch.tensor([[0, 1, 1, 1, 1], [1, 1, 1, 1, 1]])
    assert later_mask(None, held([[1, 2]], 3), 1, 3, reads=False, flat=True) is None
    assert later_mask(padding, inner, 1, 5, reads=False, flat=True).tolist() == [[0, 0, 1, 1, 1], [1] * 5]  # type: ignore[union-attr]
    made = later_mask(None, inner, 1, 5, reads=False, flat=True)
    assert made is not None
    assert made.tolist() == [[False, True, True, True, True], [True] * 5]


def test_a_mask_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(UserError, match=r"cannot shorten an attention mask of type str: .* attn_implementation='sdpa'"):
        later_mask("block", held([[1, 2]], 3), 1, 3, reads=False)  # type: ignore[arg-type]


# --- giving back, and refusals


def test_it_is_undone(qwen: Model) -> None:
    ids, visual = text_prompt()
    want = qwen(ids).logits
    layers = [dict(vars(layer)) for layer in qwen.model.layers]
    applied = apply_inner(qwen.model, 2)
    assert isinstance(applied, AppliedInner)
    with applied.prompt(visual):
        assert qwen(ids).logits.shape[1] == 17
        applied.restore()
        applied.restore()
        assert torch.equal(qwen(ids).logits, want)
    assert [dict(vars(layer)) for layer in qwen.model.layers] == layers


def test_what_others_put_on_a_layer_is_still_there(qwen: Model) -> None:
    layer, calls = qwen.model.layers[3], []
    own = layer.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    layer.forward = hooked
    try:
        with apply_inner(qwen, 2) as inner, inner.prompt(text_prompt()[1]):
            qwen(text_prompt()[0])
        assert vars(layer)["forward"] is hooked
        assert calls == [1]
    finally:
        del layer.forward


def test_a_pass_that_failed_leaves_the_model_usable(qwen: Model) -> None:
    ids, visual = text_prompt()
    with apply_inner(qwen, 2) as inner:
        with inner.prompt(visual):
            want = qwen(ids).logits
        with inner.prompt(visual[:, :-1]), pytest.raises(RuntimeError):
            qwen(ids, attention_mask=torch.ones(1, 1, 3, 3))
        with inner.prompt(visual):
            assert torch.equal(qwen(ids).logits, want)


@pytest.mark.parametrize("layer", [0, 4, -1])
def test_a_layer_that_does_not_exist_is_refused(qwen: Model, model: Model, layer: int) -> None:
    message = f"inner layer {layer} does not exist: the language model has layers 0 to 3, .* before layers 1 to 3"
    with pytest.raises(UserError, match=message):
        apply_inner(qwen, layer)
    if layer == 4:
        before = dict(vars(model))
        with pytest.raises(UserError, match=message):
            apply_earlytom(model, settings(layer))
        assert dict(vars(model)) == before
    apply_inner(qwen, 3).restore()  # negative control


@pytest.mark.parametrize("ratio", [-0.1, 1.0, float("nan")])
def test_a_ratio_that_makes_no_sense_is_refused(qwen: Model, ratio: float) -> None:
    with pytest.raises(UserError, match=r"the inner ratio must be in \[0, 1\), got"):
        apply_inner(qwen, 2, ratio)


def test_applying_twice_is_refused(qwen: Model) -> None:
    with apply_inner(qwen, 2), pytest.raises(UserError, match=r"already applied: call restore\(\)"):
        apply_inner(qwen, 1)


def test_other_models_are_refused() -> None:
    sizes: Any = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 2}
    heads: Any = {"num_attention_heads": 1, "num_key_value_heads": 1}
    with pytest.raises(UserError, match=r"LlamaForCausalLM \(llama\) is not supported: inner merging takes a Qwen2"):
        apply_inner(LlamaForCausalLM(LlamaConfig(**sizes, **heads)), 1)
    with pytest.raises(UserError, match=r"Linear \(Linear\) is not supported"):
        apply_inner(torch.nn.Linear(2, 2), 1)
    windows = Qwen2Config(**sizes, **heads, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(UserError, match="has sliding windows from layer 1 on: set inner_layer to None"):
        apply_inner(Qwen2ForCausalLM(windows), 1)


@pytest.mark.parametrize("visual", [torch.ones(3, dtype=torch.bool), torch.ones(1, 3)])
def test_visual_tokens_are_named_by_a_mask(qwen: Model, visual: Tensor) -> None:
    with (
        apply_inner(qwen, 2) as inner,
        pytest.raises(UserError, match=r"visual must be bool \[B, T\], got torch"),
        inner.prompt(visual),
    ):
        pass


def test_a_prompt_in_pieces_is_refused(qwen: Model) -> None:
    ids, visual = text_prompt()
    with apply_inner(qwen, 2) as inner, inner.prompt(visual):
        with pytest.raises(
            UserError, match=r"prompt of 24 tokens must be read in one pass .*, got 10 tokens: leave out p"
        ):
            qwen.generate(ids, **GREEDY, prefill_chunk_size=10)
        cache = DynamicCache()
        qwen(ids, past_key_values=cache)
    with (
        apply_inner(qwen, 2) as inner,
        inner.prompt(visual),
        pytest.raises(UserError, match="into an empty cache, got 24 tokens"),
    ):
        qwen(ids, past_key_values=cache)


def test_a_batch_of_another_size_is_refused(qwen: Model) -> None:
    ids, visual = text_prompt(rows=2)
    with (
        apply_inner(qwen, 2) as inner,
        inner.prompt(visual),
        pytest.raises(UserError, match="2 prompts were announced, and a batch of 3 came"),
    ):
        qwen(torch.cat([ids, ids[:1]]))
