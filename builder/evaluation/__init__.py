"""The accuracy of video understanding with compressed visual tokens: `python -m builder.evaluate`.

`passes` runs the vision tower once for each way of merging frames, `methods` makes visual tokens of the passes by every
compared method, `engine` adds a built engine in ONNX Runtime, `bench` asks the questions about the task's clips,
`blind` guesses them without the video, `timing` measures times. `results` computes figures with the intervals of
`statistics`; `report`, `plot` and `record` show and store them. `ways` defines a table row and the rows of published
methods. `coverage` measures, without questions, what methods lose of any videos. `arguments` is the command line.
"""
