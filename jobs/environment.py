"""What stands in the environment of every process that computes: how its threads wait for each other.

Threads that spin until the next layer comes cost all of a core: beside decoders up to 20 times. Threads that sleep at once, in turn, cost a small network a third of its rate
where nothing is beside them. So they spin for some microseconds, as libgomp itself has them do where they outnumber the cores, and other runtimes' sleep.
"""

import os

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


def settle() -> None:
    """For this process, before torch comes, and what it starts. What a user has set holds."""
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
