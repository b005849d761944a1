"""The one error a user can mend.

Every package of the project raises it (or a subclass) with a single line that names what was got, what was expected and
the flag or command that mends it. Command lines print that line and exit with status 2. A defect of ours is no
`UserError`, so it still shows its traceback.
"""


class UserError(ValueError):
    """Something the caller can put right: a bad value, a missing file, an unsupported model."""
