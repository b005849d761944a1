"""Coverage: how well the kept tokens of a video represent all of its tokens, without any questions. `measure` computes
it, `command` is `python -m builder.evaluate --coverage`, `picture` draws it."""
