"""Training: differentiating a loss, updating the state, and the functions that a loop calls.

The only wing that deals with losses and optimizers: those below it also serve evaluation and plans.
"""
