"""The processes of one job: how they start, meet, agree on their programs, and end.

They meet (`rendezvous`), and then report their calls over the same connections (`monitor`, `hub`,
`roll_call`). Only `exchange`, `agreement`, `fingerprint`, `programs`, `joining` and `preemption`
need jax; the others run before it is initialized, or in a process that never initializes it.
"""
