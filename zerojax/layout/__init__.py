"""The part of each leaf that a device holds: specs by rule, specs of whole states, and meshes.

Independent of training: a layout is a pure function of shapes, dtypes, axis sizes and rules.
"""
