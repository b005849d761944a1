"""Parses `--decoder`: torch, torch-tensorrt, vllm, vllm:FOLDER, or the address of a vLLM server.

Strings only, so that a command line refuses an invalid one without slow imports.
"""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from earlytom.errors import UserError
from earlytom.numbers import shown
from runtime.choices import DECODERS

INSIDE = "vllm"
PLACES = (
    "vLLM takes embeddings alone, no positions or attention bias: use --no-bias --positions consecutive, or --decoder "
    "torch"
)
FORMS = f"{', '.join(DECODERS)}, {INSIDE}, {INSIDE}:FOLDER or http://HOST:PORT/v1"


@dataclass(frozen=True)
class DecoderAddress:
    """The address of a vLLM server.

    Attributes:
        url: up to /v1, without a trailing slash.
        model: name of one of its models; None for the only one.
    """

    url: str
    model: str | None = None

    @property
    def secure(self) -> bool:
        return self.url.startswith("https:")


def decoder_named(text: object) -> str:
    """Return `text` if it names a decoder, else raise UserError."""
    if isinstance(text, str) and (text in DECODERS or folder_of(text) is not None or address_of(text) is not None):
        return text
    raise UserError(f"unknown decoder {shown(text)}: expected {FORMS} (--decoder)")


def by_vllm(name: str) -> bool:
    """Whether vLLM decodes."""
    return name not in DECODERS


def folder_of(name: str) -> str | None:
    """The folder in "vllm:FOLDER", empty for "vllm"; None for every other decoder."""
    word, colon, folder = name.partition(":")
    return folder if word == INSIDE and bool(colon) == bool(folder) else None


def address_of(name: str) -> DecoderAddress | None:
    """The address in "http://HOST:PORT/v1[#MODEL]" or "https://..."; None for every other decoder."""
    if not name.startswith(("http://", "https://")):
        return None
    refused = UserError(f"--decoder {shown(name)} is no address of a vLLM server: give one as http://HOST:8000/v1")
    try:
        found = urlsplit(name)
        host, _ = found.hostname, found.port
    except ValueError as error:
        raise refused from error
    if not host or not name.isascii() or not name.isprintable() or " " in name:
        raise refused
    if found.username is not None or found.password is not None or found.query:
        raise UserError(f"--decoder {shown(host)}: leave out user, password and query; a key goes into a file")
    path = found.path.rstrip("/")
    return DecoderAddress(f"{found.scheme}://{found.netloc}{path}", found.fragment or None)
