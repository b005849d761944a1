"""The generator of labelled clips: the same clips every time, splits that share nobody, answers that are right.

What a clip shows is worked out here once more, frame by frame from the scene and pixel by pixel from the frames, and
the answers from that.
"""

from __future__ import annotations

import copy
import hashlib
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
from numpy.random import Generator
from numpy.typing import NDArray

from earlytom.errors import UserError
from earlytom.micro.data import KINDS, SPLITS, Question, labelled_clip
from earlytom.micro.data.render import DOT, NOBODY, render
from earlytom.micro.data.scene import COLOURS, DIGITS, FRAMES, LARGE, SHAPES, SIDE, SMALL, Cast, Scene, draw_cast
from earlytom.micro.data.splits import draw, split_of

ALL = np.arange(FRAMES)
CLIPS = 16  # that are drawn
SCENES = 400  # that are not
TEST_SET = "f0bb2421ef607157a17819d192f057f3e8538da67387161de06e4175058fa5c3"


@cache
def scenes(split: str, count: int) -> list[tuple[Scene, tuple[Question, ...]]]:
    return [draw(split, index)[:2] for index in range(count)]


@cache
def drawn(index: int) -> Any:
    return labelled_clip("validation", index)


def again(scene: Scene, random: Generator) -> tuple[NDArray[np.uint8], NDArray[np.int8]]:
    """The scene drawn with the same luck as anything else that is drawn with this generator here."""
    return render(scene, copy.deepcopy(random), ALL)


def test_a_longer_clip_has_what_is_brief_as_brief() -> None:
    long, short = (
        [draw("validation", index, length=length)[0] for index in range(150)] for length in (3 * FRAMES, FRAMES)
    )
    assert {scene.frames for scene in long} == {3 * FRAMES}
    assert {scene.cut for scene in long if scene.cut is not None} <= set(range(18, 33))
    assert {scene.dot.last - scene.dot.first for scene in long if scene.dot} == {1, 2}
    shapes = [shape for scene in long for shape in scene.shapes]
    assert {shape.digit_last - shape.digit_first for shape in shapes if shape.digit is not None} == {2, 3, 4, 5}
    assert {len(shape.x) for shape in shapes} == {3 * FRAMES}
    assert all(0 <= shape.first <= shape.last - 3 * 5 and shape.last <= 3 * FRAMES for shape in shapes)
    late = [scene.dot.first for scene in long if scene.dot]
    assert min(late) < FRAMES
    assert max(late) > 2 * FRAMES
    moved = [
        [max(np.ptp(shape.x), np.ptp(shape.y)) for scene in some for shape in scene.shapes] for some in (long, short)
    ]
    assert abs(np.mean(moved[0]) - np.mean(moved[1])) < 4  # as far, three times slower


def test_all_frames_of_a_longer_clip_are_drawn() -> None:
    clip = labelled_clip("validation", 1, length=20)
    assert clip.frames.shape == (20, 3, SIDE, SIDE)
    with pytest.raises(UserError, match="has 16 frames or more, got 8"):
        labelled_clip("validation", 1, length=8)


def colour_at(scene: Scene, index: int, time: int) -> str:
    shape = scene.shapes[index]
    return shape.later_colour if scene.cut is not None and time >= scene.cut else shape.colour


def seen(scene: Scene) -> list[tuple[int, int, str, str]]:
    """(time, index, colour at that time, kind of shape) of everything that is there."""
    return [
        (time, index, colour_at(scene, index, time), shape.shape)
        for time in range(FRAMES)
        for index, shape in enumerate(scene.shapes)
        if shape.first <= time < shape.last
    ]


def the_only(values: Iterable[Any]) -> Any:
    """The value of a question that has one answer only."""
    (value,) = set(values)
    return value


class Watcher:
    """Answers a question by going through a scene frame by frame."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.seen = seen(scene)

    def answer(self, question: Question) -> str:
        words = question.text.rstrip("?").replace(",", "").split()
        return str(getattr(self, question.kind)(words))

    def path(self, colour: str) -> list[tuple[float, float]]:
        """Places of the object that has this colour, while it is seen."""
        at = [(time, index) for time, index, name, _ in self.seen if name == colour]
        shape = self.scene.shapes[the_only(index for _, index in at)]
        return [(float(shape.x[time]), float(shape.y[time])) for time, _ in at]

    def colour(self, words: list[str]) -> str:  # What color is the SHAPE
        return the_only(colour for _, _, colour, kind in self.seen if kind == words[4])

    def shape(self, words: list[str]) -> str:  # What shape is the COLOUR object
        return the_only(kind for _, _, colour, kind in self.seen if colour == words[4])

    def digit(self, words: list[str]) -> str:  # Which digit is on the SHAPE
        shapes = self.scene.shapes
        return the_only(
            shapes[index].digit
            for time, index, _, kind in self.seen
            if kind == words[5] and shapes[index].digit_first <= time < shapes[index].digit_last
        )

    def dot(self, words: list[str]) -> str:
        assert self.scene.dot is not None
        assert 0 <= self.scene.dot.first < self.scene.dot.last <= FRAMES
        return self.scene.dot.colour

    def exists(self, words: list[str]) -> str:  # Is there a COLOUR SHAPE
        return "yes" if any([colour, kind] == words[3:] for _, _, colour, kind in self.seen) else "no"

    def count(self, words: list[str]) -> str:
        return ["none", "one", "two", "three", "four"][len({(colour, kind) for _, _, colour, kind in self.seen})]

    def direction(self, words: list[str]) -> str:  # In which direction does the COLOUR object move
        path = self.path(words[5])
        dx, dy = path[-1][0] - path[0][0], path[-1][1] - path[0][1]
        assert min(abs(dx), abs(dy)) == 0
        assert max(abs(dx), abs(dy)) >= 20
        if dx:
            return "right" if dx > 0 else "left"
        return "down" if dy > 0 else "up"

    def order(self, words: list[str]) -> str:  # Which came first the COLOUR or the COLOUR object
        begin = {name: min(time for time, _, colour, _ in self.seen if colour == name) for name in (words[4], words[7])}
        assert abs(begin[words[4]] - begin[words[7]]) >= 3
        return min(begin, key=lambda name: begin[name])

    def where(self, words: list[str]) -> str:  # Where is the COLOUR object at the end
        x, y = self.path(words[3])[-1]
        assert (FRAMES - 1, words[3]) in {(time, colour) for time, _, colour, _ in self.seen}
        drift = [step * (FRAMES - 1) / 2 for step in self.scene.drift]
        x, y = x + drift[0] - SIDE / 2, y + drift[1] - SIDE / 2  # as drawn, from the middle
        assert min(abs(x), abs(y)) > 4
        return ("bottom " if y > 0 else "top ") + ("right" if x > 0 else "left")

    def after(self, words: list[str]) -> str:  # What color is the SHAPE after the cut
        assert self.scene.cut is not None
        return the_only(c for time, _, c, kind in self.seen if kind == words[4] and time >= self.scene.cut)

    def changed(self, words: list[str]) -> str:  # Did the SHAPE change after the cut
        cut = self.scene.cut
        assert cut is not None
        before = the_only(c for time, _, c, kind in self.seen if kind == words[2] and time < cut)
        return "no" if before == self.after(["", "", "", "", words[2]]) else "yes"


# The same clips every time


def test_a_clip_follows_from_split_seed_and_index() -> None:
    one, other = labelled_clip("train", 3, seed=5), labelled_clip("train", 3, seed=5)
    assert one.frames.tobytes() == other.frames.tobytes()
    assert one.owner.tobytes() == other.owner.tobytes()
    assert one.questions == other.questions
    strangers = [labelled_clip("train", 4, seed=5), labelled_clip("train", 3, seed=6), labelled_clip("test", 3, seed=5)]
    assert len({clip.frames.tobytes() for clip in (one, *strangers)}) == 4


def test_some_frames_of_a_clip_show_what_all_frames_of_it_show_then() -> None:
    times = np.array([1, 2, 9, 15])
    for index in range(3):
        clip, part = drawn(index), labelled_clip("validation", index, times=times)
        assert part.questions == clip.questions
        assert repr(part.scene) == repr(clip.scene)
        np.testing.assert_array_equal(part.owner, clip.owner[times])
        away = np.abs(part.frames.astype(int) - clip.frames[times])
        assert away.mean() < 12  # another noise of the same kind
        assert np.abs(part.frames.astype(int) - drawn(index + 1).frames[times]).mean() > 12


def test_the_test_set_is_the_one_that_accuracy_was_measured_on() -> None:
    """Figures of different test sets cannot be compared: whoever changes the clips has to measure again."""
    text = "\n".join(f"{one.text} {one.answer}" for _, asked in scenes("test", SCENES) for one in asked)
    assert hashlib.sha256(text.encode()).hexdigest() == TEST_SET


def test_frames_are_bytes_of_the_size_of_the_bundled_model() -> None:
    clip = drawn(0)
    assert (clip.frames.dtype, clip.frames.shape) == (np.uint8, (FRAMES, 3, SIDE, SIDE))
    assert (clip.owner.dtype, clip.owner.shape) == (np.int8, (FRAMES, SIDE, SIDE))
    assert clip.frames.flags.c_contiguous
    assert labelled_clip("test", 0, times=np.array([7])).frames.shape == (1, 3, SIDE, SIDE)


@pytest.mark.parametrize(
    ("split", "index", "named"), [("dev", 0, ("'dev'", *SPLITS)), ("", 0, tuple(SPLITS)), ("test", -1, ("-1",))]
)
def test_what_does_not_exist_is_refused_in_one_line(split: str, index: int, named: tuple[str, ...]) -> None:
    with pytest.raises(UserError) as error:
        labelled_clip(split, index)
    assert "\n" not in str(error.value)
    assert all(name in str(error.value) for name in named)


# Splits


def cast_of(scene: Scene) -> Cast:
    digits = [shape.digit for shape in scene.shapes if shape.digit is not None]
    assert len(digits) <= 1
    dot = None if scene.dot is None else scene.dot.colour
    colours, shapes = ([getattr(shape, what) for shape in scene.shapes] for what in ("colour", "shape"))
    return Cast(tuple(colours), tuple(shapes), dot, digits[0] if digits else None)


def test_no_cast_is_in_two_splits() -> None:
    keys = {}
    for split in SPLITS:
        casts = [cast_of(draw(split, index, seed=seed)[0]) for seed in (0, 1) for index in range(SCENES // 2)]
        assert {split_of(cast) for cast in casts} == {split}
        keys[split] = {cast.key() for cast in casts}
    assert len(set.union(*keys.values())) == sum(map(len, keys.values()))
    assert len(keys["train"]) > 0.75 * SCENES  # two seeds draw different clips


def test_the_order_of_a_cast_does_not_matter_and_everything_else_does() -> None:
    cast = Cast(("red", "blue"), ("ring", "cross"), "white", None)
    assert Cast(("blue", "red"), ("cross", "ring"), "white", None).key() == cast.key()
    others = [
        Cast(("blue", "red"), ("ring", "cross"), "white", None),
        Cast(("red", "blue"), ("ring", "ring"), "white", None),
        replace(cast, dot="green"),
        replace(cast, dot=None),
        replace(cast, digit=3),
    ]
    assert len({one.key() for one in (cast, *others)}) == 6


def test_the_splits_take_their_shares_of_all_casts() -> None:
    random = np.random.default_rng(0)
    found = Counter(split_of(draw_cast(random, lambda cast: True)) for _ in range(4000))
    for split, share in (("test", 1 / 16), ("validation", 1 / 16), ("train", 14 / 16)):
        assert abs(found[split] / 4000 - share) < margin(share, 4000)


# Questions


def test_there_are_at_least_eight_kinds_and_every_need() -> None:
    assert len(KINDS) >= 8
    assert {kind.needs for kind in KINDS.values()} == {"content", "detail", "time", "both"}
    asked = Counter(question.kind for _, some in scenes("train", SCENES) for question in some)
    assert set(asked) == set(KINDS)
    assert min(asked.values()) > SCENES / 5
    for _, some in scenes("train", SCENES):
        assert len({question.kind for question in some}) == len(some)
        assert all(1 <= len(question.answer.split()) <= 2 for question in some)


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_is_what_one_sees_frame_by_frame(split: str) -> None:
    checked = Counter[str]()
    for scene, asked in scenes(split, SCENES):
        watcher = Watcher(scene)
        for question in asked:
            assert watcher.answer(question) == question.answer, question
            checked[question.kind] += 1
    assert min(checked[kind] for kind in KINDS) > SCENES / 5


def mirrored(scene: Scene) -> Scene:
    turn = {"left": "right", "right": "left"}
    return replace(
        scene,
        shapes=tuple(
            replace(shape, x=SIDE - 1 - shape.x, direction=turn.get(shape.direction or "", shape.direction))
            for shape in scene.shapes
        ),
        drift=(-scene.drift[0], scene.drift[1]),
    )


def test_in_the_mirror_left_is_right_and_all_else_stays() -> None:
    """The check of the answers above is not blind to what it checks."""
    turned = 0
    for scene, asked in scenes("train", SCENES):
        watcher, generator = Watcher(mirrored(scene)), np.random.default_rng(0)
        for question in asked:
            swap = {"left": "right", "right": "left"} if question.kind in ("direction", "where") else {}
            expected = " ".join(swap.get(word, word) for word in question.answer.split())
            assert watcher.answer(question) == expected
            turned += expected != question.answer
        for kind in ("direction", "where"):
            found = KINDS[kind].ask(mirrored(scene), generator)
            assert found is None or watcher.answer(Question(kind, *found)) == found[1]
    assert turned > SCENES / 4


# Nothing can be guessed


def margin(share: float, count: int) -> float:
    """Four and a half standard deviations of a share of `count` draws."""
    return 4.5 * math.sqrt(share * (1 - share) / count)


def guessed(
    known: list[tuple[Scene, tuple[Question, ...]]],
    unknown: list[tuple[Scene, tuple[Question, ...]]],
    read: Callable[[Question], str],
) -> dict[str, tuple[float, int]]:
    """How often the usual answer to what is `read` of a question is right, and of how many, for each kind."""
    answers: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    for _, asked in known:
        for question in asked:
            for text in (read(question), ""):  # the usual answer of the kind, where the text was never seen
                answers[question.kind, text][question.answer] += 1
    right: dict[str, list[bool]] = defaultdict(list)
    for _, asked in unknown:
        for question in asked:
            best = answers.get((question.kind, read(question)), answers[question.kind, ""]).most_common(1)[0][0]
            right[question.kind].append(best == question.answer)
    return {kind: (float(np.mean(hits)), len(hits)) for kind, hits in right.items()}


def test_the_text_of_a_question_gives_no_better_guess_than_chance() -> None:
    known, unknown = scenes("train", 3000), scenes("validation", 2000)
    found = guessed(known, unknown, lambda question: question.text)
    for kind, (rate, count) in found.items():
        assert rate < KINDS[kind].chance + margin(KINDS[kind].chance, count), kind
    # A hint would not go unnoticed.
    hinted = guessed(known, unknown, lambda question: f"{question.text} It begins with {question.answer[0]}.")
    for kind, (rate, count) in hinted.items():
        assert rate > KINDS[kind].chance + margin(KINDS[kind].chance, count), kind


def test_every_answer_of_a_kind_is_as_likely_as_any_other() -> None:
    answers: dict[str, Counter[str]] = defaultdict(Counter)
    for _, asked in scenes("train", 3000):
        for question in asked:
            answers[question.kind][question.answer] += 1
    for kind, found in answers.items():
        total = found.total()
        share = 1 / len(COLOURS) if kind == "order" else KINDS[kind].chance
        assert len(found) == round(1 / share), kind
        for answer, count in found.items():
            assert abs(count / total - share) < margin(share, total), (kind, answer)
    assert {"yes", "no"} == set(answers["exists"]) == set(answers["changed"])


def test_neither_the_one_named_first_nor_the_one_named_last_came_first() -> None:
    first = [
        question.text.index(f" {question.answer} ") < question.text.index(" or ")
        for _, asked in scenes("train", 3000)
        for question in asked
        if question.kind == "order"
    ]
    assert abs(np.mean(first) - 0.5) < margin(0.5, len(first))


# What is drawn


def probe(scene: Scene, index: int, time: int) -> tuple[int, int]:
    """Row and column of a pixel that the shape covers: its centre, or on the rim of a ring."""
    shape = scene.shapes[index]
    x, y = (at[time] + step * (time - 7.5) for at, step in zip((shape.x, shape.y), scene.drift, strict=True))
    return round(y), round(x + (0.8 * shape.radius if shape.shape == "ring" else 0))


def test_every_shape_is_seen_where_the_scene_says_or_a_nearer_one_is() -> None:
    for number in range(CLIPS):
        scene, owner = drawn(number).scene, drawn(number).owner
        for time, index, _, _ in seen(scene):
            assert owner[time][probe(scene, index, time)] >= index
            assert (owner[time] == index).any()


def distance(scene: Scene, one: int, other: int, time: int) -> float:
    a, b = scene.shapes[one], scene.shapes[other]
    return math.hypot(a.x[time] - b.x[time], a.y[time] - b.y[time])


def meetings(scene: Scene) -> list[tuple[int, int, int]]:
    """(time, index of the farther, index of the nearer) of any two shapes that overlap."""
    there = [(time, index) for time, index, _, _ in seen(scene)]
    return [
        (time, one, other)
        for time, one in there
        for when, other in there
        if when == time
        and one < other
        and distance(scene, one, other, time) < 0.7 * (scene.shapes[one].radius + scene.shapes[other].radius)
    ]


def test_shapes_pass_behind_later_ones() -> None:
    behind = 0
    for number in range(SCENES):
        scene, _, random = draw("train", number)
        middles = [
            (time, one, other)
            for time, one, other in meetings(scene)
            if scene.shapes[one].shape != "ring"
            and scene.shapes[other].shape in ("circle", "square")
            and distance(scene, one, other, time) < 0.7 * scene.shapes[other].radius
        ]
        if middles:
            _, owner = again(scene, random)
            assert all(owner[time][probe(scene, one, time)] >= other for time, one, other in middles)
            behind += 1
    assert behind >= 2


def test_nobody_is_seen_before_or_after_its_time() -> None:
    for number in range(CLIPS):
        scene, owner = drawn(number).scene, drawn(number).owner
        for time in range(FRAMES):
            there = {index for when, index, _, _ in seen(scene) if when == time}
            dot = {DOT} if scene.dot is not None and scene.dot.first <= time < scene.dot.last else set()
            assert set(np.unique(owner[time]).tolist()) == there | dot | {NOBODY}


def nearest_colour(pixels: NDArray[Any]) -> str:
    """The named colour whose brighter or darker kind comes nearest to the pixels' mean; pixels: [N, 3]."""
    mean = pixels.mean(0)
    gains = np.linspace(0.78, 1.22, 45)[:, None]
    away = {name: np.abs(np.minimum(gains * rgb, 255) - mean).max(1).min() for name, rgb in COLOURS.items()}
    name = min(away, key=lambda name: away[name])
    assert away[name] < 15
    return name


def inside(owner: NDArray[np.int8], who: int) -> NDArray[np.bool_]:
    """[72, 72]: its pixels whose neighbours are its own as well."""
    mine = np.pad(owner == who, 1)
    return mine[1:-1, 1:-1] & mine[:-2, 1:-1] & mine[2:, 1:-1] & mine[1:-1, :-2] & mine[1:-1, 2:]


def test_everything_has_the_colour_that_it_is_called_by() -> None:
    checked = 0
    for number in range(CLIPS):
        clip = drawn(number)
        for time in range(FRAMES):
            frame = clip.frames[time].transpose(1, 2, 0)
            for index, shape in enumerate(clip.scene.shapes):
                own = inside(clip.owner[time], index)
                if own.sum() < 12 or shape.digit_first <= time < shape.digit_last:
                    continue
                assert nearest_colour(frame[own]) == colour_at(clip.scene, index, time)
                checked += 1
            own = inside(clip.owner[time], DOT)
            if own.any():
                assert nearest_colour(frame[own]) == clip.scene.dot.colour
    assert checked > CLIPS * FRAMES


def test_a_digit_is_written_in_its_frames_and_in_no_other() -> None:
    glyphs: dict[int, set[bytes]] = defaultdict(set)
    for number in range(60):
        scene, _, random = draw("train", number)
        wearer = next((shape for shape in scene.shapes if shape.digit is not None), None)
        if wearer is None:
            continue
        bare = replace(scene, shapes=tuple(replace(shape, digit=None) for shape in scene.shapes))
        (frames, owner), (plain, same) = again(scene, random), again(bare, random)
        np.testing.assert_array_equal(owner, same)
        written: Any = (np.abs(frames.astype(int) - plain) > 40).any(1)  # [F, 72, 72]
        times = np.flatnonzero(written.any((1, 2)))
        assert times.tolist() == list(range(wearer.digit_first, wearer.digit_last))
        assert 2 <= len(times) <= 5
        np.testing.assert_array_equal(np.delete(frames, times, 0), np.delete(plain, times, 0))
        for time in times:
            rows, columns = np.nonzero(written[time])
            box = written[time, rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
            assert box.shape[0] == 7
            assert box.shape[1] <= 5
            glyphs[int(wearer.digit or 0)].add(box.tobytes())
            index = [shape.digit for shape in scene.shapes].index(wearer.digit)
            assert set(owner[time][written[time]].tolist()) == {index}  # on the shape, and not hidden
    assert sorted(glyphs) == list(DIGITS)
    assert all(len(forms) == 1 for forms in glyphs.values())
    assert len(set.union(*glyphs.values())) == len(DIGITS)  # each digit looks different


def test_the_dot_is_there_in_its_frames_and_in_no_other() -> None:
    shown = 0
    for number in range(20):
        scene, _, random = draw("train", number)
        if scene.dot is None:
            continue
        (frames, owner), (plain, _) = again(scene, random), again(replace(scene, dot=None), random)
        times = np.flatnonzero((frames != plain).any((1, 2, 3)))
        assert times.tolist() == list(range(scene.dot.first, scene.dot.last))
        assert len(times) in (1, 2)
        assert ((owner == DOT).sum((1, 2))[times] >= 30).all()  # of the 38 pixels that it has: nobody hides it
        shown += 1
    assert shown > 5


def test_a_cut_shows_another_background_from_its_frame_on() -> None:
    cuts = 0
    for number in range(20):
        scene, _, random = draw("train", number)
        if scene.cut is None:
            continue
        (frames, owner), (plain, same) = again(scene, random), again(replace(scene, cut=None), random)
        np.testing.assert_array_equal(frames[: scene.cut], plain[: scene.cut])
        ground = (owner == NOBODY) & (same == NOBODY)
        away = np.abs(frames.astype(int) - plain).max(1)
        assert all(away[time][ground[time]].mean() > 8 for time in range(scene.cut, FRAMES))
        cuts += 1
    assert cuts > 4


def test_clips_have_all_that_makes_them_hard() -> None:
    found = [scene for scene, _ in scenes("train", SCENES)]
    shapes = [shape for scene in found for shape in scene.shapes]
    assert {shape.shape for shape in shapes} == set(SHAPES)
    assert {shape.radius for shape in shapes} == {SMALL, LARGE}
    assert {len(scene.shapes) for scene in found} == {1, 2, 3, 4}
    uncut = [shape for scene in found if scene.cut is None for shape in scene.shapes]
    for what in (
        [shape.first > 0 for shape in uncut],  # appear late
        [shape.last < FRAMES for shape in uncut],  # vanish early
        [shape.direction is None for shape in shapes],
        [scene.cut is not None for scene in found],
        [scene.dot is not None for scene in found],
        [max(map(abs, scene.drift)) > 0.1 for scene in found],
        [bool(meetings(scene)) for scene in found if len(scene.shapes) > 1],
    ):
        assert 0.1 < np.mean(what) < 0.9
    assert all(shape.last - shape.first >= 6 for shape in shapes)


def test_brightness_and_noise_differ_from_clip_to_clip() -> None:
    """With nobody there, one frame less the next is noise, and the mean of a frame follows the light."""
    noise, light = [], []
    for number in range(12):
        _, _, random = draw("train", number)
        empty, _ = again(Scene((), None, None, (0.0, 0.0)), random)
        noise.append(np.diff(empty[:2].astype(int), axis=0).std())
        light.append(empty[-1].mean() / empty[0].mean())
    assert min(noise) > 2.5
    assert max(noise) > 2 * min(noise)
    assert min(light) < 0.95 < 1.05 < max(light)
