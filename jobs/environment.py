"""What stands in the environment of every process that computes: how its threads wait for each other, and that it gets all of them.

Threads that spin until the next layer comes cost all of a core: beside decoders up to 20 times. Threads that sleep at once, in turn, cost a small network a third of its rate
where nothing is beside them. So they spin for some microseconds, as libgomp itself has them do where they outnumber the cores, and other runtimes' sleep.
"""

import os

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


FEWER = ("OMP_DYNAMIC", "OMP_THREAD_LIMIT", "OMP_MAX_ACTIVE_LEVELS", "OMP_STACKSIZE")  # that promise threads and then do not give them, by which torch's convolutions come out wrong (`pipeline/saliency/threads.py`), or the process ends


def settle() -> None:
    """For this process, before torch comes, and what it starts. What a user has set holds, but for what would make results wrong."""
    for name in FEWER:
        os.environ.pop(name, None)
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)
