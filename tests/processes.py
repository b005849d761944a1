"""How long the tests wait for what can only hang: for a process to end, a thread to be done, an event to come.

No test's result hangs on this limit being reached, unless something is broken: on a busy machine the start of one
interpreter with torch has taken minutes. A test that expects a time limit to be reached has a small one of its own.
"""

HANG_SECONDS = 900.0
