"""The accuracy gate: does the exported graph compute what its model computes?

`accuracy` measures one graph against the PyTorch reference, `limits` has the limits, `stage` is a build's verify stage,
which runs the gate for every frame count.
"""

COMPARE_FILE = "compare.sh"
"""The script that compares a graph with the kept reference beside it (`builder.gate.kept_reference`)."""
