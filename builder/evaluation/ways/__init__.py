"""Rows of the accuracy table: their type (`row`), those of published methods (`compared`), the table of these beside
EarlyTom and "cells" and its plot (`field`, `picture`), and their papers' figures (`claims`). `settings` makes the
settings of EarlyTom and "cells" from the command's options."""
