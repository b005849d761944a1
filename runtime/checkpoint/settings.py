"""config.json: parses it to a configuration that this project can run, or refuses it in one line.

Numbers are checked before transformers sees them: it accepts any, and allocates lists or gigabytes by some.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from earlytom.errors import UserError
from earlytom.families import FAMILIES, SIZES, TITLES, Family
from earlytom.numbers import real, shown, whole
from runtime.checkpoint.files import Files

CONFIG = "config.json"
_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_TEXT_SIZES = SIZES | {
    "num_key_value_heads": 1 << 10,
    "head_dim": 1 << 12,
    "vocab_size": 1 << 22,
    "max_position_embeddings": 1 << 27,
}
_MAY_BE_PAIRS = ("image_size", "patch_size")
_MAY_BE_NULL = ("head_dim", "num_key_value_heads")


def read_config(files: Files) -> tuple[dict[str, Any], Any]:
    """config.json in transformers' form, and transformers' configuration from it.

    Raises `UserError` for what this project cannot run: an adapter, quantised weights, another family, absurd sizes.
    """
    raw = files.json(CONFIG)
    _refuse_adapter(files, raw)
    if raw is None:
        raise files.error(f"it has no {CONFIG}; expected the folder of a {TITLES} checkpoint")
    family = next((one for one in FAMILIES.values() if one.describes(raw)), None)
    if family is None:
        known = ", ".join(f"{name!r} ({one.title})" for name, one in FAMILIES.items())
        raise files.error(f"model family {shown(raw.get('model_type'))} is not supported; supported is {known}")
    raw = _translated(files, raw, family)
    sections = {name: _section(files, raw, name) for name in ("vision_config", "text_config")}
    for where in (raw, *sections.values()):
        if where.get("quantization_config"):
            raise files.error("quantised weights are not supported; use the original checkpoint")
    for name, sizes in (("vision_config", family.vision_sizes), ("text_config", _TEXT_SIZES)):
        _check_sizes(files, name, sections[name].get, {size: sizes[size] for size in sizes if size in sections[name]})
    try:
        family.check(raw)
    except UserError as error:
        raise files.error(str(error)) from error
    config = _parse(files, raw, family)
    _check_vision(files, config.vision_config, family)
    _check_text(files, config.text_config)
    for name in family.activations:
        _check_activation(files, name, getattr(config, name))
    text: Any = config.text_config
    for name in family.token_ids:
        _in(files, name, lambda name=name: whole(name, getattr(config, name), 0, text.vocab_size - 1))  # type: ignore[misc]
    _in(files, family.layer_setting, lambda: family.geometry(config))
    return raw, config


def read_flag(files: Files, raw: dict[str, Any], name: str, usual: bool) -> bool:
    """A flag of config.json; `usual` is its default."""
    value = raw.get(name, usual)
    if not isinstance(value, bool):
        raise files.error(f"{name} in {CONFIG} must be true or false, got {shown(value)}")
    return value


def _refuse_adapter(files: Files, raw: dict[str, Any] | None) -> None:
    found = next((name for name in _ADAPTERS if files.has(name)), None)
    if found is None:
        return
    base = "its base"
    if files.has(_ADAPTERS[0]) and isinstance(given := (files.json(_ADAPTERS[0]) or {}), dict):
        base = shown(given.get("base_model_name_or_path") or base)
    remedy = "load both with peft, call merge_and_unload(), save_pretrained the result and give that folder"
    if raw is None:
        raise files.error(f"it is an adapter for {base} ({found}), not a whole checkpoint; {remedy}")
    raise files.error(
        f"an adapter ({found}) lies beside the weights and would be left out; {remedy}, or move the adapter away if it "
        "is merged already"
    )


def _translated(files: Files, raw: dict[str, Any], family: Family) -> dict[str, Any]:
    try:
        return family.translated(raw)
    except UserError as error:
        raise files.error(f"{CONFIG}: {error}") from error


def _section(files: Files, raw: dict[str, Any], name: str) -> dict[str, Any]:
    section = raw.get(name)
    if not isinstance(section, dict):
        what = "has no" if name not in raw else f"has {shown(section)} for"
        raise files.error(f"{CONFIG} {what} {name}, expected an object of settings; download it again")
    return section


def _parse(files: Files, raw: dict[str, Any], family: Family) -> Any:
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # it may log pages about a value, refused or not
    try:
        config = family.config(raw)
    except Exception as error:  # the library refuses values with errors of several types
        what = " ".join(str(error).split())  # its first line names the field, the second what is wrong
        raise files.error(f"{CONFIG} is not a valid configuration ({what[:240]})") from error
    finally:
        logging.set_verbosity(verbosity)
    tower = getattr(config.vision_config, "model_type", None)
    if tower not in family.towers:
        known = ", ".join(map(repr, family.towers))
        raise files.error(f"vision tower {shown(tower)} is not supported; supported is {known}")
    return config


def _check_vision(files: Files, vision: Any, family: Family) -> None:
    of = "vision_config"
    _check_sizes(files, of, lambda name: getattr(vision, name, None), family.vision_sizes)
    if vision.num_channels != 3:
        raise files.error(f"num_channels of {of} must be 3 (red, green, blue), got {vision.num_channels}")
    if vision.hidden_size % vision.num_attention_heads:
        raise files.error(f"{of} has {vision.num_attention_heads} heads, which do not divide {vision.hidden_size}")
    if any(patch > side for patch, side in zip(_pair(vision.patch_size), _pair(vision.image_size), strict=True)):
        raise files.error(f"{of} has patches of {vision.patch_size} in images of {vision.image_size} pixels")
    _in(files, of, lambda: real("layer_norm_eps", vision.layer_norm_eps, 0, low_open=True))
    _check_activation(files, f"hidden_act of {of}", vision.hidden_act)


def _check_text(files: Files, text: Any) -> None:
    of = "text_config"
    sizes = {name: most for name, most in _TEXT_SIZES.items() if name in SIZES or getattr(text, name, None) is not None}
    _check_sizes(files, of, lambda name: getattr(text, name, None), sizes | {"vocab_size": _TEXT_SIZES["vocab_size"]})
    heads, width = text.num_attention_heads, text.hidden_size
    shared = getattr(text, "num_key_value_heads", None) or heads
    if heads % shared:
        raise files.error(f"{of} has {heads} heads, of which {shared} key/value heads cannot serve equal shares")
    if not getattr(text, "head_dim", None) and (width % heads or width // heads % 2):
        raise files.error(f"{of} has {heads} heads, which do not divide {width} into even widths")
    if (epsilon := getattr(text, "rms_norm_eps", None)) is not None:
        _in(files, of, lambda: real("rms_norm_eps", epsilon, 0, low_open=True))
    if (kind := getattr(text, "hidden_act", None)) is not None:
        _check_activation(files, f"hidden_act of {of}", kind)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = getattr(text, name, None)
        for one in ids if isinstance(ids, list) else [ids]:
            if one is not None:
                _in(files, of, lambda name=name, one=one: whole(name, one, -1, text.vocab_size - 1))  # type: ignore[misc]
    if getattr(text, "pad_token_id", None) == -1:  # "none", as some write it
        text.pad_token_id = None


def _check_sizes(files: Files, section: str, get: Callable[[str], Any], most: Mapping[str, int]) -> None:
    for name, limit in most.items():
        value = get(name)
        if value is None and name in _MAY_BE_NULL:
            continue
        for one in _pair(value) if name in _MAY_BE_PAIRS else (value,):
            _in(files, section, lambda name=name, one=one, limit=limit: whole(name, one, 1, limit))  # type: ignore[misc]


def _pair(value: Any) -> tuple[Any, Any]:
    """(height, width) of a setting that may be one number for both."""
    return (value[0], value[1]) if isinstance(value, list | tuple) and len(value) == 2 else (value, value)


def _check_activation(files: Files, name: str, kind: Any) -> None:
    from transformers.activations import ACT2FN

    if not isinstance(kind, str) or kind not in ACT2FN:
        raise files.error(f"{name} must be an activation that transformers knows, such as 'gelu', got {shown(kind)}")


def _in(files: Files, section: str, check: Callable[[], Any]) -> None:
    """Run a check of one number, and raise its UserError as one about config.json."""
    try:
        check()
    except UserError as error:
        raise files.error(f"{CONFIG}: {section}: {error}") from error
