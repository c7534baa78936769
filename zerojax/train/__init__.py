"""Training: a loss differentiated, the state it updates, and the steps and verbs that a loop calls."""
