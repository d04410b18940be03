"""The verbs of `featreuse`, one module each: its flags, and what it runs.

A module here imports only what its flags need; the room that does the work is imported when the verb runs.
"""
