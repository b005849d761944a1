"""The incremental detokenizer against decoding everything at once."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from runtime.text.stream import StopStrings, TextStream

SENTENCES = ["a cat sits on the mat", "the cat and the dog", "naïve café, 日本語", "日本 🙂🙃", "end."]


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE as Qwen2 has it: any byte sequence can come out."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def metaspace() -> PreTrainedTokenizerFast:
    """Word pieces that carry their space in front, the first of which loses it when decoded (as Llama's)."""
    vocabulary = {"<unk>": 0, "▁the": 1, "▁cat": 2, "s": 3, "▁": 4, "<0xE6>": 5, "<0x97>": 6, "<0xA5>": 7, "</s>": 8}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


TOKENIZER = byte_level()


def streamed(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


def whole(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", [*SENTENCES, "🙂" * 5, "жж🙈", "", "é\ufffdé"])
def test_deltas_join_to_the_text(text: str) -> None:
    assert "".join(streamed(TOKENIZER, TOKENIZER.encode(text))) == text


def test_text_comes_as_early_as_it_is_certain() -> None:
    deltas = streamed(TOKENIZER, TOKENIZER.encode("the cat ж"))
    assert sum(delta != "" for delta in deltas) > 2
    assert not any("\ufffd" in delta for delta in deltas)


def test_decoding_token_by_token_would_be_wrong() -> None:
    """Negative control: characters that the tokenizer has not learnt are split over tokens."""
    ids = TOKENIZER.encode("ж")
    assert "".join(whole(TOKENIZER, [token]) for token in ids) != "ж"


@given(st.lists(st.integers(0, len(TOKENIZER) - 1), max_size=40))
@settings(max_examples=150, deadline=None)
def test_any_ids_give_the_text_of_decoding_all(ids: list[int]) -> None:
    """Also byte salad, as a model with random weights writes it."""
    assert "".join(streamed(TOKENIZER, ids)) == whole(TOKENIZER, ids)


def test_a_cut_off_character_is_shown_at_the_end() -> None:
    ids = TOKENIZER.encode("abж")[:-1]
    assert "".join(streamed(TOKENIZER, ids)) == whole(TOKENIZER, ids) == "ab\ufffd"


def test_special_tokens_have_no_text() -> None:
    ids = [TOKENIZER.eos_token_id, *TOKENIZER.encode("the"), TOKENIZER.eos_token_id, *TOKENIZER.encode(" cat")]
    assert "".join(streamed(TOKENIZER, ids)) == "the cat"


def test_spaces_that_belong_to_the_token_survive() -> None:
    ids = [1, 2, 3, 8, 1, 5, 6, 7, 2]
    assert "".join(streamed(metaspace(), ids)) == whole(metaspace(), ids) == "the cats the日 cat"


def test_finish_empties_the_stream() -> None:
    stream = TextStream(TOKENIZER)
    stream.push(TOKENIZER.encode("ж")[0])
    assert stream.finish() == "\ufffd"
    assert stream.finish() == ""
    assert stream.push(TOKENIZER.encode("a")[0]) == "a"


def test_cost_of_a_token_does_not_grow_with_the_answer() -> None:
    lengths = []

    class Counting:
        def decode(self, ids: list[int], **kwargs: bool) -> str:
            lengths.append(len(ids))
            return TOKENIZER.decode(ids, **kwargs)

    stream = TextStream(Counting())
    for token in TOKENIZER.encode("the cat sits on the mat " * 20):
        stream.push(token)
    assert max(lengths) <= 2


# Stop strings


def stopped(pieces: Sequence[str], stops: Sequence[str]) -> tuple[list[str], bool]:
    ends = StopStrings(stops)
    return [*(ends.push(piece) for piece in pieces), ends.finish()], ends.found


@pytest.mark.parametrize(
    ("text", "stops", "wanted"),
    [
        ("top left", [" left"], "top"),
        ("top left", ["right"], "top left"),
        ("top left", [], "top left"),
        ("aab", ["ab"], "a"),
        ("abcd", ["bcd", "c"], "ab"),  # "c" is complete first
        ("abcd", ["bc", "abc"], ""),  # both at once: the longer
        ("one.two.", ["."], "one"),
        ("ab", ["abc"], "ab"),
        ("abc", ["abc"], ""),
        ("aaab", ["aab"], "a"),
    ],
)
def test_a_stop_string_ends_the_text_before_it(text: str, stops: list[str], wanted: str) -> None:
    for pieces in ([text], list(text), [text[:3], text[3:]]):
        found, ended = stopped(pieces, stops)
        assert "".join(found) == wanted
        assert ended == (wanted != text)


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    assert stopped(["top ", "le", "ad", " left", "x"], [" left"]) == (["top", "", " lead", "", "", ""], True)
    assert stopped(["top ", "lef"], [" left"]) == (["top", "", " lef"], False)


PIECES = st.lists(st.text("ab.", max_size=4), max_size=12)


@given(PIECES, st.lists(st.text("ab.", min_size=1, max_size=4), max_size=4))
def test_where_a_text_is_cut_does_not_matter(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    found, ended = stopped(pieces, stops)
    ends = [(at + len(stop), at) for stop in stops for at in range(len(text)) if text.startswith(stop, at)]
    assert "".join(found) == (text[: min(ends)[1]] if ends else text)
    assert ended == bool(ends)
