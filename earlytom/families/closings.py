"""Where the vector that closes visual tokens stands: behind every row of a frame's cells, behind every frame, or once,
behind all tokens of a video.

Of a video of which not all tokens are left, a row or a frame is closed if any token of it is. So how many closing ones
there are is known only with the tokens; where all are left, it is the model's own number.

Notation: F' frames left, P = rows * columns cells a frame, N tokens, R closing ones, E width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Closes = Literal["row", "frame", "video"]


class Closings(NamedTuple):
    """
    Attributes:
        closes: what each closing token closes; None: there are none.
        cells: (rows, columns) of a frame.
    """

    closes: Closes | None
    cells: tuple[int, int]

    @property
    def behind(self) -> int:
        """How many stand behind all tokens whatever is left of them, and close the video."""
        return int(self.closes == "video")

    def most(self, tokens: int, frames: int) -> int:
        """The most that there can be of N tokens of F' frames; exact where all tokens are left."""
        if self.closes is None or self.closes == "video":
            return self.behind
        return min(tokens, frames * (self.cells[0] if self.closes == "row" else 1))

    def span(self, frames: int) -> int:
        """Tokens of as many frames where all are left, with what closes rows and frames."""
        tokens = frames * self.cells[0] * self.cells[1]
        return tokens + self.most(tokens, frames) - self.behind

    def closed(self, tokens: Tensor, positions: Tensor | None, closing: Tensor | None) -> Tensor:
        """Visual tokens with what closes them.

        Args:
            tokens: [N, E], in the order of their positions.
            positions: [N] int64, `frame * P + cell`; needed where rows or frames are closed. Waits for their device.
            closing: [E]; None where there are none.

        Returns:
            [N + R, E].
        """
        import torch

        if closing is None or self.closes is None:
            return tokens
        row = closing.to(tokens)[None]
        if self.closes == "video":
            return torch.cat([tokens, row])
        assert positions is not None
        ends = self._ends(positions).to(tokens.device)
        return torch.cat([tokens, row.expand(len(ends), -1)]).index_select(0, _order(len(tokens), ends))

    def placed(self, place: Tensor, bias: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Where the tokens of `closed` are in the video and how much they stand for; but one that closes the video.

        Args:
            place: [N] int64, `frame of the video * P + cell`.
            bias: [N].
            positions: [N], as in `closed`.

        Returns:
            place: [N + R] int64, counted with what closes rows and frames, below `span` of all frames.
            bias: [N + R], 0 for what closes.
        """
        import torch

        if self.closes is None or self.closes == "video":
            return place, bias
        ends = self._ends(positions).to(place.device)
        order, run = _order(len(place), ends), self._run
        number = torch.div(place, run, rounding_mode="trunc")  # of the row or the frame
        last = number.index_select(0, ends - 1)
        places = torch.cat([place + number, (last + 1) * run + last])
        return places.index_select(0, order), torch.cat([bias, bias.new_zeros(len(ends))]).index_select(0, order)

    @property
    def _run(self) -> int:
        """Cells of a row, or of a frame."""
        rows, columns = self.cells
        return columns if self.closes == "row" else rows * columns

    def _ends(self, positions: Tensor) -> Tensor:
        """[R] int64: behind how many tokens each closing one stands."""
        import torch

        runs = torch.div(positions, self._run, rounding_mode="trunc")
        return torch.unique_consecutive(runs, return_counts=True)[1].cumsum(0)


def _order(tokens: int, ends: Tensor) -> Tensor:
    """[N + R]: what puts R rows that follow N others behind so many of them."""
    import torch

    return torch.cat([2 * torch.arange(tokens, device=ends.device), 2 * ends - 1]).argsort()
