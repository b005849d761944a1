"""vLLM as the decoder, in this process or as a server: many answers at a time.

`open_decoder` opens the decoder that `--decoder` names. Prompts go to vLLM as embeddings that include visual tokens, so
it needs to support no video model; it loads the language model alone, from the folder that
`python -m runtime.extract_decoder` writes.
"""

from runtime.decoder.vllm.open import open_decoder

__all__ = ["open_decoder"]
