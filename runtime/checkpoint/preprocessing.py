"""The preprocessing of video frames, from whichever file a checkpoint's processor stores it in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from earlytom.errors import UserError
from earlytom.families import FrameSampling, family_of, geometry
from earlytom.numbers import real, shown, whole
from runtime.checkpoint.files import Files

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_MOST_FRAMES = 1 << 16
_BICUBIC = 3


@dataclass(frozen=True)
class Preprocessing:
    """Preprocessing of a frame: resize to `size` (height, width), divide by 255, normalise by `mean` and `std`.

    `sampling`: the choice of a video's frames, as in `earlytom.families.Family`.
    """

    size: tuple[int, int]
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    sampling: FrameSampling = "ends"

    def settings(self) -> dict[str, Any]:
        """The settings in plain JSON types, without the default sampling."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("sampling", "ends")}

    def affine(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Scale and shift, fp32 [1, 3, 1, 1]: pixels (0 to 255) * scale + shift are normalised."""
        import torch

        mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (self.mean, self.std))
        return 1 / (255 * std), -mean / std


def read_preprocessing(files: Files, config: Any) -> tuple[Preprocessing, int]:
    """The preprocessing of video frames and the number of frames of a video (by default the family's).

    Both from the file that transformers' processor would use. Raises `UserError` for invalid settings.
    """
    processor = files.json("processor_config.json") or {}
    video = processor.get("video_processor") or files.json("video_preprocessor_config.json")
    raw = video or files.json("preprocessor_config.json") or processor.get("image_processor")
    family = family_of(config)
    raw = raw or family.prepares(config)
    if not raw:
        raise files.error("it has no preprocessor_config.json, so frames cannot be prepared for it; download it again")
    if not isinstance(raw, dict):
        raise files.error(f"its preprocessing settings are {shown(raw)}, expected an object; download them again")
    settings = family.preparation(raw)
    try:
        frames = 0 if not isinstance(video, dict) else settings.get("num_frames") or 0
        frames = whole("num_frames", frames, 0, _MOST_FRAMES) or family.frames
        size = geometry(config).size if family.any_size else _size(settings)  # theirs are limits
        found = Preprocessing(size, *_normalisation(settings), family.sampling)
    except UserError as error:
        raise files.error(f"its preprocessing settings cannot be used: {error}") from error
    if found.size != (wanted := geometry(config).size):
        got, takes = ("x".join(map(str, size)) for size in (found.size, wanted))
        raise files.error(f"it prepares frames of {got}, and its tower takes {takes}")
    return found, frames


def _size(raw: Mapping[str, Any]) -> tuple[int, int]:
    size = raw.get("size")
    if isinstance(size, dict):
        edge = size.get("shortest_edge")
        size = (size.get("height", edge), size.get("width", edge))
    pair = size if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2:
        raise UserError(f"size must be height and width, got {shown(size)}")
    height, width = (whole("size", edge, 1, 1 << 14) for edge in pair)
    return height, width


def _normalisation(raw: Mapping[str, Any]) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
    """Mean and standard deviation of each channel, after division by 255."""
    factor = raw.get("rescale_factor", 1 / 255) if raw.get("do_rescale", True) else 1.0
    if abs(real("rescale_factor", factor) * 255 - 1) > 1e-4:
        raise UserError(f"rescale_factor must be 1/255, got {shown(factor)}; other scales are not supported")
    if (resample := raw.get("resample", _BICUBIC)) != _BICUBIC:
        raise UserError(f"resample must be 3 (bicubic), got {shown(resample)}; other ways to resize are not supported")
    if not raw.get("do_normalize", True):
        return (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
    return _three("image_mean", raw.get("image_mean")), _three("image_std", raw.get("image_std"), above=0.0)


def _three(name: str, values: Any, above: float | None = None) -> tuple[float, float, float]:
    if not isinstance(values, list | tuple) or len(values) != 3:
        raise UserError(f"{name} must be three numbers, got {shown(values)}")
    red, green, blue = (real(name, value, above, low_open=True) for value in values)
    return red, green, blue
