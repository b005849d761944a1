"""How the bundled model is trained: `python -m builder.micro.train` runs the stages of this package in order.

`course` lists the stages, `labels` says what every part of a frame shows, `perception` teaches the vision tower and the
projector to see it, `answering` teaches the decoder to answer, with many questions about a clip in one sequence
(`packing`). No stage ever drops or merges a visual token. `scoring` says which questions are answered right, `card`
writes down what came of it.
"""
