"""The rows of the published methods (`earlytom.methods.published`), each with its published settings.

As the bundled model is not the published one, these were chosen:

* HoliTom's threshold is 0.65 up to a ratio of 0.1 and 0.8 above, as released; its inner merging is at the released
  share of the depth (18 of 28 layers). FastV drops tokens before layer 2, as released;
* VQToken has as many clusters as the ratio gives (above about 64 it is outside the method), and in a second row an
  adaptive number;
* ToMe in the tower merges the same number of each frame's tokens after each layer, so that half of them are left;
  TempMe joins two clips at each default merge layer of EarlyTom. Both are then put back on the grid and merged to the
  ratio;
* DyCoke keeps at least a quarter, so it is measured at that and at its released ratio, 0.475;
* the decoder is told original positions for methods that use them (FastVID, EVS), and nothing else.

A table has either the corrected forms or the released ones (`faithful`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from builder.evaluation.passes import ClipPasses
from builder.evaluation.ways.row import NOTHING, Row, Visual, seen
from earlytom.config import EarlyTomConfig
from earlytom.errors import UserError
from earlytom.method import Method
from earlytom.methods import by_name
from earlytom.methods.published import NEED_TRAINING
from runtime.text.places import Placing

Settings = dict[str, Any]
DEEP = 18 / 28  # layer of HoliTom's inner merging, as a share of the depth
EARLY = 2  # the layer before which FastV drops tokens


class Way(NamedTuple):
    """A published method as measured.

    Attributes:
        method: its name in `earlytom.methods`.
        title: in tables.
        settings: for a clip at a ratio, besides ratio and form.
        ratio: a fixed ratio, or None for the one asked for.
        released: whether it has a released form.
        told: the decoder's side information.
    """

    method: str
    title: str
    settings: Callable[[ClipPasses, float], Settings] = lambda clip, ratio: {}
    ratio: float | None = None
    released: bool = True
    told: Placing = NOTHING


def ways(depth: int, text_layers: int) -> dict[str, Way]:
    """All by the names of their rows, for a tower of `depth` layers and a language model of `text_layers`."""
    layers = EarlyTomConfig.layers_for(depth)
    deep = min(max(1, round(DEEP * text_layers)), text_layers - 1)
    early = min(EARLY, text_layers - 1)

    def holitom(clip: ClipPasses, ratio: float) -> Settings:
        return {"tau": 0.65 if ratio <= 0.1 else 0.8}

    def tome(clip: ClipPasses, ratio: float) -> Settings:
        return {"depth": depth, "each": clip.patches // (2 * depth)}

    def tempme(clip: ClipPasses, ratio: float) -> Settings:
        return {"depth": depth, "merge_layers": layers, "groups": (2,) * len(layers)}

    return {
        "holitom": Way("holitom", "HoliTom", holitom),
        "holitom-inner": Way(
            "holitom", f"HoliTom, inner {deep}", lambda clip, ratio: holitom(clip, ratio) | {"inner_layer": deep}
        ),
        "fastv": Way("fastv", f"FastV, layer {early}", lambda clip, ratio: {"inner_layer": early}, released=False),
        "visionzip": Way("visionzip", "VisionZip"),
        "fastvid": Way("fastvid", "FastVID", told=Placing(original=True)),
        "flashvid": Way("flashvid", "FlashVID, by description"),
        "unicomp": Way("unicomp", "UniComp, by description", released=False),
        "unified": Way("unified", "unified, by description", released=False),
        "evs": Way("evs", "EVS, as in vLLM", released=False, told=Placing(original=True)),
        "vidcom2": Way("vidcom2", "VidCom2, by description", released=False),
        "tome": Way("tome", "ToMe, behind the projector"),
        "tome-tower": Way("tome", "ToMe, in the tower too", tome),
        "tempme": Way("tempme", "TempMe schedule, untrained", tempme),
        "vqtoken": Way("vqtoken", "VQToken core"),
        "vqtoken-adaptive": Way(
            "vqtoken", "VQToken core, adaptive K", lambda clip, ratio: {"clusters": "adaptive"}, ratio=1.0
        ),
        "bvllm-style": Way("bvllm-style", "B-VLLM-style, no Q-Formers"),
        "dycoke-least": Way("dycoke", "DyCoke merging, 0.25", ratio=0.25),
        "dycoke": Way("dycoke", "DyCoke merging, 0.475", ratio=0.475),
    }


def compared_rows(depth: int, text_layers: int, *, faithful: bool = False) -> list[Row]:
    """The rows in one form; with `faithful` only methods that have a released form."""
    form = ", released form" if faithful else ""
    return [
        Row(name, f"{way.title}{form}", "compared", way.ratio is None, _visual(way, faithful), way.told)
        for name, way in ways(depth, text_layers).items()
        if way.released or not faithful
    ]


def refuse_untrained(word: str) -> None:
    """Raise UserError for a published method that needs trained modules."""
    if word in NEED_TRAINING:
        raise UserError(f"--methods {word}: it needs {NEED_TRAINING[word]}")


def _visual(way: Way, faithful: bool) -> Callable[[ClipPasses, float], Visual]:
    def method(clip: ClipPasses, ratio: float) -> Method:
        given = {"retention_ratio": way.ratio or ratio, "faithful": faithful}
        return by_name(way.method, given | way.settings(clip, ratio))

    return lambda clip, ratio: seen(clip, method(clip, ratio))
