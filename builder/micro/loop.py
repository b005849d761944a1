"""What all stages share: batches made ahead, a learning rate that falls, and a state one can resume from.

A stage is a function of its step: the clips of step n follow from n, so a run that was stopped and one that was not
see the same new clips.
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
"""Told the stage's name, the steps done, all steps, the loss and named figures after every step."""

SAVED_EVERY = 100
_WARMUP = 200


class _Steps(Dataset[Any]):
    """What `make` gives for the steps `start <= step < stop`."""

    def __init__(self, make: Callable[[int], Any], start: int, stop: int) -> None:
        self.make, self.start, self.stop = make, start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Any:
        return self.make(self.start + index)


def made_ahead(make: Callable[[int], Any], start: int, stop: int, workers: int) -> Iterator[tuple[int, Any]]:
    """Each step with what `make` gives for it, made ahead by `workers` processes of one thread each."""
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
    """AdamW with weight decay on matrices only; a parameter that several modules share is in it once."""
    parameters = {id(p): p for module in modules for p in module.parameters()}.values()
    groups = [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": 0.02},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return AdamW(groups, lr=rate, betas=(0.9, 0.98))


class Optimizer:
    """`optimizer_of` some modules, with a learning rate that rises to `rate` and falls again within `steps`."""

    def __init__(self, modules: Iterable[nn.Module], rate: float, steps: int) -> None:
        self._adam = optimizer_of(modules, rate)
        self._rate, self._steps = rate, steps

    def step(self, loss: Tensor, step: int) -> None:
        """One update: a linear start, then half a cosine down to a fiftieth of the peak; gradients clipped to 1."""
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
        """Its state, for `load_state_dict`."""
        return self._adam.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""
        self._adam.load_state_dict(state)


class Progress:
    """How far a stage is, on disk: its parts' states, the steps done, the seconds they took.

    Attributes:
        step: steps done.
        seconds: time spent on them, over all runs.

    Args:
        path: of the file.
        modules, others: by name, what has a state; the modules' weights on entry are what the stage starts from.
        recipe: names the stage's settings.
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
        """Note that `step` steps are done; write it down now and then, in one move, and at the end."""
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
