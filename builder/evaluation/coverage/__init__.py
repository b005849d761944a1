"""What a budget loses of videos that nobody has asked anything about: how well what is kept stands for all that was
there. `measure` has the figures, `command` is `python -m builder.evaluate --coverage`, `picture` draws them."""
