"""Found before the library by processes whose `PYTHONPATH` begins here: there is no torch for them."""

raise ModuleNotFoundError("No module named 'torch'", name="torch")
