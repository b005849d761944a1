"""Inserts closing tokens (newline or end vectors): after every row of a frame's cells, after every frame, or once after
all tokens of a video.

In a compressed video a row or a frame is closed if any token of it is kept, so the number of closing tokens depends on
the tokens; in an uncompressed video it is the model's own.

Notation: F' frames left, P = rows * columns cells a frame, N tokens, R closing tokens, E width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

Closes = Literal["row", "frame", "video"]


class Closings(NamedTuple):
    """A model's closing tokens.

    Attributes:
        closes: what each closing token closes; None: there are none.
        cells: (rows, columns) of a frame.
    """

    closes: Closes | None
    cells: tuple[int, int]

    @property
    def behind(self) -> int:
        """Number of closing tokens after the whole video: 1 or 0."""
        return int(self.closes == "video")

    def most(self, tokens: int, frames: int) -> int:
        """The largest possible R for N tokens of F' frames; exact if all tokens are kept."""
        if self.closes is None or self.closes == "video":
            return self.behind
        return min(tokens, frames * (self.cells[0] if self.closes == "row" else 1))

    def span(self, frames: int) -> int:
        """Tokens of so many uncompressed frames, with the closing tokens of rows and frames."""
        tokens = frames * self.cells[0] * self.cells[1]
        return tokens + self.most(tokens, frames) - self.behind

    def closed(self, tokens: Tensor, positions: Tensor | None, closing: Tensor | None) -> Tensor:
        """Visual tokens with closing tokens inserted.

        Args:
            tokens: [N, E], in the order of their positions.
            positions: [N] int64, `frame * P + cell`; needed if rows or frames are closed, and waits for their device.
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
        """Place and bias of the tokens of `closed`, without one that closes the video.

        Args:
            place: [N] int64, `frame of the video * P + cell`.
            bias: [N].
            positions: [N], as in `closed`.

        Returns:
            place: [N + R] int64, counting closing tokens of rows and frames, below `span` of all frames.
            bias: [N + R], 0 for closing tokens.
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
        """[R] int64: the number of tokens before each closing one."""
        import torch

        runs = torch.div(positions, self._run, rounding_mode="trunc")
        return torch.unique_consecutive(runs, return_counts=True)[1].cumsum(0)


def _order(tokens: int, ends: Tensor) -> Tensor:
    """[N + R]: the order that puts closing row r, stored at N + r, after the first `ends[r]` of the N tokens."""
    import torch

    return torch.cat([2 * torch.arange(tokens, device=ends.device), 2 * ends - 1]).argsort()
