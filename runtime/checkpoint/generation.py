"""generation_config.json: stop tokens, and a note of the settings that this runtime ignores.

transformers' `generate` applies all settings. Here only stop tokens are applied; the caller chooses the sampling, and
there are no penalties, beams or forbidden tokens. The note names the ignored fields that would change answers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from earlytom.errors import UserError
from earlytom.numbers import shown, whole
from runtime.checkpoint.files import Files, some

if TYPE_CHECKING:
    from transformers import GenerationConfig

FILE = "generation_config.json"
_TOP_K = 50  # transformers' default when sampling
# The values of each field that leave `generate` unchanged, besides None.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "repetition_penalty": (1.0,),
    "encoder_repetition_penalty": (1.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_new_tokens": (0,),
    "min_length": (0,),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "force_words_ids": ([],),
    "sequence_bias": ({}, []),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0,),
    "guidance_scale": (1,),
    "exponential_decay_length_penalty": (),
    "dola_layers": (),
    "constraints": ([],),
    "stop_strings": ([], ""),
    "max_time": (),
    "max_new_tokens": (),
    "watermarking_config": (),
    "renormalize_logits": (False,),
    "remove_invalid_values": (False,),
}
_SAMPLING_ONLY = {"typical_p": (1.0,), "min_p": (0,), "top_h": (), "epsilon_cutoff": (0,), "eta_cutoff": (0,)}
_BEAMS_ONLY = {"length_penalty": (1.0,), "diversity_penalty": (0,)}


def read_generation(files: Files) -> dict[str, Any]:
    """The fields of generation_config.json; empty if there is no such file."""
    return files.json(FILE) or {}


def left_out(raw: dict[str, Any]) -> str | None:
    """The settings of generation_config.json that this runtime ignores, in one line; None if there are none."""
    fields = dict(_NEUTRAL)
    sampling = bool(raw.get("do_sample"))
    if sampling:
        fields |= _SAMPLING_ONLY
    if raw.get("num_beams") not in (None, 1):
        fields |= _BEAMS_ONLY
    asked = [f"{n} {shown(raw[n])}" for n, usual in fields.items() if raw.get(n) is not None and raw[n] not in usual]
    parts = []
    if asked:
        parts.append(f"asks for {some(asked)}, which this runtime leaves out")
        if raw.get("max_new_tokens") is not None:
            parts[0] += " (--max-new-tokens has a value of its own)"
    if sampling:
        flags, arguments = [], []
        for name, usual in (("temperature", 1.0), ("top_k", _TOP_K), ("top_p", 1.0)):
            value = usual if raw.get(name) is None else raw[name]
            flags.append(f"--{name.replace('_', '-')} {_short(value)}")
            arguments.append(f"{name}={_short(value)}")
        parts.append(
            f"samples, and answers here are greedy unless asked otherwise: give {' '.join(flags)}, or "
            f"Sampling({', '.join(arguments)})"
        )
    return None if not parts else f"{FILE} {'; it '.join(parts)}"


def generation_config(files: Files, config: Any) -> GenerationConfig:
    """transformers' generation settings with the stop tokens only. Raises `UserError` for invalid ones."""
    from transformers import GenerationConfig

    raw = read_generation(files)
    stops = raw.get("eos_token_id", getattr(config.text_config, "eos_token_id", None))
    try:
        for one in stops if isinstance(stops, list) else [stops]:
            if one is not None:
                whole("eos_token_id", one, 0, config.text_config.vocab_size - 1)
    except UserError as error:
        raise files.error(f"{FILE}: {error}") from error
    return GenerationConfig(eos_token_id=stops)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, int | float) and not isinstance(value, bool) else shown(value)
