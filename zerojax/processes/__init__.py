"""Several processes of one job: what started them, how they meet, agree, and end.

`launchers`, `rendezvous` and `launch` need no jax: they run before it is initialized, or in a process that never does.
"""
