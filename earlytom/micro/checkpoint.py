"""Writes the bundled checkpoint: configuration, safetensors, tokenizer, chat template and preprocessing, as on the hub.

`builder.micro.train` trains the weights; `builder.micro.card` writes the model card.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from earlytom.families.bundled import CHAT_TEMPLATE, CONTEXT, VOCABULARY, preprocessing
from earlytom.families.tokens import SPECIAL_TOKENS
from earlytom.micro import ACCURACY_FILE, TRAINING_FILE
from earlytom.micro.corpus import sentences
from earlytom.micro.progress import without_progress_bars
from earlytom.micro.random_model import greedy, make_tokenizer


def build_tokenizer() -> Qwen2Tokenizer:
    """A tokenizer with Qwen2's pipeline and a small vocabulary trained on `corpus.sentences()`."""
    pipeline = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pipeline.train_from_iterator(sentences(), trainer)
    model = json.loads(pipeline.to_str())["model"]
    tokenizer = make_tokenizer(model["vocab"], [tuple(pair) for pair in model["merges"]], CONTEXT)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def write_checkpoint(out: Path, model: Any, training: dict[str, Any], *, trained: bool = True) -> None:
    """Write the whole checkpoint but its card into the folder `out`, replacing files of the same names.

    Args:
        out: the folder; made if it does not exist.
        model: the model, on the CPU; its weights are written in half precision.
        training: how it was trained (`training.json`, of which `builder.micro.card` makes the model card).
        trained: False marks weights whose answers mean nothing.
    """
    model.config.earlytom_trained = trained
    model.generation_config = greedy(model.config)
    with without_progress_bars():
        model.half().save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it readable by its owner only
    build_tokenizer().save_pretrained(out)
    for name, content in {**preprocessing(), TRAINING_FILE: training}.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    (out / ACCURACY_FILE).unlink(missing_ok=True)  # measured with the previous weights
