"""A compiled program: its instructions, the bytes they move, their cost and order, live values.

It needs no jax: it reads the text that the compiler prints, so a saved program can be studied on
any machine.
"""
