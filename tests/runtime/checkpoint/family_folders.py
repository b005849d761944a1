"""A checkpoint folder of every family, as a user would have it: tiny, random, with a tokenizer, able to answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from earlytom.families import FAMILIES, geometry
from earlytom.micro.random_model import greedy, published_tokenizer
from runtime.checkpoint import load_tokenizer
from tests.earlytom.tiny import MODELS
from tests.runtime.checkpoint.tiny_checkpoint import Rename, same_name, write

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]


def family_folder(folder: Path, name: str, *, rename: Rename = same_name, layers: int = 3) -> tuple[Path, Any]:
    """A checkpoint of the family `name` in `folder`, and its model; `rename` gives its tensors' names."""
    made = MODELS[name](bundled=True, layers=layers)
    made.generation_config = greedy(made.config)
    found = FAMILIES[name]
    names = {found.canonical_name(raw): raw for raw in made.state_dict()}
    write(folder, made, rename=lambda raw: rename(names[found.canonical_name(raw)]))
    tokenizer = published_tokenizer(load_tokenizer(), made.config)
    tokenizer.save_pretrained(folder)
    height, width = geometry(made.config).size
    size = {"height": height, "width": width}
    (folder / "preprocessor_config.json").write_text(
        json.dumps({"size": size, "image_mean": MEAN, "image_std": STD, "resample": 3})
    )
    assert set(FAMILIES) == set(MODELS)
    return folder, made
