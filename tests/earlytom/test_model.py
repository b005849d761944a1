"""EarlyTom on a whole LLaVA-OneVision: generate and forward with compressed tokens; the model given back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from earlytom import EarlyTomConfig, UserError, apply_earlytom, encode_video
from tests.earlytom.tiny import IMAGE_TOKEN, VIDEO_TOKEN, VOCABULARY, made_video, tiny_llava, video_prompt

Model = Any  # a LlavaOnevisionForConditionalGeneration, whose generate takes whatever
FRAMES = 8
OFF = EarlyTomConfig(retention_ratio=1.0, merge_layers=())
ON = EarlyTomConfig(retention_ratio=0.25, merge_layers=(1, 2), tau=0.3)
GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
FULL: dict[str, Any] = {"return_dict_in_generate": True, "output_logits": True}


@pytest.fixture(scope="module")
def model() -> Model:
    return tiny_llava()


@pytest.fixture(autouse=True)
def _left_as_it_was(request: pytest.FixtureRequest) -> Iterator[None]:
    """Whatever a test does to the shared model, it must be undone."""
    shared = request.getfixturevalue("model") if "model" in request.fixturenames else None
    yield
    if shared is not None:
        assert not {"generate", "_earlytom"} & set(vars(shared))
        assert not {"forward", "get_video_features"} & set(vars(shared.model))


def inputs(kind: str = "drift", *, seed: int = 0, frames: int = FRAMES) -> dict[str, Tensor]:
    """One prompt with one video."""
    ids = video_prompt(frames, seed=seed)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values_videos": made_video(kind, frames, seed=seed)[None],
    }


def batch(*rows: dict[str, Tensor]) -> dict[str, Tensor]:
    """Several prompts, shorter ones padded on the left as a tokenizer does."""
    length = max(row["input_ids"].shape[1] for row in rows)
    padded = []
    for row in rows:
        missing = length - row["input_ids"].shape[1]
        pads = torch.zeros(1, missing, dtype=torch.int64)
        padded.append(
            {
                "input_ids": torch.cat([pads, row["input_ids"]], 1),
                "attention_mask": torch.cat([pads, row["attention_mask"]], 1),
                "pixel_values_videos": row["pixel_values_videos"],
            }
        )
    return {name: torch.cat([row[name] for row in padded]) for name in padded[0]}


@torch.no_grad()
def embeds_by_hand(model: Model, row: dict[str, Tensor], config: EarlyTomConfig) -> Tensor:
    """[1, L', E]: text, compressed tokens and newline of one video, text; put together without apply_earlytom."""
    inner = model.model
    tokens = encode_video(inner.vision_tower, inner.multi_modal_projector, row["pixel_values_videos"][0], config).tokens
    ids = row["input_ids"][0]
    place = (ids == VIDEO_TOKEN).nonzero().flatten()
    text = model.get_input_embeddings()(ids)
    parts = [text[: place[0]], tokens, inner.image_newline[None], text[place[-1] + 1 :]]
    return torch.cat(parts)[None]


def new_ids(out: Tensor, row: dict[str, Tensor]) -> Tensor:
    """What was generated, once it is certain that the whole prompt is in front of it."""
    prompt = row["input_ids"]
    assert torch.equal(out[:, : prompt.shape[1]], prompt.repeat_interleave(len(out) // len(prompt), 0))
    return out[:, prompt.shape[1] :]


# --- off


@pytest.mark.parametrize("frames", [1, 8])
def test_off_is_the_untouched_model_bit_for_bit(model: Model, frames: int) -> None:
    row = inputs(frames=frames)
    want = model.generate(**row, **GREEDY, **FULL)
    with apply_earlytom(model, OFF):
        got = model.generate(**row, **GREEDY, **FULL)
        logits = model(**row).logits
        features = model.get_video_features(row["pixel_values_videos"]).pooler_output
    assert torch.equal(got.sequences, want.sequences)
    assert len(got.logits) == len(want.logits) == 6
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
    assert torch.equal(logits, model(**row).logits)
    assert torch.equal(features, model.get_video_features(row["pixel_values_videos"]).pooler_output)


def test_off_on_a_batch_generates_the_same(model: Model) -> None:
    rows = batch(inputs("drift"), inputs("noise", seed=1))
    want = model.generate(**rows, **GREEDY, **FULL)
    with apply_earlytom(model, OFF):
        got = model.generate(**rows, **GREEDY, **FULL)
    assert torch.equal(got.sequences, want.sequences)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got.logits, want.logits, strict=True))


# --- on


@pytest.mark.parametrize("schedule", ["adaptive", "budget"])
@pytest.mark.parametrize("options", [GREEDY, GREEDY | {"num_beams": 3}], ids=["greedy", "beams"])
def test_generate_equals_generation_from_embeddings_by_hand(
    model: Model, schedule: str, options: dict[str, Any]
) -> None:
    row, config = inputs(), ON.replace(schedule=schedule)
    embeds = embeds_by_hand(model, row, config)
    want = model.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **options, **FULL)
    with apply_earlytom(model, config):
        got = model.generate(**row, **options, **FULL)
    assert torch.equal(new_ids(got.sequences, row), want.sequences)
    assert all(torch.equal(a, b) for a, b in zip(got.logits, want.logits, strict=True))
    assert embeds.shape[1] < row["input_ids"].shape[1]


def test_ways_to_call_generate(model: Model) -> None:
    row = inputs()
    pixels = {"pixel_values_videos": row["pixel_values_videos"]}
    with apply_earlytom(model, ON) as applied:
        want = model.generate(**row, **GREEDY)
        assert isinstance(want, Tensor)
        assert applied.model is model
        assert torch.equal(model.generate(row["input_ids"], **pixels, **GREEDY), want)
        assert torch.equal(model.generate(inputs=row["input_ids"], **pixels, **GREEDY), want)
        assert torch.equal(model.generate(row["input_ids"], GenerationConfig(**GREEDY), **pixels), want)
        assert torch.equal(model.generate(**row, generation_config=GenerationConfig(**GREEDY)), want)
        assert torch.equal(model.generate(**row, **GREEDY, use_cache=False), want)
        with pytest.raises(UserError, match="generate needs input_ids beside pixel_values_videos"):
            model.generate(**pixels, **GREEDY)


def test_text_alone_is_left_alone(model: Model) -> None:
    ids = torch.arange(9)[None]
    want = model.generate(input_ids=ids, **GREEDY)
    with apply_earlytom(model, ON):
        assert torch.equal(model.generate(input_ids=ids, **GREEDY), want)
        assert torch.equal(model(input_ids=ids).logits, model(ids).logits)


def test_several_sequences_for_a_prompt(model: Model) -> None:
    rows = batch(inputs("drift"), inputs("still", seed=1))
    options = GREEDY | {"num_beams": 4, "num_return_sequences": 2}
    with apply_earlytom(model, ON):
        out = model.generate(**rows, **options)
        alone = model.generate(**{name: value[1:] for name, value in rows.items()}, **options)
    assert out.shape == (4, rows["input_ids"].shape[1] + 6)
    assert torch.equal(new_ids(out, rows)[2:], alone[:, rows["input_ids"].shape[1] :])
    assert not torch.equal(out[0], out[1])


@pytest.mark.parametrize("schedule", ["adaptive", "budget"])
def test_a_batch_equals_each_alone(model: Model, schedule: str) -> None:
    """In the adaptive schedule the videos keep different numbers of tokens, so the shorter prompt is padded."""
    one, two = inputs("still"), inputs("noise", seed=1)
    two["input_ids"], two["attention_mask"] = two["input_ids"][:, 2:], two["attention_mask"][:, 2:]  # shorter text
    rows, config = batch(one, two), ON.replace(schedule=schedule)
    with apply_earlytom(model, config) as applied:
        lengths = {len(tokens) for tokens in applied.features(rows["pixel_values_videos"])}
        assert len(lengths) == (2 if schedule == "adaptive" else 1)
        out = model.generate(**rows, **GREEDY, **FULL)
        for n, row in enumerate((one, two)):
            alone = model.generate(**row, **GREEDY, **FULL)
            assert torch.equal(new_ids(out.sequences, rows)[n], new_ids(alone.sequences, row)[0])
            for a, b in zip(out.logits, alone.logits, strict=True):
                assert torch.allclose(a[n], b[0], atol=1e-4)


def test_the_shortened_prompt_is_padded_on_the_left(model: Model) -> None:
    rows = batch(inputs("still"), inputs("noise", seed=1))
    with apply_earlytom(model, ON) as applied:
        ids, mask, embeds = applied.shorten(*rows.values())
        counts = [len(tokens) for tokens in applied.features(rows["pixel_values_videos"])]
    assert counts[0] != counts[1]
    full = (rows["input_ids"] == VIDEO_TOKEN).sum(1)
    assert mask.sum(1).tolist() == [
        len(p) - int(n) + c for p, n, c in zip(rows["input_ids"], full, counts, strict=True)
    ]
    assert bool((mask.diff(dim=1) >= 0).all())  # zeros, then ones
    assert bool((embeds[mask == 0] == 0).all())
    for row, kept, given, count in zip(ids, mask.bool(), rows["input_ids"], counts, strict=True):
        assert int((row[kept] == VIDEO_TOKEN).sum()) == count
        assert torch.equal(row[kept][row[kept] != VIDEO_TOKEN], given[given != VIDEO_TOKEN])


def test_two_videos_in_one_prompt(model: Model) -> None:
    one, two = inputs("still"), inputs("noise", seed=1)
    ids = torch.cat([one["input_ids"], two["input_ids"]], 1)
    pixels = torch.cat([one["pixel_values_videos"], two["pixel_values_videos"]])
    embeds = torch.cat([embeds_by_hand(model, one, ON), embeds_by_hand(model, two, ON)], 1)
    want = model.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **GREEDY)
    with apply_earlytom(model, ON):
        out = model.generate(input_ids=ids, pixel_values_videos=pixels, **GREEDY)
    assert torch.equal(out[:, ids.shape[1] :], want)


def test_an_image_beside_the_video(model: Model) -> None:
    """Images go the model's own way."""
    row = inputs()
    extra = {
        "pixel_values": made_video("noise", 2, seed=5)[:, None],  # two images of one view each
        "image_sizes": torch.tensor([[20, 20], [20, 20]]),
        "batch_num_images": torch.tensor([2]),
    }
    features = model.model.get_image_features(**extra, return_dict=True).pooler_output
    images = torch.full((1, sum(map(len, features))), IMAGE_TOKEN)
    row["input_ids"] = torch.cat([images, row["input_ids"]], 1)
    row["attention_mask"] = torch.ones_like(row["input_ids"])
    want = model.generate(**row, **extra, **GREEDY, **FULL)
    with apply_earlytom(model, OFF):
        got = model.generate(**row, **extra, **GREEDY, **FULL)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.allclose(got.logits[0], want.logits[0], atol=1e-5)
    with apply_earlytom(model, ON):
        compressed = model.generate(**row, **extra, **GREEDY, **FULL)
    assert torch.isfinite(compressed.logits[0]).all()
    assert not torch.equal(compressed.logits[0], want.logits[0])


def test_sampling_is_reproducible(model: Model) -> None:
    row = inputs()
    options: dict[str, Any] = {"do_sample": True, "max_new_tokens": 12, "temperature": 2.0}
    embeds = embeds_by_hand(model, row, ON)
    torch.manual_seed(3)
    want = model.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2]), **options)
    with apply_earlytom(model, ON):
        drawn = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            drawn.append(new_ids(model.generate(**row, **options), row))
    assert torch.equal(drawn[0], want)
    assert torch.equal(drawn[1], want)
    assert not torch.equal(drawn[2], want)


@pytest.mark.parametrize("config", [OFF, ON], ids=["off", "on"])
@pytest.mark.parametrize("given", ["keyword", "object", "positional", "model"])
def test_lengths_count_the_prompt_that_was_passed_in(
    model: Model, config: EarlyTomConfig, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = inputs()
    length = row["input_ids"].shape[1] + 5
    limits: dict[str, Any] = {"max_length": length, "min_length": length, "do_sample": False}
    with apply_earlytom(model, config):
        if given == "keyword":
            out = model.generate(**row, **limits, eos_token_id=0)
        elif given == "object":
            out = model.generate(**row, generation_config=GenerationConfig(**limits))
        elif given == "positional":
            ids = row.pop("input_ids")
            out = model.generate(ids, GenerationConfig(**limits), **row)
        else:
            monkeypatch.setattr(model.generation_config, "max_length", length)
            out = model.generate(**row, do_sample=False)
    assert out.shape[1] == length


def test_a_minimum_length_holds_back_the_end(model: Model) -> None:
    row = inputs()
    length = row["input_ids"].shape[1]
    with apply_earlytom(model, ON):
        first = int(model.generate(**row, max_new_tokens=1, do_sample=False)[0, -1])
        ended = model.generate(**row, max_new_tokens=8, do_sample=False, eos_token_id=first)
        held = model.generate(**row, max_length=length + 8, min_length=length + 4, do_sample=False, eos_token_id=first)
    assert ended.shape[1] == length + 1
    assert held.shape[1] >= length + 4
    assert first not in held[0, length : length + 3]


def test_static_cache(model: Model) -> None:
    row = inputs()
    with apply_earlytom(model, ON):
        want = model.generate(**row, **GREEDY)
        got = model.generate(**row, **GREEDY, cache_implementation="static", disable_compile=True)
    assert torch.equal(got, want)


# --- forward


@pytest.mark.parametrize("mask", [True, False])
def test_forward_equals_forward_from_embeddings_by_hand(model: Model, mask: bool) -> None:
    row = inputs()
    embeds = embeds_by_hand(model, row, ON)
    if not mask:
        del row["attention_mask"]
    want = model(inputs_embeds=embeds).logits
    with apply_earlytom(model, ON):
        out = model(**row)
        inner = model.model(**row).last_hidden_state
    assert torch.allclose(out.logits, want, atol=1e-5)
    assert torch.allclose(model.lm_head(inner), want, atol=1e-5)
    assert out.logits.shape == (1, embeds.shape[1], VOCABULARY)


def test_forward_with_positions_of_the_full_prompt_is_refused(model: Model) -> None:
    row = inputs()
    positions = torch.arange(row["input_ids"].shape[1])[None]
    with apply_earlytom(model, ON), pytest.raises(UserError, match="position_ids count the full prompt"):
        model(**row, position_ids=positions)


def test_video_features_are_the_compressed_tokens(model: Model) -> None:
    row = inputs()
    inner = model.model
    want = encode_video(inner.vision_tower, inner.multi_modal_projector, row["pixel_values_videos"][0], ON).tokens
    with apply_earlytom(model, ON):
        one = model.get_video_features(row["pixel_values_videos"]).pooler_output
        uneven = torch.cat([row["pixel_values_videos"], made_video("noise", FRAMES, seed=1)[None]])
        two = model.get_video_features(uneven).pooler_output
    assert one.shape == (1, len(want) + 1, 32)
    assert torch.equal(one[0, :-1], want)
    assert torch.equal(one[0, -1], inner.image_newline)
    assert two.shape[0] == 1  # different lengths: one row of all of them
    assert torch.equal(two[0, : len(want) + 1], one[0])


# --- with merging inside the language model (what it computes is tested with `earlytom.inner`)


def test_inner_merging_goes_with_it(model: Model) -> None:
    """Tokens are left out before the language model and inside it; a model that was given back is the old one."""
    row, config = inputs(), ON.replace(inner_layer=1)
    with apply_earlytom(model, ON):
        want = model.generate(**row, **GREEDY, **FULL)
        whole = model(**row).logits
    with apply_earlytom(model, config) as applied:
        got = model.generate(**row, **GREEDY, **FULL)
        logits = model(**row).logits
        visual = len(applied.features(row["pixel_values_videos"])[0])
        cache = got.past_key_values
    assert not torch.allclose(got.logits[0], want.logits[0], atol=1e-3)
    assert torch.allclose(logits[:, -1], got.logits[0], atol=1e-5)
    assert whole.shape[1] - logits.shape[1] == visual - round(visual / 2)
    assert [cache.get_seq_length(layer) for layer in (0, 1)] == [whole.shape[1] + 5, logits.shape[1] + 5]
    assert not any("forward" in vars(layer) for layer in model.model.language_model.layers)
    with apply_earlytom(model, ON):
        again = model.generate(**row, **GREEDY, **FULL)
    assert all(torch.equal(a, b) for a, b in zip(again.logits, want.logits, strict=True))


# --- giving back


def test_the_context_manager_restores(model: Model) -> None:
    row = inputs()
    want = model.generate(**row, **GREEDY)
    before = (dict(vars(model)), dict(vars(model.model)))
    with apply_earlytom(model, ON):
        assert "generate" in vars(model)
    assert (dict(vars(model)), dict(vars(model.model))) == before
    assert torch.equal(model.generate(**row, **GREEDY), want)


def test_the_context_manager_restores_after_an_exception(model: Model) -> None:
    before = (dict(vars(model)), dict(vars(model.model)))

    def fail() -> None:
        with apply_earlytom(model, ON):
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (dict(vars(model)), dict(vars(model.model))) == before


def test_a_call_that_failed_leaves_the_model_usable(model: Model) -> None:
    row = inputs()
    with apply_earlytom(model, ON):
        want = model.generate(**row, **GREEDY)
        with pytest.raises(UserError):
            model.generate(**(row | {"pixel_values_videos": row["pixel_values_videos"][:, :4]}), **GREEDY)
        assert torch.equal(model.generate(**row, **GREEDY), want)


def test_as_a_call_and_restored_twice(model: Model) -> None:
    first = apply_earlytom(model, ON)
    first.restore()
    second = apply_earlytom(model, OFF)
    first.restore()  # undone long ago: must not undo the second
    assert "generate" in vars(model)
    second.restore()
    second.restore()


def test_what_others_put_on_the_model_is_still_there(model: Model) -> None:
    """Libraries that spread a model over devices replace `forward` on the instance too."""
    inner: Any = model.model
    calls = []
    own = inner.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return own(*args, **kwargs)

    inner.forward = hooked
    try:
        with apply_earlytom(model, ON):
            model(**inputs())
        assert vars(inner)["forward"] is hooked
        assert calls == [1]
    finally:
        del inner.forward


# --- refusals


def test_applying_twice_is_refused(model: Model) -> None:
    with apply_earlytom(model, ON):
        with pytest.raises(UserError, match=r"already applied to this model: call restore\(\)"):
            apply_earlytom(model, OFF)
        assert "generate" in vars(model)  # the first one still works
        model.generate(**inputs(), **GREEDY)
    with apply_earlytom(model, ON):  # and after restoring it may be applied again
        pass


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 2}, {"assistant_model": "itself"}])
def test_assisted_decoding_is_refused(model: Model, options: dict[str, Any]) -> None:
    if "assistant_model" in options:
        options = {"assistant_model": model}
    with (
        apply_earlytom(model, ON),
        pytest.raises(UserError, match=f"{next(iter(options))} does not work with compressed"),
    ):
        model.generate(**inputs(), **GREEDY, **options)


@pytest.mark.parametrize("change", [-1, 1])
def test_a_wrong_number_of_placeholders_is_refused(model: Model, change: int) -> None:
    row = inputs()
    ids = row["input_ids"]
    ids = ids[:, 1:] if change < 0 else torch.cat([torch.full((1, 1), VIDEO_TOKEN), ids], 1)
    if change < 0:
        ids = torch.cat([ids[:, :3], ids[:, 4:]], 1)  # one placeholder less
    row |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    message = f"the prompt has {73 + change} video placeholders, but 1 .* of 8 frames take 73 each: .* own processor"
    with apply_earlytom(model, ON):
        with pytest.raises(UserError, match=message):
            model.generate(**row, **GREEDY)
        with pytest.raises(UserError, match=message):
            model(**row)


def test_placeholders_that_only_add_up_are_refused(model: Model) -> None:
    """One too few in the first prompt, one too many in the second: the sum is right, the prompts are not."""
    rows = batch(inputs("drift"), inputs("noise", seed=1))
    place = int((rows["input_ids"][0] == VIDEO_TOKEN).nonzero()[0])
    rows["input_ids"][0, place], rows["input_ids"][1, place - 1] = 5, VIDEO_TOKEN
    with apply_earlytom(model, ON), pytest.raises(UserError, match="the prompt has 72, 74 video placeholders"):
        model.generate(**rows, **GREEDY)


def test_a_video_without_the_batch_dimension_is_refused(model: Model) -> None:
    row = inputs()
    row["pixel_values_videos"] = row["pixel_values_videos"][0]
    with apply_earlytom(model, ON), pytest.raises(UserError, match=r"\[videos, frames, 3, height, width\], got \[8, 3"):
        model.generate(**row, **GREEDY)


def test_another_family_is_refused(model: Model) -> None:
    text: Any = {"vocab_size": 9, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    qwen = Qwen2ForCausalLM(Qwen2Config(**text, num_attention_heads=1, num_key_value_heads=1))
    with pytest.raises(UserError, match=r"Qwen2ForCausalLM \(qwen2\) is not supported: apply_earlytom takes Llava"):
        apply_earlytom(qwen, ON)
    with pytest.raises(UserError, match="Linear"):
        apply_earlytom(torch.nn.Linear(2, 2), ON)
    with pytest.raises(UserError, match="LlavaOnevisionModel"):  # the part without a head cannot generate
        apply_earlytom(model.model, ON)


def test_a_merge_layer_that_the_tower_lacks_is_refused(model: Model) -> None:
    with pytest.raises(UserError, match="merge layer 4 does not exist: the vision tower has layers 0 to 3"):
        apply_earlytom(model, ON.replace(merge_layers=(1, 4)))


def test_another_feature_layer_is_followed_bit_for_bit() -> None:
    other = tiny_llava()
    other.config.vision_feature_layer = -2
    row = inputs()
    want = other.generate(**row, **GREEDY, **FULL)
    with apply_earlytom(other, OFF):
        got = other.generate(**row, **GREEDY, **FULL)
    assert torch.equal(got.logits[0], want.logits[0])
    other.config.vision_feature_layer = -1
    assert not torch.equal(other.generate(**row, **GREEDY, **FULL).logits[0], want.logits[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    half = tiny_llava().to(dtype)
    row = inputs()  # pixels in fp32, as a processor gives them
    want = half.generate(**row, **GREEDY, **FULL)
    with apply_earlytom(half, OFF):
        got = half.generate(**row, **GREEDY, **FULL)
    assert torch.equal(got.sequences, want.sequences)
    assert torch.equal(got.logits[0], want.logits[0])
    with apply_earlytom(half, ON.replace(schedule="budget")):
        out = half.generate(**row, **GREEDY, **FULL)
    assert bool(torch.isfinite(out.logits[0]).all())
