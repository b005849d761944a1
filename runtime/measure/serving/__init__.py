"""What a server does under load, seen from outside: arrivals, a client, what is asked, figures.

Only `added` loads a model.
"""
