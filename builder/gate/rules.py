"""How the gate checks a method's decisions: which ones a graph took, whether two runs took the same, and whether the
method's rule repeats them from the graph's own values.

`rule_of` gives the `Rule` for some settings. A rule reads the values of its method's trace
(`earlytom.spans.trace_names`); the limits are in `builder.gate.limits`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from builder.gate.limits import PLAN_TOLERANCE
from builder.gate.runs import Arrays
from earlytom.cells.config import CellsConfig
from earlytom.cells.merge import CellPlan, merge_marks
from earlytom.config import EarlyTomConfig
from earlytom.families import Vision
from earlytom.method import Method, State
from earlytom.methods import method_of
from earlytom.methods.cells import Cells, CellsState, each_its_own, marks
from earlytom.methods.earlytom import EarlyTom
from earlytom.methods.published.compressing import Exported
from earlytom.settings import MethodSettings
from earlytom.untouched import ToMeConfig, UntouchedConfig
from runtime.engine import layout


class Rule(ABC):
    """One method's decisions.

    Attributes:
        decisions: names (without the layer) of the traced values that are its decisions at a merge; the first has
            shape [F', F].
        videos, videos_called: name of the value that tells videos apart, likewise; the report's word for it.
        same_tokens: least share of token choices to be repeated; below 1 where choices depend on each other.
        same_plans: largest difference of the repeated merge weights.
    """

    decisions: tuple[str, ...]
    videos: str
    videos_called: str
    same_tokens: float = 1.0
    same_plans: float = PLAN_TOLERANCE

    def __init__(self, config: MethodSettings) -> None:
        self.config, self.layers = config, config.merge_layers

    def own(self) -> Method:
        """The method, deciding by itself."""
        return method_of(self.config)

    @abstractmethod
    def forced(self, taken: Arrays) -> Method:
        """The method, made to take the decisions that a run of the graph took, in their order."""

    def kept_frames(self, out: Arrays) -> list[int]:
        """For each remaining frame, the first of the clip's frames that it is made of."""
        first = np.arange(len(out["features"]))
        for layer in reversed(self.layers):
            first = (out[f"{self.decisions[0]}_{layer}"] > 0).argmax(1)[first]
        return first.tolist()

    @abstractmethod
    def repeat_plans(self, out: Arrays, vision: Vision) -> float:
        """The largest difference between the graph's merge weights and the rule's; 1 if shapes differ."""

    @abstractmethod
    def repeat_tokens(self, out: Arrays, frames: int, vision: Vision) -> Tensor:
        """The positions [N] that the rule chooses from the graph's features; `frames`: of the clip."""

    def same(self, a: Arrays, b: Arrays) -> bool:
        """Whether two runs took the same decisions."""
        plans = [f"{name}_{layer}" for layer in self.layers for name in self.decisions]
        if any(a[name].shape != b[name].shape for name in plans):  # the adaptive schedule kept other numbers
            return False
        alike = all(np.allclose(a[name], b[name], atol=1e-2) and _pattern(a[name], b[name]) for name in plans)
        others = [name for name in ("static", layout.POSITIONS) if name in a]
        return alike and all(np.array_equal(a[name], b[name]) for name in others)

    def kept_tokens(self, out: Arrays) -> set[tuple[int, int]]:
        """(frame of the clip, cell) of every kept token."""
        kept, per_frame = self.kept_frames(out), out["features"].shape[1]
        positions = out[layout.POSITIONS].tolist()
        return {(kept[p // per_frame], p % per_frame) for p in positions if 0 <= p // per_frame < len(kept)}


class EarlyTomRule(Rule):
    """See `Rule`."""

    decisions = ("weights",)
    videos, videos_called = "similarity", "similarities"
    config: EarlyTomConfig

    def forced(self, taken: Arrays) -> Method:
        return ForcedDecisions(self.config, taken)

    def repeat_plans(self, out: Arrays, vision: Vision) -> float:
        rule, worst = EarlyTom(self.config), 0.0
        for layer in self.layers:
            taken = torch.from_numpy(out[f"weights_{layer}"])
            wanted = None if self.config.schedule == "adaptive" else taken.shape[0]
            weights, _, _ = rule.plan(torch.from_numpy(out[f"similarity_{layer}"]), wanted)
            worst = max(worst, _difference(weights, taken))
        return worst

    def repeat_tokens(self, out: Arrays, frames: int, vision: Vision) -> Tensor:
        features, relevance, static = (torch.from_numpy(out[name]) for name in ("features", "relevance", "static"))
        return EarlyTom(self.config).keep(features, relevance, static, frames)[1]


class ForcedDecisions(EarlyTom):
    """Takes the decisions that a run of the graph took, in their order."""

    def __init__(self, config: EarlyTomConfig, taken: Arrays) -> None:
        super().__init__(config)
        self.weights = [torch.from_numpy(taken[f"weights_{layer}"]) for layer in config.merge_layers]
        self.static = torch.from_numpy(taken["static"])
        self.positions = torch.from_numpy(taken[layout.POSITIONS])
        self.taken = 0

    def plan(self, similarity: Tensor, frames_out: int | None) -> tuple[Tensor, Tensor, Tensor]:
        frames = similarity.shape[0]
        merging = self.taken < len(self.weights)
        weights = self.weights[self.taken] if merging else torch.eye(frames)
        self.taken += 1
        return weights, torch.zeros(frames, dtype=torch.int64), self.static

    def select(self, features: Tensor, received: Tensor, static: Tensor, places: int) -> tuple[Tensor, Tensor]:
        rows = features.flatten(0, 1)
        return rows[self.positions.clamp(0, len(rows) - 1)], self.positions  # a position out of range fails as a token

    def select_varying(
        self, features: Tensor, received: Tensor, static: Tensor, places: int, windows: int
    ) -> tuple[Tensor, Tensor]:
        return self.select(features, received, static, places)

    def standing(self, features: Tensor, positions: Tensor, state: State) -> tuple[Tensor, Tensor]:
        return super().standing(features, positions.clamp(0, features.shape[:2].numel() - 1), state)


class CellsRule(Rule):
    """See `Rule`. Weights that differ in the last bits are the same decision: they depend on 1 - cosine near 0."""

    decisions = ("member", "taken")
    videos, videos_called = "weights", "weights"
    same_tokens = 0.9  # each choice depends on those before it, so one near-tie changes what follows
    # The relative error of a weight is that of 1 - cosine, about 1e-7 over its value, which is 1e-4 for still cells.
    same_plans = 1e-3
    config: CellsConfig

    def forced(self, taken: Arrays) -> Method:
        return ForcedCells(self.config, taken)

    def repeat_plans(self, out: Arrays, vision: Vision) -> float:
        rule, worst = Cells(self.config), 0.0
        for layer in self.layers:
            hidden, taken = torch.from_numpy(out[f"hidden_{layer}"]), torch.from_numpy(out[f"weights_{layer}"])
            if self.config.schedule == "adaptive":
                wanted = rule.plan(hidden, None, vision.tower.prefix)
            elif taken.shape[1] == len(hidden):
                wanted = each_its_own(hidden)
            else:
                wanted = rule.plan(hidden, taken.shape[1], vision.tower.prefix)
            worst = max(worst, _difference(wanted.weights, taken))
        return worst

    def repeat_tokens(self, out: Arrays, frames: int, vision: Vision) -> Tensor:
        rule, features = Cells(self.config), torch.from_numpy(out["features"])
        state = rule.begin(vision, frames, features.device)
        assert isinstance(state, CellsState)
        for layer in self.layers:
            plan = CellPlan(*(torch.from_numpy(out[f"{name}_{layer}"]) for name in ("weights", "member", "taken")))
            cells = torch.from_numpy(out[f"hidden_{layer}"])[:, vision.tower.prefix :]
            state.cell_size, state.cell_time = merge_marks(plan, *marks(state, cells))
        return rule.choose(features, None, state)[1]


class ForcedCells(Cells):
    """Takes the decisions that a run of the graph took, in their order."""

    def __init__(self, config: CellsConfig, taken: Arrays) -> None:
        super().__init__(config)
        names = ("weights", "member", "taken")
        plans = [
            CellPlan(*(torch.from_numpy(taken[f"{name}_{layer}"]) for name in names)) for layer in config.merge_layers
        ]
        # In the budget schedule `Cells.after_layer` does not call `plan` where all frames stay.
        self.plans = [p for p in plans if config.schedule == "adaptive" or p.member.shape[0] < p.member.shape[1]]
        self.positions = torch.from_numpy(taken[layout.POSITIONS])

    def begin(self, vision: Vision, frames: int, device: torch.device) -> State:
        self.following = iter(self.plans)
        return super().begin(vision, frames, device)

    def plan(self, hidden: Tensor, frames_out: int | None, prefix: int) -> CellPlan:
        return next(self.following)

    def take(self, salient: Tensor, alike: Tensor, count: int) -> Tensor:
        return self.positions.clamp(0, len(salient) - 1)  # a position out of range fails as a token


class UntouchedRule(Rule):
    """See `Rule`: nothing is merged inside the tower; tokens are chosen from features and, if used, attention."""

    decisions = ()
    videos, videos_called = "features", "features"

    def __init__(self, config: UntouchedConfig) -> None:
        super().__init__(config)
        if isinstance(config, ToMeConfig):
            self.same_tokens = 0.9  # each merge depends on those before it, as with `CellsRule`

    def forced(self, taken: Arrays) -> Method:
        method = self._method()
        metric, attention = _seen(taken)
        return ForcedUntouched(method=method, metric=metric, attention=attention)

    def repeat_plans(self, out: Arrays, vision: Vision) -> float:
        return 0.0

    def repeat_tokens(self, out: Arrays, frames: int, vision: Vision) -> Tensor:
        features, attention = _seen(out)
        return self._method().by(features, attention, vision.own(features))[1]

    def _method(self) -> Exported:
        method = method_of(self.config)
        assert isinstance(method, Exported)  # true of every method with an `UntouchedConfig`
        return method


@dataclass(frozen=True, kw_only=True)
class ForcedUntouched(Exported):
    """Takes the graph's decisions, chosen from the graph's features and attention, but applies them to its own tokens.

    Attributes:
        method: the method that decides.
        metric, attention: [F, P, E] and [F, P] of the graph's run; None for a method without attention.
    """

    method: Exported
    metric: Tensor
    attention: Tensor | None

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.method.name

    def watched(self, depth: int) -> int | None:
        return self.method.watched(depth)

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        return self.by(features, self.attention, state.vision.own(self.metric))

    def by(self, features: Tensor, relevance: Tensor | None, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return self.method.by(features, relevance, metric)


def _seen(out: Arrays) -> tuple[Tensor, Tensor | None]:
    """The features and, if any, the attention of a run."""
    return torch.from_numpy(out["features"]), torch.from_numpy(out["relevance"]) if "relevance" in out else None


def rule_of(settings: MethodSettings) -> Rule:
    """The rule of a method, from its settings."""
    if isinstance(settings, UntouchedConfig):
        return UntouchedRule(settings)
    return EarlyTomRule(settings) if isinstance(settings, EarlyTomConfig) else CellsRule(settings)


def _pattern(a: NDArray[Any], b: NDArray[Any]) -> bool:
    return np.array_equal(a > 0, b > 0)


def _difference(wanted: Tensor, taken: Tensor) -> float:
    if wanted.shape != taken.shape:
        return 1.0
    worst = float((wanted - taken).abs().max())
    return worst if np.isfinite(worst) else 1.0
