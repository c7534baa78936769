"""A compiled program: its instructions, the bytes they move, their cost, when they run, and which values are alive.

Needs no jax: it reads the text that the compiler prints, so that a saved program can be judged anywhere.
"""
