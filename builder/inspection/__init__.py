"""What an engine folder tells without being run: the parts of `python -m builder.inspect`.

`layers` adds up what an engine is made of, `comparison` says in what two engines differ and why neither was taken for
the other. The command puts their records together and shows them. They work on records in plain JSON types, look at
engines and have no part in building them, so none is among the sources that decide a build's key.
"""

from typing import Any

Record = dict[str, Any]
