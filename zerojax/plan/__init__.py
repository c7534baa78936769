"""The cost of a step before it runs, and the proof that it is ZeRO, read off the compiled program.

Knows nothing of training: it takes a jitted function, the state it is called with, and what ZeRO
demands of it.
"""
