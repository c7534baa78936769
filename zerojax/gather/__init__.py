"""Gathering parameters and scattering their cotangents.

`pair` defines gather and scatter, and `formats` what they send. `rewrite` and `pending` place them
where a program reads its parameters, `uses` finds the equations that use a variable, and `reads`
counts the reads for a plan. `models` splits linen, NNX and plain pytrees into parameters and state,
and joins them again.

Independent of training: training, evaluation and planning all use the same pair.
"""
