"""The tensors of a checkpoint: safetensors in one file or in shards, under the names of any release of transformers.

Names, shapes and dtypes of all requested tensors are checked by the files' headers before the first one is read, and
each file is then opened once for all its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from earlytom.families import DEFAULT_FAMILY, Family
from earlytom.numbers import shown
from runtime.checkpoint.files import INDEX_BYTES, Files, cut, first_line, out_of_memory, some

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_DTYPES = ("F16", "BF16", "F32", "F64")
_BUFFERS = (".position_ids", ".rotary_emb.inv_freq")  # stored by old releases
_VOCABULARY = ("embed_tokens.weight", "lm_head.weight")
# Names of tensors of quantised weights (GPTQ, AWQ, bitsandbytes, fp8, compressed-tensors, ...).
_QUANTISED = re.compile(
    r"\.(qweight|qzeros|scales|zeros|g_idx|SCB|weight_format|absmax|quant_map|nested_\w+|quant_state\..*|"
    r"\w*_?(weight|input|output|k|v|q)_(scale|scale_inv|zero_point|packed|shape|scales))$"
    r"|\.weight\.(absmax|quant_map|nested_\w+|quant_state\..*)$"
)
_SHARD = re.compile(r"[^/\\:\x00-\x1f]{0,200}\.safetensors")
_OTHER_FORMATS = re.compile(r".*\.(bin|pt|pth|ckpt|gguf|h5|msgpack|npz)")


class Place(NamedTuple):
    """A stored tensor: its name in the file, and the file."""

    name: str
    file: str


class Weights:
    """The tensors in the safetensors files of a checkpoint, by the family's canonical names.

    Tensors of the canonical names `unused` (a tied output layer), and of names that begin with one of `spare`, are
    ignored.
    """

    def __init__(
        self,
        files: Files,
        unused: Set[str] = frozenset(),
        family: Family = DEFAULT_FAMILY,
        spare: tuple[str, ...] = (),
    ) -> None:
        self._files = files
        self._canonical_name = family.canonical_name
        self._unused = unused
        self._spare = spare

    @property
    def shards(self) -> list[str]:
        """The names of all weight files, present or missing."""
        return [SINGLE] if self._index is None else sorted(set(self._index.values()))

    def tensors(self, expected: Mapping[str, torch.Size], prefixes: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        """The expected tensors in their stored dtype, one at a time, sorted by canonical name.

        `expected` maps canonical names to shapes. All are checked before the first is read: raises `UserError` if one
        is missing, has another shape or is quantised, or if another tensor's name begins with one of `prefixes`.
        """
        places = self.places(expected, prefixes)
        with ExitStack() as stack:
            opened = {file: stack.enter_context(self._opened(file)) for file in {p.file for p in places.values()}}
            for name in sorted(places):
                yield name, self._read(opened[places[name].file], places[name])

    def by_file(self, expected: Mapping[str, torch.Size], prefixes: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
        """As `tensors`, but file by file, so that only one is open at a time."""
        places = self.places(expected, prefixes)
        for file in sorted({place.file for place in places.values()}):
            with self._opened(file) as tensors:
                for name, place in places.items():
                    if place.file == file:
                        yield name, self._read(tensors, place)

    def places(self, expected: Mapping[str, torch.Size], prefixes: tuple[str, ...]) -> dict[str, Place]:
        """The place of each expected tensor, with the checks of `tensors`."""
        places: dict[str, Place] = {}
        for raw, file in sorted(self._weight_map.items()):
            name = self._canonical_name(raw)
            spare = name in self._unused or name.startswith(self._spare)
            if not name.startswith(prefixes) or name.endswith(_BUFFERS) or spare:
                continue
            if _QUANTISED.search(raw):
                raise self._quantised(f"{cut(raw)} is a tensor of quantised weights")
            if name in places:
                raise self._files.error(f"{cut(places[name].name)} and {cut(raw)} are the same tensor; expected one")
            places[name] = Place(raw, file)
        self._check_complete(sorted({place.file for place in places.values()}))
        if missing := sorted(expected.keys() - places.keys()):
            raise self._files.error(f"missing tensors in the weights: {some(missing)}; the checkpoint is not complete")
        if unexpected := sorted(places.keys() - expected.keys()):
            raise self._files.error(
                f"unexpected tensors in the weights: {some(unexpected)}; config.json does not describe them"
            )
        for file in sorted({place.file for place in places.values()}):
            self._check_headers(file, {n: p for n, p in places.items() if p.file == file}, expected)
        return places

    def check_names(self, expected: Mapping[str, torch.Size]) -> None:
        """Check the weights by names in the index only, so that no shard is fetched.

        Raises `UserError` for missing shards, missing tensors and quantised tensors.
        """
        if self._index is None:
            return
        for raw in self._index:
            if _QUANTISED.search(raw):
                raise self._quantised(f"{cut(raw)} is a tensor of quantised weights")
        self._check_complete(self.shards)
        if missing := sorted(expected.keys() - set(map(self._canonical_name, self._index))):
            raise self._files.error(f"missing tensors in {INDEX}: {some(missing)}; the checkpoint is not complete")

    def dtype_of(self, name: str) -> str:
        """The stored dtype of the tensor of that canonical name, such as "BF16"; empty if there is no such tensor."""
        for raw, file in self._weight_map.items():
            if self._canonical_name(raw) == name:
                with self._opened(file) as tensors:
                    return tensors.get_slice(raw).get_dtype() if raw in tensors.keys() else ""  # noqa: SIM118
        return ""

    @cached_property
    def _index(self) -> dict[str, str] | None:
        """The shard of each tensor by its stored name; None if there is a single file."""
        if self._files.has(SINGLE):
            return None
        index = self._files.json(INDEX, INDEX_BYTES)
        if index is None:
            self._refuse_other_formats()
            return None  # opening the single file will report that it is missing
        where = index.get("weight_map")
        if not isinstance(where, dict) or not where:
            raise self._files.error(f"{INDEX} has no weight_map; download it again")
        for file in where.values():
            if not isinstance(file, str) or not _SHARD.fullmatch(file):
                raise self._files.error(
                    f"{INDEX} names {shown(file)}, expected the name of a .safetensors file beside it; download it "
                    "again, and trust it only if its origin is trusted"
                )
        return where

    def _refuse_other_formats(self) -> None:
        others = [name for name in self._files.names() if _OTHER_FORMATS.fullmatch(name)]
        if others:
            raise self._files.error(
                f"its weights are in {some(others)}, expected safetensors; convert them: load the model with "
                "transformers and save_pretrained it"
            )

    @cached_property
    def _weight_map(self) -> dict[str, str]:
        """The file of each tensor by its stored name."""
        if self._index is not None:
            return self._index
        with self._opened(SINGLE) as tensors:
            return dict.fromkeys(tensors.keys(), SINGLE)

    def _check_complete(self, files: list[str]) -> None:
        missing = [file for file in files if not self._files.has(file)]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            raise self._files.error(
                f"{some(missing)} {verb} missing, {len(missing)} of the {len(self.shards)} shards that {INDEX} names; "
                "download it again"
            )

    def _check_headers(self, file: str, places: Mapping[str, Place], expected: Mapping[str, torch.Size]) -> None:
        """Check shapes and dtypes of the tensors in one file, without reading them."""
        with self._opened(file) as tensors:
            there = set(tensors.keys())
            for name, place in places.items():
                if place.name not in there:
                    raise self._files.error(
                        f"{file} has no {cut(place.name)}, which {INDEX} looks for there: its shards are not of one "
                        "model; download it again"
                    )
                header = tensors.get_slice(place.name)
                if (dtype := header.get_dtype()) not in _DTYPES:
                    raise self._quantised(f"{cut(place.name)} is {dtype}")
                got, wanted = list(header.get_shape()), list(expected[name])
                if got == wanted:
                    continue
                if name.endswith(_VOCABULARY) and len(got) == 2 and got[1:] == wanted[1:]:
                    raise self._files.error(
                        f"{place.name} has {got[0]} rows and vocab_size in config.json is {wanted[0]}: the embeddings "
                        f"were resized and the settings were not; set vocab_size of text_config to {got[0]}"
                    )
                raise self._files.error(
                    f"{cut(place.name)} has the shape {shown(got)}, and config.json asks for {wanted}"
                )

    def _quantised(self, what: str) -> Exception:
        return self._files.error(f"{what}; quantised weights are not supported, use the original checkpoint")

    def _read(self, tensors: Any, place: Place) -> Tensor:
        try:
            return tensors.get_tensor(place.name)
        except (OSError, SafetensorError, RuntimeError, MemoryError, ValueError) as error:
            raise self._broken(place.file, error) from error

    @contextmanager
    def _opened(self, name: str) -> Iterator[Any]:
        path = self._files.path(name)
        if path is None:
            raise self._files.error(f"{name} is missing; expected the weights in {SINGLE}, or in shards with {INDEX}")
        try:
            self._files.refuse_pointer(name, path)
            tensors = safe_open(path, framework="pt")
        except (OSError, SafetensorError, RuntimeError, MemoryError) as error:
            raise self._broken(name, error) from error
        with tensors as opened:
            yield opened

    def _broken(self, name: str, error: BaseException) -> Exception:
        if out_of_memory(error):
            return self._files.no_memory()
        return self._files.error(f"{name} is truncated or broken ({first_line(error)}); download it again")
