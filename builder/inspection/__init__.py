"""What an engine folder shows without being run: the parts of `python -m builder.inspect`.

`record` collects all facts about an engine, `layers` sums up its layers, `comparison` lists the differences of two
engines and why the cache did not reuse one, `clip` reads the clip of the verification and what was kept of it, and
`page` makes the HTML report. Records are in plain JSON types. These modules do not affect engines, so they are not in a
build's key.
"""

from typing import Any

Record = dict[str, Any]
