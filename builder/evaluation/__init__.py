"""How accurate compressed video understanding is: what `python -m builder.evaluate` measures, and by which statistics.

`passes` runs the vision tower once for each way of merging frames, `methods` turns its passes into visual tokens in
every way that is compared, `engine` adds a compiled engine to them, `bench` puts the questions about the task's clips,
`blind` guesses them without the video, `timing` measures times. `results` makes figures of it all, `statistics` says
how sure they are, and `report`, `plot` and `record` show and keep them. `ways` has what a row is, and the rows of the
field's methods. `coverage` needs no questions: it measures what is lost of any videos. `arguments` is the command line.
"""
