"""An OpenAI-compatible server on a `Pipeline`: `python -m runtime.serve ENGINE`."""
