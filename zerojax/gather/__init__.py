"""The pair that ZeRO is made of, and the places in a program where it is called.

`pair` gathers a parameter and scatters its cotangent, `rewrite` finds where a program reads its parameters, `models` takes
linen, NNX and plain pytrees apart and puts them together again.
"""
