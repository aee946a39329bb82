"""What stands in the environment of every process that computes: how its threads wait for each other, that it gets all of them, and no pandas where nobody needs it.

Threads that spin until the next layer comes cost all of a core: beside decoders up to 20 times. Threads that sleep at once, in turn, cost a small network a third of its rate
where nothing is beside them. So they spin for some microseconds, as libgomp itself has them do where they outnumber the cores, and other runtimes' sleep.
"""

import os
import sys

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}


FEWER = ("OMP_DYNAMIC", "OMP_THREAD_LIMIT", "OMP_MAX_ACTIVE_LEVELS", "OMP_STACKSIZE")  # that promise threads and then do not give them, by which torch's convolutions come out wrong (`pipeline/saliency/threads.py`), or the process ends


def settle() -> None:
    """For this process, before torch comes, and what it starts. What a user has set holds, but for what would make results wrong."""
    for name in FEWER:
        os.environ.pop(name, None)
    for name, value in WAITING.items():
        os.environ.setdefault(name, value)


def spare_pandas() -> None:
    """pyarrow imports pandas, a second that is half of a query's, to ask whether a list is one of its Series. Here none is: it asks once, now, and is told that there is no pandas. Who imports it for himself still can."""
    import pyarrow

    class NoPandas:
        @staticmethod
        def find_spec(name: str, *_: object) -> None:
            if name == "pandas":
                raise ModuleNotFoundError("this command does without pandas", name=name)

    if "pandas" not in sys.modules:
        sys.meta_path.insert(0, NoPandas)
        try:
            pyarrow.array([0])
        finally:
            sys.meta_path.remove(NoPandas)
