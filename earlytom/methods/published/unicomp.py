"""UniComp after its description, from the pure functions of `earlytom.unicomp`."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from earlytom.errors import UserError
from earlytom.method import State
from earlytom.methods.published.compressing import Compressing
from earlytom.numbers import real
from earlytom.unicomp import UniCompSettings, unicomp


@dataclass(frozen=True)
class UniComp(Compressing):
    """See `Compressing` and `UniCompSettings`. It has one form: the released one adds newlines, which belong to the
    prompt."""

    name = "unicomp"
    same: float = 0.005
    near: float = 0.2
    most: float = 2.0
    own: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.faithful:
            raise UserError("unicomp has no released form here (newlines belong to the prompt): leave faithful false")
        for name in ("same", "near"):
            real(name, getattr(self, name), 0, 2)
        real("most", self.most, 1)
        real("own", self.own, 0, 1)

    def choose(self, features: Tensor, relevance: Tensor | None, state: State) -> tuple[Tensor, Tensor]:
        return unicomp(features, UniCompSettings(self.retention_ratio, self.same, self.near, self.most, self.own))
