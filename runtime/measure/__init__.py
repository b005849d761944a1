"""What `python -m runtime.bench` is made of.

`arguments` is the command line, `naive` the method in the form it was first released in, `variants` what is compared,
`comparison` what is measured of them, `measure` the clock, `report` and `plot` show what it found. Nothing here is
needed to answer a question.
"""
