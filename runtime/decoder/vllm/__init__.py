"""vLLM as the decoder: many answers at a time, in this process or behind an address.

`open_decoder` makes one of what `--decoder` says. vLLM gets prompts as embeddings, with the visual tokens in them, so
it needs to know nothing of videos; the language model alone, in a folder that it loads, is what
`python -m runtime.extract_decoder` writes.
"""

from runtime.decoder.vllm.open import open_decoder

__all__ = ["open_decoder"]
