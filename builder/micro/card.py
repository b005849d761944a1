"""The model card of the bundled checkpoint, from the records beside the weights: `training.json`, written by the
training, and `accuracy.json`, written by `python -m builder.evaluate --record`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from earlytom.families import DEFAULT_FAMILY
from earlytom.micro import ACCURACY_FILE, TRAINING_FILE
from earlytom.micro.data.questions import KINDS
from earlytom.micro.data.splits import draw

_CARD = """\
---
license: apache-2.0
library_name: transformers
---
# Micro {family}

A video LLM small enough to be kept with the sources, in exactly the architecture and the layout of the published
{family} checkpoints, so that exporting, compiling, running and *measuring* can be tried without a download.
It answers questions about short clips of moving shapes, and nothing else.

| part | size |
|---|---|
| vision tower | {tower}, {layers} layers, width {width}, {grid} x {grid} patches of {patch} pixels, no pooling head |
| decoder | Qwen2, {text_layers} layers, width {text_width}, {heads} heads ({kv_heads} key-value), tied embeddings |
| tokenizer | byte-level BPE, {vocabulary} tokens, trained on generated questions about drawn clips |
| weights | {megabytes:.1f} MB in half precision |

## Data

`earlytom.micro.data` draws the clips: 16 frames of 72 x 72 pixels, one to four coloured shapes before a moving
background, with digits, flashes, cuts, occlusion, camera drift, changing brightness and noise. Training, validation
and test clips never share a cast (the shapes with their colours, the dot, the digit). Nothing is stored: clip n of a
split follows from n.

{questions}

## Training

`python -m builder.micro.train`, seed {seed}, on {hardware} with PyTorch {torch}, in {minutes:.0f} minutes. The model
saw every visual token of every clip: EarlyTom and cells need no training and had no part in it.

{stages}
{remarks}
## Accuracy

{accuracy}
"""
_CELLS = (
    "cells has as many frames and tokens as EarlyTom, and its tokens come with bias and original positions. Nothing of "
    "EarlyTom was tuned on this model; what cells has beside it was chosen on validation clips, none of them above. "
    "Unknown on published checkpoints: how its bias gets on with the attention sinks of large decoders, and its "
    "positions with videos of more than 32 frames."
)
_UNMEASURED = "Not measured yet: `python -m builder.evaluate --record` does."


def write_card(folder: Path) -> None:
    """Write README.md of the checkpoint in `folder`."""
    config, training = _read(folder / "config.json"), _read(folder / TRAINING_FILE)
    vision, text = config["vision_config"], config["text_config"]
    accuracy = folder / ACCURACY_FILE
    card = _CARD.format(
        family=DEFAULT_FAMILY.title,
        tower=DEFAULT_FAMILY.tower_title,
        layers=vision["num_hidden_layers"],
        width=vision["hidden_size"],
        grid=vision["image_size"] // vision["patch_size"],
        patch=vision["patch_size"],
        text_layers=text["num_hidden_layers"],
        text_width=text["hidden_size"],
        heads=text["num_attention_heads"],
        kv_heads=text["num_key_value_heads"],
        vocabulary=text["vocab_size"],
        megabytes=(folder / "model.safetensors").stat().st_size / 1e6,
        questions=_questions(),
        seed=training["seed"],
        hardware=training["hardware"],
        torch=training["torch"],
        minutes=sum(stage["seconds"] for stage in training["stages"]) / 60,
        stages=_stages(training["stages"]),
        remarks="".join(f"\n{remark}\n" for remark in training.get("remarks", [])),
        accuracy=_accuracy(_read(accuracy)) if accuracy.is_file() else _UNMEASURED,
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _questions() -> str:
    """One example of every kind of question."""
    examples: dict[str, str] = {}
    index = 0
    while len(examples) < len(KINDS):
        for question in draw("train", index)[1]:
            examples.setdefault(question.kind, f"{question.text} | {question.answer}")
        index += 1
    rows = [f"| {name} | {kind.needs} | {examples[name]} |" for name, kind in KINDS.items()]
    return "\n".join(("| kind | needs | for example | answer |", "|---|---|---|---|", *rows))


def _stages(stages: list[dict[str, Any]]) -> str:
    rows = [f"| {one['stage']} | {one['steps']} | {one['frames']} | {one['seconds'] / 60:.1f} |" for one in stages]
    return "\n".join(("| stage | steps | frames a step | minutes |", "|---|---|---|---|", *rows))


def _accuracy(record: dict[str, Any]) -> str:
    """Accuracy by kind: all tokens, EarlyTom, cells, and the best guess from the question's text alone."""
    rows = {(one["method"], one["ratio"]): one for one in record["results"]}
    shown = {
        "all tokens": rows["full", None],
        "EarlyTom, ratio 0.25": rows["budget", 0.25],
        "EarlyTom, ratio 0.10": rows["budget", 0.1],
        "cells, ratio 0.10": rows.get(("cells-rounds", 0.1)),
        "cells, ratio 0.05": rows.get(("cells-rounds", 0.05)),
        "no video": record["no_video"],
    }
    columns = {title: one for title, one in shown.items() if one is not None}
    table = [
        f"| {kind} | " + " | ".join(_percent(one["kinds"][kind]) for one in columns.values()) + " |" for kind in KINDS
    ]
    table.append("| **all** | " + " | ".join(f"**{_percent(one['accuracy'])}**" for one in columns.values()) + " |")
    text = (
        f"Exact answers, greedy decoding, {record['questions']:,} questions about {record['clips']:,} clips of the "
        "test split, in percent (`python -m builder.evaluate --record`; EarlyTom with the budget schedule)."
    )
    head = ("| kind | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|")
    remarks = ["", _CELLS] if rows.keys() & {("cells-rounds", 0.1), ("cells-rounds", 0.05)} else []
    return "\n".join((text, "", *head, *table, *remarks))


def _percent(triple: list[float] | None) -> str:
    return "" if triple is None else f"{100 * triple[0]:.1f}"
