"""`Checkpoint`: a source's configuration, preprocessing, origin and digests; weights are read on demand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from earlytom import micro
from earlytom.errors import UserError
from earlytom.families import Family, family_of
from earlytom.families.published import MID_SIZE, MID_SIZE_FRAMES, PUBLISHED, mid_size
from earlytom.micro.weights import SCHEME
from runtime.checkpoint.files import TOKENIZER_BYTES, Files, first_line
from runtime.checkpoint.generation import FILE as GENERATION_FILE
from runtime.checkpoint.generation import generation_config, left_out, read_generation
from runtime.checkpoint.hub import HubFiles, is_hub_id
from runtime.checkpoint.preprocessing import Preprocessing, read_preprocessing
from runtime.checkpoint.settings import CONFIG, read_config, read_flag
from runtime.checkpoint.tokenizer import TEMPLATE_FILES, TOKENIZER_FILES
from runtime.checkpoint.weights import Weights

MICRO = "micro"
RANDOM = "random:"
RANDOM_SEED = 0

# Keys of config.json that answers do not depend on, or that the vision digest covers.
_NOT_ANSWERS = ("transformers_version", "architectures", "_name_or_path", "dtype", "torch_dtype", "vision_config")


@dataclass(frozen=True)
class Checkpoint:
    """A described source.

    Attributes:
        source: independent of the working directory: "micro" (also for None), "random:NAME", an absolute path, or a hub
            id as given.
        name: a short name, valid for a folder.
        config: transformers' configuration of the model.
        preprocessing: of video frames; its size is that of the vision tower.
        trained: False for random weights, and for the bundled model until it is trained.
        files: None for random weights.
        frames: the default number of frames of a video: its video processor's `num_frames`, else its family's.
        generation_note: the settings of its generation_config.json that this runtime ignores; None if there are none.
    """

    source: str
    name: str
    config: Any
    preprocessing: Preprocessing
    trained: bool
    frames: int
    files: Files | None = field(default=None, repr=False, compare=False)
    generation_note: str | None = None

    @property
    def family(self) -> Family:
        """The model's family."""
        return family_of(self.config)

    def sized(self, size: tuple[int, int]) -> Checkpoint:
        """The checkpoint for frames of `size` (height, width).

        Raises:
            UserError: the tower has another fixed size, or patches do not fill this one.
        """
        if size == self.preprocessing.size:
            return self
        if not self.family.any_size:
            got, takes = ("x".join(map(str, one)) for one in (size, self.preprocessing.size))
            raise UserError(f"--size {got}: {self.family.title} of {self.source} takes frames of {takes}: leave it out")
        config, preprocessing = self.family.sized(self.config, size), dataclasses.replace(self.preprocessing, size=size)
        return dataclasses.replace(self, config=config, preprocessing=preprocessing)

    @property
    def commit(self) -> str | None:
        """The commit of a hub repository; None for other sources."""
        return None if self.files is None else self.files.commit

    @cached_property
    def weights(self) -> Weights:
        """The tensors in its files."""
        assert self.files is not None  # random weights have no files
        unused = {self.family.head_name} - self.shapes.keys()
        return Weights(self.files, unused, self.family, self.family.spare_names(self.config))

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shape of each tensor of the whole model, by canonical name, without a tied output layer."""
        family = self.family
        with torch.device("meta"):
            model = family.new_model(self.config)
        model.tie_weights()
        return {family.canonical_name(name): parameter.shape for name, parameter in model.named_parameters()}

    @property
    def vision_shapes(self) -> dict[str, torch.Size]:
        """`shapes` of vision tower, projector and closing token."""
        return {name: shape for name, shape in self.shapes.items() if name.startswith(self.family.vision_names)}

    @property
    def decoder_shapes(self) -> dict[str, torch.Size]:
        """`shapes` of the language model and its head."""
        return {name: shape for name, shape in self.shapes.items() if name.startswith(self.family.decoder_names)}

    def digest(self) -> str:
        """SHA-256 (hex) of everything that a vision engine depends on: tensors, their settings, the preprocessing.

        Tensors are hashed by canonical name and in their stored dtype, so a checkpoint saved again by another release
        of transformers, or in other shards, has the same digest. Random weights are hashed by their scheme, seed and
        shapes. Computed once; raises `UserError` as `load_vision` does.
        """
        return self._digest

    def answers_digest(self) -> str:
        """SHA-256 (hex) of everything else that an answer depends on: decoder, tokenizer, templates, stop tokens.

        Weights are hashed as whole files, in any order: the hub lists a large file's SHA-256, so decoder shards need
        not be fetched. Computed once. Raises `UserError` if a file is missing.
        """
        return self._answers_digest

    def check_weights(self) -> None:
        """Raise `UserError` for weights that do not fit the whole model, before a part of it is loaded.

        If a file would have to be fetched from the hub, only names are checked.
        """
        if self.files is None:
            return
        if all(map(self.files.at_hand, self.weights.shards)):
            self.weights.places(self.shapes, ("",))
        else:
            self.weights.check_names(self.shapes)

    @cached_property
    def _digest(self) -> str:
        settings = {
            **self.family.vision_settings(self.config),
            "preprocessing": self.preprocessing.settings(),
        }
        sha = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        shapes = self.vision_shapes
        if self.files is None:
            sha.update(f"{SCHEME}:{RANDOM_SEED}:{sorted((n, tuple(s)) for n, s in shapes.items())}".encode())
            return sha.hexdigest()
        for name, tensor in self.weights.tensors(shapes, self.family.vision_names):
            sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
            sha.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
        return sha.hexdigest()

    @cached_property
    def _answers_digest(self) -> str:
        files = self.files
        if files is None:
            shapes = sorted((n, tuple(s)) for n, s in self.decoder_shapes.items())
            return hashlib.sha256(f"{SCHEME}:{RANDOM_SEED}:{shapes}".encode()).hexdigest()
        config = files.json(CONFIG) or {}
        with ThreadPoolExecutor(4) as pool:  # hashing releases the GIL
            weights = sorted(pool.map(files.sha256, self.weights.shards))
        parts = {
            "weights": weights,
            "config": {name: value for name, value in config.items() if name not in _NOT_ANSWERS},
            "files": {
                name: hashlib.sha256(content).hexdigest()
                for name in (*TOKENIZER_FILES, *TEMPLATE_FILES, GENERATION_FILE)
                if (content := files.bytes(name, TOKENIZER_BYTES)) is not None
            },
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


Source = str | Path | Checkpoint | None


def describe(source: Source = None) -> Checkpoint:
    """The `Checkpoint` of `source`; no weights are read. A `Checkpoint` is returned as it is.

    Raises `UserError` if there is no such source, its files are missing or broken, or its model family is unknown.
    """
    if isinstance(source, Checkpoint):
        return source
    label = MICRO if source is None else str(source)
    if label.startswith(RANDOM):
        return _describe_random(label)
    files = open_files(label)
    raw, config = read_config(files)
    trained = read_flag(files, raw, "earlytom_trained", True)
    preprocessing, frames = read_preprocessing(files, config)
    note = left_out(read_generation(files))
    generation_config(files, config)  # invalid stop tokens are refused now
    found = Checkpoint(files.source, files.name, config, preprocessing, trained, frames, files, note)
    try:
        _ = found.shapes
    except Exception as error:  # the library fails on impossible configurations with errors of many types
        raise files.error(f"{CONFIG} describes no model that can be made ({first_line(error)})") from error
    return found


def open_files(label: str) -> Files:
    """The files behind a source that is not random."""
    if label == MICRO:
        files = Files(label, micro.PATH)
        files.source = MICRO
        return files
    path = Path(label).expanduser() if "\0" not in label else Path()
    try:
        is_folder, exists = path.is_dir(), path.exists()
    except OSError:  # too long to be a name
        is_folder = exists = False
    if "\0" not in label and is_folder:
        if not os.access(path, os.R_OK | os.X_OK):
            raise UserError(f"--model {label}: permission denied; change the folder's permissions")
        return Files(label, path)
    if exists and "\0" not in label:
        raise UserError(f"--model {label}: it is a file; expected the folder of a checkpoint")
    if is_hub_id(label):
        return HubFiles(label)
    raise UserError(
        f"--model {label}: no such folder; expected the folder of a checkpoint, a hub id ORG/NAME or ORG/NAME@REVISION,"
        f" '{MICRO}' or {RANDOM}NAME"
    )


def _describe_random(label: str) -> Checkpoint:
    name = label.removeprefix(RANDOM)
    known = {**PUBLISHED, MID_SIZE: mid_size}
    if name not in known:
        raise UserError(f"--model {label}: no such configuration; {RANDOM} knows {', '.join(known)}")
    config = known[name]()
    family = family_of(config)
    frames = MID_SIZE_FRAMES if name == MID_SIZE else family.frames
    preprocessing = Preprocessing(family.geometry(config).size, family.mean, family.std, family.sampling)
    return Checkpoint(label, f"random-{name}", config, preprocessing, trained=False, frames=frames)
