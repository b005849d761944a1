"""Decoding the videos of strangers, each in a process that it can break without breaking anything else."""

from runtime.serve.decoding.decoders import Decoders

__all__ = ["Decoders"]
