"""Builds a vision engine from a checkpoint: `python -m builder.build --ratio 0.3 --fp16`."""
