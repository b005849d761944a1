"""Shared by all stages: batches made ahead, the learning rate schedule, and resumable state.

The new clips of step n follow from n, so they are the same in a run that was stopped and resumed.
"""

from __future__ import annotations

import hashlib
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, Dataset

from earlytom.errors import UserError

Report = Callable[[str, int, int, Tensor, dict[str, Tensor]], None]
"""Called after every step with the stage's name, steps done, all steps, the loss, and figures by name."""

SAVED_EVERY = 100
_WARMUP = 200


class _Steps(Dataset[Any]):
    """`make(step)` for `start <= step < stop`."""

    def __init__(self, make: Callable[[int], Any], start: int, stop: int) -> None:
        self.make, self.start, self.stop = make, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Any:
        return self.make(self.start + index)


def made_ahead(make: Callable[[int], Any], start: int, stop: int, workers: int) -> Iterator[tuple[int, Any]]:
    """Pairs (step, `make(step)`), made ahead by `workers` single-threaded processes (0: in this one, not ahead)."""
    loader = DataLoader(
        _Steps(make, start, stop),
        batch_size=None,
        num_workers=workers,
        worker_init_fn=_one_thread,
        prefetch_factor=8 if workers else None,
    )
    return enumerate(loader, start)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)


def optimizer_of(modules: Iterable[nn.Module], rate: float) -> AdamW:
    """AdamW with weight decay on matrices only; parameters shared by modules are included once."""
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.02},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=rate, betas=(0.9, 0.98))


class Optimizer:
    """`optimizer_of` some modules, with warm-up to `rate` and cosine decay within `steps`."""

    def __init__(self, modules: Iterable[nn.Module], rate: float, steps: int) -> None:
        self._adam = optimizer_of(modules, rate)
        self._rate, self._steps = rate, steps

    def step(self, loss: Tensor, step: int) -> None:
        """One update: linear warm-up, then cosine decay to a fiftieth of the peak; gradient norm clipped to 1."""
        warmup = min(_WARMUP, max(1, self._steps // 10))
        done = max(0.0, (step - warmup) / max(1, self._steps - warmup))
        share = min(1.0, (step + 1) / warmup) * (0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2)
        self._adam.zero_grad(set_to_none=True)
        loss.backward()
        for group in self._adam.param_groups:
            group["lr"] = self._rate * share
        nn.utils.clip_grad_norm_([p for group in self._adam.param_groups for p in group["params"]], 1.0)
        self._adam.step()

    def state_dict(self) -> dict[str, Any]:
        """AdamW's state."""
        return self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`."""
        self._adam.load_state_dict(state)


class Progress:
    """A stage's state on disk: its parts' states, the steps done, and their seconds.

    Attributes:
        step: steps done.
        seconds: time spent on them, over all runs.

    Args:
        path: of the file.
        modules, others: parts with a state, by name; the modules' weights on entry must be those the stage began with.
        recipe: the stage's settings as text; a file of others is refused.
        device: to load to.
    """

    def __init__(
        self, path: Path, modules: Mapping[str, nn.Module], others: dict[str, Any], recipe: str, device: torch.device
    ) -> None:
        self._path, self._parts = path, {**modules, **others}
        self._origin = {"recipe": recipe, "weights": _digest(modules.values())}
        self.step, self.seconds = 0, 0.0
        if path.is_file():
            state = torch.load(path, map_location=device, weights_only=True)
            if state["origin"] != self._origin:
                raise UserError(
                    f"{path} is of another training (another --scale, or other stages before it); delete it, or give "
                    "another folder with --work"
                )
            for name, part in self._parts.items():
                part.load_state_dict(state[name])
            self.step, self.seconds = state["step"], state["seconds"]
        self._since = time.perf_counter()

    def done(self, step: int, steps: int) -> None:
        """Note that `step` steps are done; save atomically every `SAVED_EVERY` steps and at the end."""
        self.step = step
        if step % SAVED_EVERY and step < steps:
            return
        now = time.perf_counter()
        self.seconds += now - self._since
        self._since = now
        state = {name: part.state_dict() for name, part in self._parts.items()}
        staging = self._path.with_suffix(".part")
        torch.save({**state, "origin": self._origin, "step": self.step, "seconds": self.seconds}, staging)
        os.replace(staging, self._path)


def _digest(modules: Iterable[nn.Module]) -> str:
    """SHA-256 of the modules' weights."""
    sha = hashlib.sha256()
    for module in modules:
        for name, weight in sorted(module.state_dict().items()):
            sha.update(name.encode())
            sha.update(weight.detach().cpu().contiguous().numpy().data)
    return sha.hexdigest()
