"""Which part of each leaf a device holds: a spec by rule, specs of whole states, and the devices they are over.

Knows nothing of training: a layout is a pure function of shapes, dtypes, axis sizes and rules.
"""
