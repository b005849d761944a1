"""The tokenizer of a checkpoint, with the chat template that its processor would use."""

from __future__ import annotations

import json
import logging
import warnings
from typing import TYPE_CHECKING, Any

from earlytom.families import family_of
from runtime.checkpoint.files import TOKENIZER_BYTES, Files, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# All files that tokenisation depends on.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json", "processor_config.json")
_TEMPLATE_BYTES = 1 << 20


def read_tokenizer(files: Files, config: Any) -> PreTrainedTokenizerBase:
    """The tokenizer in `files`; raises `UserError` as `runtime.checkpoint.load_tokenizer` does."""
    from transformers import AutoTokenizer

    family = family_of(config)
    visual = family.visual_token
    if not files.has("tokenizer.json") and not files.has("vocab.json"):
        raise files.error(
            "it has neither tokenizer.json nor vocab.json; expected the tokenizer's files beside the weights"
        )
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        files.bytes(name, TOKENIZER_BYTES)
    for name in ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        files.json(name)
    template = _template(files)
    library = logging.getLogger("transformers")
    level = library.level
    library.setLevel(logging.ERROR)  # its long warnings about tokenizers are of no use to the user
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):  # about config.json
            tokenizer = AutoTokenizer.from_pretrained(
                files.folder(["config.json", *TOKENIZER_FILES, *TEMPLATE_FILES]),
                local_files_only=True,
                trust_remote_code=False,
            )
        wanted = family.video_token_id(config)
        if family.own_visual_token:
            _add(tokenizer, visual, wanted)
        known = tokenizer.get_added_vocab().get(visual)
        # A video token other than the visual token is replaced before the model sees it: its id may be too large.
        ids = (id for text, id in tokenizer.get_vocab().items() if text == visual or text != family.video_token)
        largest = max(ids, default=0)
        tokenizer(visual, verbose=False)  # fails on invalid settings
    except Exception as error:  # the tokenizers library raises nothing narrower for a broken file
        raise files.error(f"its tokenizer cannot be read ({first_line(error)}); download it again") from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":  # a failed assertion in the Rust library
            raise
        raise files.error(f"its tokenizer cannot be read ({first_line(error)}); download it again") from error
    finally:
        library.setLevel(level)
    if largest >= (size := config.text_config.vocab_size):
        raise files.error(
            f"its tokenizer has ids up to {largest}, and vocab_size in config.json is {size}; they are of two models"
        )
    if template is not None:
        tokenizer.chat_template = template
    if not tokenizer.chat_template and family.chat_template() is None:
        raise files.error("it has no chat template; expected chat_template.jinja or chat_template.json")
    if known != wanted:
        raise files.error(f"its tokenizer has the id {known} for {visual}, and config.json says {wanted}")
    return tokenizer


def _add(tokenizer: Any, text: str, id: int) -> None:
    """Add the special token `text` with that id; does nothing if there is such a token or the id is taken."""
    from tokenizers import Tokenizer

    vocabulary = tokenizer.get_vocab()
    if text in vocabulary or id in vocabulary.values():
        return
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"][text] = id  # an added token gets its id here, else the next free one
    added = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    backend["added_tokens"].append({"id": id, "content": text, **added})
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(backend))


def _template(files: Files) -> Any:
    """The processor's own template; None if the tokenizer itself reads the one the processor would use."""
    files.bytes("chat_template.jinja", _TEMPLATE_BYTES)
    # In the order of transformers' processor; chat_template.jinja comes last, and the tokenizer reads it itself.
    for name in ("processor_config.json", "chat_template.json"):
        if template := (files.json(name) or {}).get("chat_template"):
            if not isinstance(template, str):
                raise files.error(f"chat_template in {name} is no text; download it again")
            return template
    return None
