"""The processes of one job: how they start, meet, agree on their programs, and end.

`launchers`, `kubernetes_job`, `rendezvous` and `launch` need no jax, because they run before it is
initialized, or in a process that never initializes it.
"""
