"""The cost of a step before it runs, and the proof that it is ZeRO, read off the compiled program.

Independent of training: it takes a jitted function, the state that the function is called with, and
ZeRO's demands.
"""
