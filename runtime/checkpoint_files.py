"""The files of a checkpoint, wherever they are, and the tensors in them.

`Files` is a local folder; `HubFiles` is a repository on the model hub, whose files are fetched one by one when they are
asked for (the only place that uses the hub client). Tensors are found under their canonical names, whatever release of
transformers wrote them, in one safetensors file or in shards. Nothing here knows what a tensor is for.

Whatever is missing, truncated or out of reach ends in a `UserError` of one line.
"""

import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from earlytom.errors import UserError
from earlytom.families.llava_onevision import canonical_name

_DTYPES = ("F16", "BF16", "F32", "F64")
_SINGLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


class Place(NamedTuple):
    """Where a tensor is: its name there, and the file."""

    name: str
    file: str


class Files:
    """The files of the checkpoint in the local folder `root`; `label` is what the user called it."""

    def __init__(self, label: str, root: Path) -> None:
        self.label = label
        self._root = root

    @property
    def name(self) -> str:
        """The checkpoint's own name, fit for a folder."""
        return self._root.resolve().name

    def path(self, name: str) -> Path | None:
        """Where the file `name` lies, or None if the checkpoint has no such file."""
        path = self._root / name
        return path if path.is_file() else None

    def folder(self, patterns: tuple[str, ...]) -> Path:
        """A local folder that holds at least the files that match `patterns`."""
        return self._root

    def json(self, name: str) -> dict[str, Any] | None:
        """The JSON object in the file `name`, or None if there is no such file."""
        path = self.path(name)
        if path is None:
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise self.error(f"cannot read {name} ({first_line(error)}); download it again") from error
        if not isinstance(content, dict):
            raise self.error(f"{name} is not a JSON object; download it again")
        return content

    def tensors(self, expected: Mapping[str, torch.Size], prefixes: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        """The expected tensors as they are stored, one at a time, by canonical name in sorted order.

        `expected` maps canonical names to shapes. Names and shapes of all of them are checked before the first is
        read: raises `UserError` if one is missing, has another shape or is quantised, and if there is another tensor
        whose name begins with one of `prefixes`.
        """
        places = self.places(expected, prefixes)
        for name in sorted(places):
            raw, file = places[name]
            with self._opened(file) as tensors:
                tensor = tensors.get_tensor(raw)
            yield name, tensor

    def places(self, expected: Mapping[str, torch.Size], prefixes: tuple[str, ...]) -> dict[str, Place]:
        """Where each expected tensor is; the checks are those of `tensors`."""
        places: dict[str, Place] = {}
        for raw, file in sorted(self._weight_map().items()):
            name = canonical_name(raw)
            if not name.startswith(prefixes) or name.endswith(".position_ids"):
                continue  # not asked for, or a buffer that old releases stored
            if name in places:
                raise self.error(f"{places[name].name} and {raw} are the same tensor; expected one of them")
            places[name] = Place(raw, file)
        if missing := sorted(expected.keys() - places.keys()):
            raise self.error(f"missing tensors in the weights: {some(missing)}; the checkpoint is not complete")
        if unexpected := sorted(places.keys() - expected.keys()):
            raise self.error(
                f"unexpected tensors in the weights: {some(unexpected)}; config.json does not describe them"
            )
        for file in sorted({place.file for place in places.values()}):
            self._check_headers(file, places, expected)
        return places

    def error(self, text: str) -> UserError:
        """An error about this checkpoint, as the command line says it."""
        return UserError(f"--model {self.label}: {text}")

    def _weight_map(self) -> dict[str, str]:
        """The file that holds each tensor, by the tensor's name there."""
        index = self.json(_INDEX)
        if index is None:
            with self._opened(_SINGLE) as tensors:
                return dict.fromkeys(tensors.keys(), _SINGLE)
        where = index.get("weight_map")
        if not isinstance(where, dict):
            raise self.error(f"{_INDEX} has no weight_map; download it again")
        return where

    def _check_headers(self, file: str, places: Mapping[str, Place], expected: Mapping[str, torch.Size]) -> None:
        """Shapes and types of the tensors in one file, without reading them."""
        with self._opened(file) as tensors:
            for name, place in places.items():
                if place.file != file:
                    continue
                header = tensors.get_slice(place.name)
                if (dtype := header.get_dtype()) not in _DTYPES:
                    raise self.error(f"{place.name} is {dtype}; quantised weights are not supported, use the original")
                got, wanted = list(header.get_shape()), list(expected[name])
                if got != wanted:
                    raise self.error(f"{place.name} has the shape {got}, and config.json asks for {wanted}")

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        path = self.path(name)
        if path is None:
            raise self.error(f"{name} is missing; expected the weights in {_SINGLE}, or in shards with {_INDEX}")
        try:
            with safe_open(path, framework="pt") as tensors:
                yield tensors
        except (OSError, SafetensorError) as error:
            raise self.error(f"{name} is truncated or broken ({first_line(error)}); download it again") from error


class HubFiles(Files):
    """The files of the hub repository `label`, kept in the hub client's cache."""

    def __init__(self, label: str) -> None:
        super().__init__(label, Path(label))

    def path(self, name: str) -> Path | None:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        try:
            with self._one_line():
                return Path(hf_hub_download(self.label, name))
        except EntryNotFoundError as error:
            if isinstance(error, LocalEntryNotFoundError):  # offline and not in the cache: says nothing about the file
                raise self._unreachable(error) from error
            return None

    def folder(self, patterns: tuple[str, ...]) -> Path:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import EntryNotFoundError

        try:
            with self._one_line():
                return Path(snapshot_download(self.label, allow_patterns=list(patterns)))
        except EntryNotFoundError as error:
            raise self._unreachable(error) from error

    @contextmanager
    def _one_line(self) -> Iterator[None]:
        """Errors of the hub client in one line, and without its own messages about each retry."""
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HFValidationError,
            RepositoryNotFoundError,
        )

        client = logging.getLogger("huggingface_hub")
        level = client.level
        client.setLevel(logging.ERROR)
        try:
            yield
        except EntryNotFoundError:
            raise
        except GatedRepoError as error:
            raise self.error("access to it is restricted; ask for access on the hub and log in") from error
        except (RepositoryNotFoundError, HFValidationError) as error:
            raise self.error("no such local folder, and no such model on the hub; check the name") from error
        except OSError as error:
            raise self._unreachable(error) from error
        finally:
            client.setLevel(level)

    def _unreachable(self, error: Exception) -> UserError:
        return self.error(
            f"no such local folder, and the model hub cannot be reached ({type(error).__name__}); check the path or "
            "the connection, or leave --model out for the bundled model"
        )


def is_hub_id(label: str) -> bool:
    """Whether `label` has the form of a hub id, ORG/NAME."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", label) is not None


def first_line(error: Exception) -> str:
    """What an error of a library says, as one line of moderate length."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200]


def some(names: list[str]) -> str:
    """The first names of a list, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
