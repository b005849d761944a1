"""Training: from nothing to a checkpoint, stopped and gone on with, and what is refused.

The stages are those of the real training with a few clips of a few frames; the model is the bundled one.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlavaOnevisionForConditionalGeneration

from builder.micro import answering, card, course, loop, see, train
from builder.micro.answering import Stage, motion_head, train_answering
from builder.micro.packing import Packer
from earlytom import micro
from earlytom.micro import checkpoint
from earlytom.micro.checkpoint import write_checkpoint
from earlytom.micro.data import labelled_clip
from earlytom.micro.data.scene import FRAMES
from earlytom.micro.data.splits import draw
from runtime.checkpoint import describe

OFTEN = ("exists",)
GLIMPSES = Stage("glimpses", seed=11, steps=4, clips=4, frames=2, rate=1e-3, kept=6, stretched=0.5, often=OFTEN)
CLIPS = Stage("clips", seed=12, steps=2, clips=2, frames=3, rate=5e-4, kept=2, stretched=0.3, often=OFTEN)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _small() -> Iterator[None]:
    """Every stage with a few steps of a few frames."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(course, "PERCEPTION_STEPS", 4)
        patch.setattr(course, "STAGES", (GLIMPSES, CLIPS))
        patch.setattr(see, "CLIPS", 2)
        patch.setattr(see, "FRAMES_A_CLIP", 4)
        yield


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return course.build_tokenizer()


@pytest.fixture(autouse=True, scope="module")
def _one_tokenizer(tokenizer: Any) -> Iterator[None]:
    """Made once: it takes seconds, and is tested with the bundled checkpoint."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(course, "build_tokenizer", lambda: tokenizer)
        patch.setattr("earlytom.micro.checkpoint.build_tokenizer", lambda: tokenizer)
        yield


class Losses:
    """A report that keeps the losses, and can stop the run after one of them."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.values: list[float] = []
        self.steps: list[int] = []
        self._stop_after = stop_after

    def __call__(self, stage: str, step: int, steps: int, loss: Tensor, right: dict[str, Tensor]) -> None:
        self.values.append(loss.item())
        self.steps.append(step)
        assert all(0 <= value <= 1 for name, value in right.items() if name not in ("place_px", "motion"))
        if step == self._stop_after:
            raise KeyboardInterrupt


def weights(model: Any) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


# The command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What half of the steps make, with what is printed in `printed`."""
    out = tmp_path_factory.mktemp("made") / "checkpoint"
    out.mkdir()
    (out / "accuracy.json").write_text('{"of": "other weights"}')
    words = ["--out", str(out), "--work", str(out.parent / "work"), "--device", "cpu", "--workers", "0"]
    assert train.main([*words, "--scale", "0.5"]) == 0
    return out


def test_transformers_loads_what_is_written_without_a_missing_tensor(made: Path) -> None:
    loaded: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(made, output_loading_info=True)
    assert not any(loaded[1].values())
    state = load_file(made / "model.safetensors")
    assert {tensor.dtype for tensor in state.values()} == {torch.float16}
    assert all(tensor.isfinite().all() for tensor in state.values())
    bundled = load_file(micro.PATH / "model.safetensors")
    assert {name: tensor.shape for name, tensor in state.items()} == {n: t.shape for n, t in bundled.items()}


def test_half_a_training_is_not_called_trained(made: Path, tmp_path: Path) -> None:
    assert not describe(made).trained
    model: Any = LlavaOnevisionForConditionalGeneration.from_pretrained(made, dtype=torch.float32)
    write_checkpoint(tmp_path / "whole", model, json.loads((made / "training.json").read_text()))
    assert describe(tmp_path / "whole").trained
    assert same(*(load_file(folder / "model.safetensors") for folder in (made, tmp_path / "whole")))


def test_how_it_was_made_is_recorded(made: Path) -> None:
    about = json.loads((made / "training.json").read_text())
    assert about["seed"] == course.SEED
    assert [(stage["stage"], stage["steps"], stage["frames"]) for stage in about["stages"]] == [
        ("perception", 2, 8),
        ("glimpses", 2, 8),
        ("clips", 1, 6),
    ]
    assert all(stage["seconds"] > 0 for stage in about["stages"])
    card = (made / "README.md").read_text()
    assert all(stage["stage"] in card for stage in about["stages"])
    assert not (made / "accuracy.json").exists()  # it was of other weights


def test_whole_training_is_called_trained_and_a_part_is_not(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    written: list[bool] = []
    monkeypatch.setattr(course, "train", lambda *_: (None, {}))
    monkeypatch.setattr(checkpoint, "write_checkpoint", lambda *_, trained: written.append(trained))
    monkeypatch.setattr(card, "write_card", lambda _: None)
    for scale in ("1", "0.999"):
        words = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--scale", scale]
        assert train.main(words) == 0
    assert written == [True, False]


@pytest.mark.parametrize("scale", ["0", "-1", "1.01", "nan", "inf"])
def test_a_scale_that_makes_no_sense_is_refused_in_one_line(
    scale: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main(["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), f"--scale={scale}"]) == 2
    out, error = capsys.readouterr()
    assert out == ""
    assert error.startswith("error: --scale ")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_it_is_stopped_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(loop, "SAVED_EVERY", 1)
    monkeypatch.setattr(course, "STAGES", (replace(GLIMPSES, steps=1),))
    steps: list[tuple[str, int]] = []

    def interrupted(self: Any, stage: str, step: int, *_: Any) -> None:
        steps.append((stage, step))
        if step == 2 and len(steps) == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(course.Display, "__call__", interrupted)
    words = ["--out", str(tmp_path / "out"), "--work", str(tmp_path / "work"), "--device", "cpu", "--workers", "0"]
    assert train.main(words) == 130
    out, error = capsys.readouterr()
    assert out == ""
    assert error.strip().splitlines() == [f"stopped; the same command goes on from {tmp_path / 'work'}"]
    assert list((tmp_path / "out").iterdir()) == []
    assert train.main(words) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert record["checkpoint"] == str(tmp_path / "out")
    # Step 2 was not noted down when the signal came, so it is done again; step 1 is not.
    perception = [("perception", step) for step in (1, 2, 2, 3, 4)]
    assert steps == [*perception, ("glimpses", 1)]
    assert {path.name for path in (tmp_path / "work").iterdir()} == {"perception.pt", "glimpses.pt"}


def test_the_display_tells_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    display = course.Display(every=2)
    with display.progress:
        for step in (1, 2, 3):
            display("clips", step, 3, torch.tensor(2.0 * step), {"colour": torch.tensor(0.5)})
    shown = capsys.readouterr().err
    assert "clips 2/3  colour 0.500  loss 2.080" in shown  # a running mean: 2, then 4 % of the way to 4
    assert "clips 3/3" in shown
    assert "clips 1/3" not in shown


# Resuming


def head_of(model: Any) -> nn.Linear:
    torch.manual_seed(5)
    return motion_head(model)


def perceive(model: Any, tokenizer: Any, work: Path, report: Losses, steps: int = 4) -> None:
    see.train_perception(model, tokenizer, steps, work, report, 0)


def answer(model: Any, tokenizer: Any, work: Path, report: Losses, steps: int = 4) -> None:
    train_answering(model, head_of(model), Packer(tokenizer), replace(GLIMPSES, steps=steps), work, report, 0)


@pytest.mark.parametrize("run", [perceive, answer])
def test_a_run_that_was_stopped_ends_where_one_that_was_not_ends(
    run: Callable[..., None], tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "SAVED_EVERY", 2)
    (tmp_path / "whole").mkdir()
    (tmp_path / "parts").mkdir()
    whole, first, second = (course.new_model() for _ in range(3))
    smooth = Losses()
    run(whole, tokenizer, tmp_path / "whole", smooth)
    with pytest.raises(KeyboardInterrupt):
        run(first, tokenizer, tmp_path / "parts", Losses(stop_after=3))
    halfway = weights(second)
    rest = Losses()
    run(second, tokenizer, tmp_path / "parts", rest)
    assert rest.steps == [3, 4]
    assert rest.values == smooth.values[2:]
    assert same(weights(second), weights(whole))
    assert not same(halfway, weights(whole))
    # A stage that is done is not done again, and its weights come back.
    third, nothing = course.new_model(), Losses()
    run(third, tokenizer, tmp_path / "parts", nothing)
    assert nothing.steps == []
    assert same(weights(third), weights(whole))
    assert [path.suffix for path in (tmp_path / "parts").iterdir()] == [".pt"]  # nothing half written is left


def test_the_start_is_the_same_every_time_and_another_for_another_seed() -> None:
    assert same(weights(course.new_model()), weights(course.new_model()))
    assert not same(weights(course.new_model()), weights(course.new_model(1)))


def test_a_step_is_made_the_same_wherever_one_begins() -> None:
    whole = dict(loop.made_ahead(str, 0, 5, 0))
    assert whole == {step: str(step) for step in range(5)}
    assert dict(loop.made_ahead(str, 3, 5, 0)) == {3: "3", 4: "4"}
    assert dict(loop.made_ahead(str, 3, 5, 1)) == {3: "3", 4: "4"}  # in another process
    assert list(loop.made_ahead(str, 5, 5, 0)) == []


# Learning


@pytest.mark.parametrize(("rate", "learns"), [(1e-3, True), (0.0, False)])
def test_the_first_stage_learns_a_batch_that_is_shown_again_and_again(
    rate: float, learns: bool, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = see.make_batch(0)
    monkeypatch.setattr(see, "make_batch", lambda step: dict(batch))
    monkeypatch.setattr(see, "RATE", rate)
    report = Losses()
    perceive(course.new_model(), tokenizer, tmp_path, report, 10)
    first, last = report.values[0], report.values[-1]
    assert (last < 0.8 * first) == learns
    assert learns or last == pytest.approx(first, rel=1e-5)


@pytest.mark.parametrize(("rate", "learns"), [(1e-3, True), (0.0, False)])
def test_the_decoder_learns_clips_that_are_shown_again_and_again(
    rate: float, learns: bool, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = answering.ClipMaker.__call__
    monkeypatch.setattr(answering.ClipMaker, "__call__", lambda self, step: original(self, 0))
    monkeypatch.setattr(answering, "_stretch", lambda count, part, random: torch.ones(count))
    report = Losses()
    stage = replace(CLIPS, steps=10, rate=rate)
    model = course.new_model()
    train_answering(model, head_of(model), Packer(tokenizer), stage, tmp_path, report, 0)
    first, last = report.values[0], report.values[-1]
    assert (last < 0.8 * first) == learns
    assert learns or last == pytest.approx(first, rel=1e-5)


def test_the_tower_stands_still_while_the_decoder_learns(tokenizer: Any, tmp_path: Path) -> None:
    model = course.new_model()
    before = weights(model)
    train_answering(model, head_of(model), Packer(tokenizer), replace(CLIPS, steps=1), tmp_path, Losses(), 0)
    moved = {name.split(".")[1] for name, value in weights(model).items() if not torch.equal(value, before[name])}
    assert moved - {"weight"} == {"language_model", "image_newline"}


def test_half_of_the_clips_of_a_step_were_seen_before(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps: list[list[int]] = []
    original = answering.answer_loss
    alive = []  # so that no two examples ever have one address

    def watched(model: Any, head: Any, packer: Packer, examples: Any, stretch: Tensor) -> Any:
        alive.append(examples)
        steps.append([id(example.pack) for example in examples])
        assert all(example.visual.dtype == torch.float16 for example in examples)
        return original(model, head, packer, examples, stretch)

    monkeypatch.setattr(answering, "answer_loss", watched)
    model = course.new_model()
    train_answering(model, head_of(model), Packer(tokenizer), GLIMPSES, tmp_path, Losses(), 0)
    assert len(steps) == GLIMPSES.steps
    seen: list[int] = []
    for step in steps:
        fresh, again = step[:2], step[2:]
        assert len(step) == GLIMPSES.clips
        assert not set(fresh) & set(seen)
        seen += fresh
        assert set(again) <= set(seen[-GLIMPSES.kept :])


def test_the_rate_rises_and_falls() -> None:
    layer = nn.Linear(2, 1)
    optimizer = loop.Optimizer([layer], 0.5, 100)
    rates = []
    for step in range(100):
        optimizer.step(layer(torch.ones(1, 2)).sum(), step)
        rates += [group["lr"] for group in optimizer.state_dict()["param_groups"][:1]]
    assert rates[0] == pytest.approx(0.05)
    assert max(rates) == pytest.approx(0.5)
    assert rates.index(max(rates)) in (9, 10)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.01, rel=0.1)


def test_matrices_decay_and_biases_do_not() -> None:
    layer = nn.Linear(3, 4)
    shared = nn.ModuleList([layer, layer])
    groups = loop.optimizer_of([layer, shared], 0.1).param_groups
    assert [(group["weight_decay"] > 0, len(group["params"])) for group in groups] == [(True, 1), (False, 1)]
    assert groups[0]["params"][0] is layer.weight


# What is asked


def test_one_frame_of_every_stretch_is_shown() -> None:
    random = np.random.default_rng(0)
    for frames in (1, 4, 8, 16):
        chosen = [answering.choose_times(frames, random) for _ in range(50)]
        for times in chosen:
            assert [time * frames // FRAMES for time in times] == list(range(frames))
        assert (len({tuple(times) for times in chosen}) > 10) == (frames < FRAMES)


def test_nothing_is_asked_about_what_the_chosen_frames_do_not_show() -> None:
    left_out = asked_about = 0
    for index in range(60):
        scene = draw("train", index)[0]
        random = np.random.default_rng(index)
        times = answering.choose_times(4, random)
        asked = answering.choose_questions(scene, times, random)
        assert len(set(asked)) == len(asked) <= 12
        digits = [time for shape in scene.shapes for time in range(shape.digit_first, shape.digit_last)]
        dots = [] if scene.dot is None else list(range(scene.dot.first, scene.dot.last))
        for kind, shown in (("digit", digits), ("dot", dots)):
            seen = bool(set(times.tolist()) & set(shown))
            there = any(question.kind == kind for question in asked)
            assert seen or not there
            left_out += bool(shown) and not seen
            asked_about += there
    assert left_out > 10
    assert asked_about > 10


def test_a_step_has_new_clips_of_the_training_split(tokenizer: Any) -> None:
    maker = answering.ClipMaker(GLIMPSES, Packer(tokenizer))
    first, again, second = maker(0), maker(0), maker(1)
    assert len(first) == GLIMPSES.clips // 2
    clips = [example.visual for example in (*first, *second)]
    assert len({clip.numpy().tobytes() for clip in clips}) == len(clips)
    for index, (one, other) in enumerate(zip(first, again, strict=True)):
        assert torch.equal(one.visual, other.visual)
        assert torch.equal(one.pack.ids, other.pack.ids)
        assert one.pack.questions == len(one.kinds)
        random = np.random.default_rng([GLIMPSES.seed, index, 2])
        times = answering.choose_times(GLIMPSES.frames, random)
        drawn = labelled_clip("train", index, seed=GLIMPSES.seed, times=times)
        assert np.array_equal(drawn.frames, one.visual.numpy())


def test_the_help_teaches_and_what_is_mistyped_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    text = train.parser().format_help()
    for action in train.parser()._actions:
        assert action.help, action.dest
    assert "examples:" in text
    assert train.main(["--scale", "x"]) == 2
    assert capsys.readouterr().err == "error: --scale: invalid float value: 'x' (--help lists the options)\n"
