"""The benchmarks of `python -m runtime.bench`; nothing here is needed to answer a question.

`arguments` is the command line, `clock` times, `load` runs clients. `comparison` compares `variants` (`naive` is
EarlyTom as first released) by `measure`, `memory` and `overhead`; `report` and `plot` show its results. `service` and
`soak` measure one pipeline, `serving` a server, `vision` the vision parts of engines.
"""
