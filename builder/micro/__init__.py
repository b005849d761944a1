"""The bundled model's training: `python -m builder.micro.train`.

`course` runs the stages in order: `see` trains vision tower and projector with the losses of `perception` on the dense
`labels`, `answering` trains the decoder, with many questions about a clip in one sequence (`packing`). No stage drops
or merges visual tokens. `scoring` tells which questions are answered right, `card` writes the model card.
"""
