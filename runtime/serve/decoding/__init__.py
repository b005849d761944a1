"""Decodes untrusted videos, each in its own isolated process."""

from runtime.serve.decoding.decoders import Decoders

__all__ = ["Decoders"]
