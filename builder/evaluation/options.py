"""What a measurement is asked for if nothing else is: words and numbers that its command line shows."""

from __future__ import annotations

RATIOS = (0.05, 0.10, 0.15, 0.20, 0.25, 0.30, 0.50)
MAIN_RATIO = 0.1  # of the paper's headline figure
# A record is of the default table, and of this many clips at least.
CLIPS = 2000
AUTO = "auto"  # an engine to be built for the measurement, or found built
