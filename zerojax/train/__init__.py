"""Training: differentiating a loss, updating the state, and the steps and verbs that a loop calls.

The only wing that knows losses and optimizers: the wings below it also serve evaluation and plans.
"""
