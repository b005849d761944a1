"""What an engine folder tells without being run: the parts of `python -m builder.inspect`.

`record` is all that is known of an engine, `layers` adds up what it is made of, `comparison` says in what two engines
differ and why neither was taken for the other, `clip` reads what was kept of the clip that it was verified on, and
`page` makes the report of it all. They work on records in plain JSON types, look at engines and have no part in
building them, so none is among the sources that decide a build's key.
"""

from typing import Any

Record = dict[str, Any]
