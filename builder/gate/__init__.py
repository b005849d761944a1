"""The accuracy gate: is the exported graph the model it came from?

`accuracy` measures one graph against the reference, `limits` says what it must reach, `stage` is the verify stage of a
build, which runs the gate for every frame count.
"""

COMPARE_FILE = "compare.sh"
"""The script beside a kept reference, which compares a graph with it (`builder.gate.kept_reference`)."""
