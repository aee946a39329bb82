"""A function in a process of its own: its answer, its faults, and its death, as the caller sees them."""

import os
import pickle
import signal
import subprocess
import sys

import numpy as np
import pytest

from jobs.apart import Died, apart
from pipeline.errors import BadRequest

FUNCTIONS = '''
import os, signal
from pipeline.errors import BadRequest

def doubled(values):
    print("this is no answer")
    return values * 2

def refused(word):
    raise BadRequest(f"--model: there is no {word}")

def broken():
    return {}["nothing"]

def killed(how):
    os.kill(os.getpid(), how)

def without_gpu():
    from pipeline.errors import Broken
    raise Broken("the GPU failed")

def gone():
    os._exit(7)

def pid():
    return os.getpid()
'''


@pytest.fixture(scope="module")
def functions(tmp_path_factory):
    """A module that only sys.path leads to, as to a network of the user's."""
    folder = tmp_path_factory.mktemp("functions")
    (folder / "of_the_user.py").write_text(FUNCTIONS)
    sys.path.insert(0, str(folder))
    import of_the_user

    yield of_the_user
    sys.path.remove(str(folder))


def test_an_answer_comes_back_and_what_is_printed_goes_to_stderr(functions, capfd):
    assert (apart(functions.doubled, np.arange(3)) == [0, 2, 4]).all()
    assert apart(functions.pid) != os.getpid()
    out, err = capfd.readouterr()
    assert (out, err) == ("", "this is no answer\n")


def test_a_fault_is_the_same_fault(functions):
    with pytest.raises(BadRequest, match="^--model: there is no resnet51$"):
        apart(functions.refused, "resnet51")


def test_a_defect_keeps_its_traceback(functions):
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*in broken.*KeyError: 'nothing'"):
        apart(functions.broken)


@pytest.mark.parametrize("how, name", [(signal.SIGKILL, "SIGKILL"), (signal.SIGSEGV, "SIGSEGV")])
def test_its_death_is_told_by_name(functions, how, name):
    with pytest.raises(Died, match=f"^{name}$"):
        apart(functions.killed, how)


def test_a_gpu_that_fails_is_a_death(functions):
    """Another process may go on, with other images."""
    with pytest.raises(Died, match="^SIGKILL$"):
        apart(functions.without_gpu)


def test_an_end_without_an_answer_is_a_death(functions):
    with pytest.raises(Died, match="^exit code 7$"):
        apart(functions.gone)


def test_who_is_left_alone_says_nothing():
    """The process that asked has been killed: what it started ends without a traceback on its terminal."""
    child = subprocess.Popen([sys.executable, "-c", "from jobs.apart import _answer; _answer()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    child.stdin.write(pickle.dumps((max, (1, 2))))
    child.stdin.close()
    assert child.stderr.read() == b"" and child.wait(60) == 0
