"""Many builds in one folder, of which some are killed; run as a program by `test_cache`.

    python killed_builds.py OUT WATCH SEED

Builders are forked, build one of a few engines each, over and over, and note in WATCH what must not happen: two of them
in one staging folder, a staging folder that changed under a builder's hands. The program kills them at random points.
"""

from __future__ import annotations

import fcntl
import os
import random
import signal
import sys
import time
from pathlib import Path

from builder import cache

NAMES = ("one", "two", "three")
BUILDERS, KILLS = 4, 60


def build(out: Path, watch: Path, chance: random.Random) -> None:
    name = chance.choice(NAMES)
    with cache.staging(out / name, lambda: None) as place, open(watch / f"{name}.busy", "w") as busy:
        try:
            fcntl.flock(busy, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            (watch / f"wrong-{os.getpid()}").write_text(f"two builders of {name}")
            return
        if list(place.iterdir()):
            (watch / f"wrong-{os.getpid()}").write_text(f"{name} was not fresh")
        token = str(os.getpid())
        (place / "deep").mkdir()
        (place / "deep" / "token").write_text(token)
        time.sleep(chance.random() * 0.005)
        if (place / "deep" / "token").read_text() != token:
            (watch / f"wrong-{os.getpid()}").write_text(f"{name} was changed")
        (place / "whole").write_text(token)
        cache.publish(place, out / name)


def builder(out: Path, watch: Path, seed: int) -> int:
    child = os.fork()
    if child:
        return child
    try:
        chance = random.Random(seed)
        while True:
            build(out, watch, chance)
    except BaseException as error:  # a fork that ends otherwise would go on as its parent
        (watch / f"wrong-{os.getpid()}").write_text(f"{type(error).__name__}: {error}")
    finally:
        os._exit(1)


def main(out: Path, watch: Path, seed: int) -> None:
    chance = random.Random(seed)
    running = [builder(out, watch, chance.randrange(2**32)) for _ in range(BUILDERS)]
    for _ in range(KILLS):
        time.sleep(chance.random() * 0.03)
        one = running.pop(chance.randrange(BUILDERS))
        os.kill(one, signal.SIGKILL)
        os.waitpid(one, 0)
        running.append(builder(out, watch, chance.randrange(2**32)))
    for one in running:
        os.kill(one, signal.SIGKILL)
        os.waitpid(one, 0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]))
