"""`python -m builder.doctor`: what this machine has, what that allows, and whether all of it works.

`machine` looks at what is here, `findings` says what that allows and what mends it, `isolated` runs a part in a process
of its own with a time limit, `child` is that process, `course` is the list of parts that --run tries, `engines`,
`operators` and `answers` are those parts, `report` puts the outcomes into words. The command is `__main__`.

Nothing but a part loads what it looks at, so a library that is missing, hangs or ends its process is one line.
"""
