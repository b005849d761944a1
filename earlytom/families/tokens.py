"""Texts of special tokens, as in Qwen2's tokenizer and the families that use it."""

END, START, STOP = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
IMAGE, VIDEO = "<image>", "<video>"
SPECIAL_TOKENS = (END, START, STOP, IMAGE, VIDEO)
"""Those of LLaVA-OneVision in the order of their ids, which follow one another."""
