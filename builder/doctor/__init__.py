"""`python -m builder.doctor`: what this machine has, what that allows, and whether all of it works.

`machine` collects the facts, `findings` says what they allow and how to fix what is missing. With --run, `course` lists
the parts to try, `treatment` runs them, each `isolated` in a process (`child`) with a time limit; `engines`,
`operators` and `answers` are the parts. `report` writes the outcomes. The command is `__main__`.

Libraries are loaded in such processes only, so one that is missing, hangs or crashes is one line.
"""
