"""Filter saliency of a layer in machine code: right for any geometry and on every kind of processor, the same bits wherever a sample lies and however many threads there are, and not believed where it errs."""

import subprocess
import sys
import warnings
from pathlib import Path

import oracles
import pytest
import tiny
import torch
import torch.nn.functional as F
import zoo
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.saliency import make_engine, microkernels
from pipeline.saliency.plans import BLOCK

microcode = pytest.importorskip("pipeline.saliency.microcode", reason="llvmlite is not installed")
try:
    HOST = microcode.host()
except RuntimeError as fault:
    pytest.skip(str(fault), allow_module_level=True)
HOSTS = {"this processor": HOST, "AVX2": microcode.Host("haswell", "", 8, 6, 2), "registers as NEON's": HOST._replace(lanes=4, rows=8, wide=2)}
LAYERS = {  # (O, I / groups, k, k), stride, padding, dilation, groups, side
    "more places than a block": ((9, 5, 3, 3), (1, 1), (1, 1), (1, 1), 1, (20, 31)),
    "some blocks of places": ((17, 3, 7, 7), (2, 2), (3, 3), (1, 1), 1, (61, 64)),
    "pointwise": ((40, 70, 1, 1), (1, 1), (0, 0), (1, 1), 1, (5, 4)),
    "pointwise and strided": ((33, 64, 1, 1), (2, 2), (0, 0), (1, 1), 1, (9, 9)),
    "many columns": ((8, 130, 3, 3), (1, 1), (1, 1), (1, 1), 1, (4, 3)),
    "dilated": ((5, 6, 3, 2), (1, 2), (2, 1), (2, 3), 1, (12, 11)),
    "groups": ((24, 8, 3, 3), (1, 1), (1, 0), (1, 1), 3, (9, 7)),
    "groups, dilated, many places": ((6, 9, 2, 3), (1, 1), (0, 2), (1, 2), 2, (19, 18)),
    "depthwise": ((40, 1, 3, 3), (1, 1), (1, 1), (1, 1), 40, (8, 8)),
    "depthwise, large and strided": ((21, 1, 7, 5), (2, 1), (3, 2), (1, 1), 21, (30, 29)),
    "depthwise without padding": ((21, 1, 3, 3), (1, 1), (0, 0), (1, 1), 21, (6, 7)),
    "one place": ((6, 20, 4, 4), (1, 1), (0, 0), (1, 1), 1, (4, 4)),
}


def maps(shape, stride, padding, dilation, groups, side, count=3):
    """(input, gradient) of so many samples, and the geometry."""
    noise = torch.Generator().manual_seed(sum(shape))
    input = torch.randn(count, shape[1] * groups, *side, generator=noise)
    given = F.conv2d(input, torch.zeros(shape), None, stride, padding, dilation, groups)
    return input, torch.randn(given.shape, generator=noise), (torch.Size(shape), stride, padding, dilation, groups)


def exact(input, gradient, shape, stride, padding, dilation, groups, aggregation):
    """s̄ of one sample at a time, by autograd in float64."""
    rows = []
    for image, above in zip(input.double(), gradient.double()):
        weight = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
        found = torch.autograd.grad(F.conv2d(image[None], weight, None, stride, padding, dilation, groups), weight, above[None])[0].flatten(1)
        rows.append(found.abs().mean(1) if aggregation == "abs" else found.mean(1).abs())
    return torch.stack(rows)


def error(found, *layer, aggregation="abs") -> float:
    """The largest of any sample, beside what its filters' |g| come to: of g, whose sum may be next to nothing, too."""
    return float(((found - exact(*layer, aggregation)).norm(dim=1) / exact(*layer, "abs").norm(dim=1)).max())


@pytest.fixture(params=HOSTS)
def processor(request, monkeypatch):
    """Code for another one, of what this one can do too."""
    host = HOSTS[request.param]
    if request.param == "AVX2" and HOST.lanes < 8:
        pytest.skip("this processor has no AVX2")
    made = {name: microcode.compiled(host, name == "abs") for name in ("abs", "signed")}
    monkeypatch.setattr(microkernels, "_made", made)


@pytest.mark.parametrize("aggregation", ["abs", "signed"])
def test_every_kind_of_layer_on_every_kind_of_processor(processor, aggregation, set_threads):
    for threads in (1, 2):
        set_threads(threads)
        for name, layer in LAYERS.items():
            input, gradient, geometry = maps(*layer)
            assert microkernels.serves(input, gradient, geometry[0], geometry[-1], aggregation), name
            found = microkernels.filter_saliency(input, gradient, *geometry, aggregation)
            assert error(found, input, gradient, *geometry, aggregation=aggregation) < 1e-6, name


def test_the_layers_have_what_their_names_say():
    places = {name: maps(*layer)[1][0, 0].numel() for name, layer in LAYERS.items()}
    assert places["more places than a block"] > BLOCK and places["some blocks of places"] > 3 * BLOCK and places["groups, dilated, many places"] > BLOCK and places["one place"] == 1


@settings(max_examples=150, deadline=None)
@given(
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)), stride=st.tuples(st.integers(1, 3), st.integers(1, 3)), padding=st.tuples(st.integers(0, 3), st.integers(0, 3)), dilation=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kind=st.sampled_from(["dense", "groups", "depthwise"]), channels=st.tuples(st.integers(1, 40), st.integers(1, 40)), count=st.integers(0, 4), side=st.tuples(st.integers(10, 24), st.integers(10, 24)), threads=st.integers(1, 4),
    layouts=st.tuples(st.booleans(), st.booleans()), aggregation=st.sampled_from(["abs", "signed"]),
)  # fmt: skip
def test_any_layer_is_right_and_free_of_its_place(kernel, stride, padding, dilation, kind, channels, count, side, threads, layouts, aggregation):
    """Beside float64; and each sample bit for bit what it is alone, in another layout, in one thread."""
    outs, ins, groups = {"dense": (*channels, 1), "groups": (3 * channels[0], 8 + channels[1], 3), "depthwise": (channels[0] + 1, 1, channels[0] + 1)}[kind]
    input, gradient, geometry = maps((outs, ins, *kernel), stride, padding, dilation, groups, side, count)
    last = [t.contiguous(memory_format=torch.channels_last if cl else torch.contiguous_format) for t, cl in zip((input, gradient), layouts)]
    torch.set_num_threads(threads)
    try:
        found = microkernels.filter_saliency(*last, *geometry, aggregation)
    finally:
        torch.set_num_threads(1)
    assert found.shape == (count, outs) and found.dtype == torch.float32
    if count:
        assert error(found, input, gradient, *geometry, aggregation=aggregation) < 1e-6
    for i in range(count):
        assert torch.equal(found[i : i + 1], microkernels.filter_saliency(input[i : i + 1], gradient[i : i + 1], *geometry, aggregation))


def test_half_precision_is_summed_in_single():
    input, gradient, geometry = maps(*LAYERS["many columns"])
    input, gradient = input.bfloat16(), gradient.bfloat16()
    assert microkernels.serves(input, gradient, geometry[0], 1, "abs")
    found = microkernels.filter_saliency(input, gradient, *geometry, "abs")
    assert found.dtype == torch.float32 and error(found, input, gradient, *geometry) < 1e-6


def test_what_is_left_to_torch():
    """float64, other devices, and groups of a few channels, of which a tile would be empty for the most part."""
    one = torch.zeros(1, 4, 3, 3)
    served = lambda input, *layer: microkernels.serves(input, one, torch.Size(layer[0]), layer[1], "abs")  # noqa: E731
    assert served(one, (4, 4, 3, 3), 1) and served(one, (4, 1, 3, 3), 4) and served(one, (6, 8, 3, 3), 2)
    assert not served(one, (6, 7, 3, 3), 2) and not served(one.as_subclass(type("Mine", (torch.Tensor,), {})), (4, 4, 3, 3), 1)
    assert not served(one.double(), (4, 4, 3, 3), 1) and not served(one.to("meta"), (4, 4, 3, 3), 1) and not served(one, (8, 2, 3, 3), 2) and not served(one, (8, 1, 3, 3), 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_sample_that_is_not_finite_spoils_no_other(value):
    input, gradient, geometry = maps(*LAYERS["more places than a block"])
    clean = microkernels.filter_saliency(input, gradient, *geometry, "abs")
    input[1], gradient[1] = value, 1e9
    found = microkernels.filter_saliency(input, gradient, *geometry, "abs")
    assert not found[1].isfinite().any() and torch.equal(found[[0, 2]], clean[[0, 2]])


def test_gradients_of_weights_are_never_written():
    """Of no sample: what a layer works in is smaller than one weight's gradient where places are few."""
    input, gradient, geometry = maps((256, 512, 3, 3), (1, 1), (1, 1), (1, 1), 1, (4, 4), count=2)
    with oracles.Largest() as largest:
        microkernels.filter_saliency(input, gradient, *geometry, "abs")
    assert 0 < largest.numbers < geometry[0].numel() / 10


@pytest.fixture
def made_anew(monkeypatch):
    monkeypatch.setattr(microkernels, "_made", {})
    return monkeypatch


def nothing(name):
    raise RuntimeError(f"no {name} here")


@pytest.mark.parametrize(
    "where, what, words",
    [
        ((sys.modules, "pipeline.saliency.microcode"), None, r"fails \((ModuleNotFoundError|ImportError)"),
        ((microcode, "host"), lambda: nothing("registers"), r"fails \(RuntimeError: no registers here\)"),
        ((microcode, "dense"), lambda *_: None, "fails"),
        ((microcode, "compiled"), lambda host, absolute, own=microcode.compiled: own(host, not absolute), "differs by"),
    ],
    ids=["not installed", "another processor", "no code", "wrong code"],
)
def test_where_it_cannot_be_had_or_errs_products_serve(made_anew, where, what, words):
    """With one warning; and the engine's answer is the same to rounding."""
    animal, (images, labels) = zoo.ZOO[0], zoo.images()
    before = make_engine("fused", animal.make(), "abs")(images, labels).saliency
    microkernels._made.clear()
    owner, name = where
    if isinstance(owner, dict):
        import pipeline.saliency

        made_anew.delattr(pipeline.saliency, "microcode", raising=False)
        made_anew.setitem(owner, name, what)
    else:
        made_anew.setattr(owner, name, what)
    with pytest.warns(RuntimeWarning, match=rf"machine code {words}.*slower products serve") as warned:
        found = make_engine("fused", animal.make(), "abs")(images, labels).saliency
    assert len(warned) == 1
    torch.testing.assert_close(found, before, rtol=1e-5, atol=1e-6 * float(before.max()))


def test_it_is_made_right_whatever_the_caller_is_in(made_anew):
    """Modes are a thread's, and say nothing of what this processor can do."""
    one, layer = torch.ones(2, 4, 3, 3), (torch.Size((4, 4, 3, 3)), 1, "abs")
    for mode in (torch.inference_mode, torch.no_grad, lambda: torch.device("meta"), lambda: torch.autograd.graph.saved_tensors_hooks(nothing, nothing)):
        microkernels._made.clear()
        with mode(), warnings.catch_warnings():
            warnings.simplefilter("error")
            assert microkernels.serves(one, one, *layer)
    microkernels._made.clear()
    torch.func.vmap(lambda x: x * microkernels.serves(one, one, *layer))(torch.ones(2)).all()
    assert microkernels._made["abs"] is not None


def test_a_shortage_of_memory_is_told_and_forgotten(made_anew):
    one, layer = torch.ones(2, 4, 3, 3), (torch.Size((4, 4, 3, 3)), 1, "abs")

    def short(*_):
        raise MemoryError

    with pytest.MonkeyPatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(microcode, "compiled", short)
        microkernels.serves(one, one, *layer)
    assert microkernels.serves(one, one, *layer)


def test_maps_of_another_convolution_are_refused():
    """What it would read lies beyond them."""
    input, gradient, geometry = maps(*LAYERS["pointwise"])
    for wrong in ((input[..., 1:], gradient), (input, gradient[..., 1:]), (input[:, 1:], gradient), (input, gradient[:, 1:])):
        with pytest.raises(ValueError, match=r"a convolution of \[40, 70, 1, 1\] in 1 groups gives \["):
            microkernels.filter_saliency(*wrong, *geometry, "abs")


@pytest.mark.parametrize("shape, groups", [((8, 8, 1, 1), 1), ((16, 1, 1, 1), 16)])
def test_many_places_are_summed_block_by_block(shape, groups):
    """Not one number after another, which would be wrong by 5e-6."""
    input, gradient = torch.rand(1, shape[1] * groups, 512, 512), torch.rand(1, shape[0], 512, 512)
    geometry = torch.Size(shape), (1, 1), (0, 0), (1, 1), groups
    assert error(microkernels.filter_saliency(input, gradient, *geometry, "abs"), input, gradient, *geometry) < 1e-6


GUARDED = """
import ctypes, mmap, sys
import torch
import test_microkernels as tests
from pipeline.saliency import microkernels

def fenced(values):
    "The same numbers, the last of which is the last of a page that nothing may be read behind."
    pages = -(-values.numel() * 4 // mmap.PAGESIZE)
    memory = mmap.mmap(-1, (pages + 1) * mmap.PAGESIZE)
    begin = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(begin + pages * mmap.PAGESIZE), ctypes.c_size_t(mmap.PAGESIZE), 0) == 0
    where = torch.frombuffer(memory, dtype=torch.float32, count=values.numel(), offset=pages * mmap.PAGESIZE - values.numel() * 4)
    where.copy_(values.permute(0, 2, 3, 1).flatten() if last else values.flatten())
    n, c, h, w = values.shape
    return where.view(n, h, w, c).permute(0, 3, 1, 2) if last else where.view(values.shape)

for host in tests.HOSTS.values():
    if host.lanes > tests.HOST.lanes:
        continue
    microkernels._made["abs"] = tests.microcode.compiled(host, True)
    for last in (False, True):
        for name, layer in tests.LAYERS.items():
            input, gradient, geometry = tests.maps(*layer)
            found = microkernels.filter_saliency(fenced(input), fenced(gradient), *geometry, "abs")
            assert tests.error(found, input, gradient, *geometry) < 1e-6, name
print("right")
"""


def alone(code: str) -> str:
    """What a process of its own prints, which may die."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=Path(__file__).parents[1], env=tiny.surroundings(PYTHONPATH=str(Path(__file__).parent)))
    assert done.returncode == 0, (done.returncode, done.stderr[-2000:])
    return done.stdout


def test_nothing_is_read_behind_the_maps():
    assert alone(GUARDED) == "right\n"


BEGIN = """
import ctypes, os, threading, time, warnings
import torch
from pipeline.saliency import microkernels
one, layer = torch.ones(4, 4, 5, 5), (torch.Size((4, 4, 1, 1)), (1, 1), (0, 0), (1, 1), 1, "abs")
torch.set_num_threads(2)
"""
FORKED = """
assert microkernels.filter_saliency(one, one, *layer).eq(25).all()
microkernels._making.acquire()  # another thread makes code meanwhile
child = os.fork()
if not child:
    right = microkernels.filter_saliency(one, one, *layer).eq(25).all() and not microkernels._making.locked()
    os._exit(0 if right else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
LATE = """
microkernels.filter_saliency(one, one, *layer)
def late():
    threading.main_thread().join()
    time.sleep(0.1)
    torch.set_num_threads(2)
    print(microkernels.filter_saliency(one, one, *layer).unique().item())
threading.Thread(target=late).start()
"""
FORBIDDEN = """
if ctypes.CDLL(None).prctl(65, 1, 0, 0, 0):  # memory that was written can never be run
    print("cannot be forbidden here")
else:
    with warnings.catch_warnings(record=True) as told:
        print(microkernels.serves(one, one, layer[0], 1, "abs"), *("may not run code that it makes); slower products serve" in str(w.message) for w in told))
"""


@pytest.mark.parametrize(
    "code, says",
    [(FORKED, "0\n"), (LATE, "25.0\n"), (FORBIDDEN, "False True\n")],
    ids=["in a forked process", "after the main thread", "where no new code may run"],
)
def test_processes(code, says):
    found = alone(BEGIN + code)
    if "cannot be forbidden here" in found:
        pytest.skip("this system has no such rule")
    assert found == says


def test_engines_use_it():
    """Every convolution of a network that is fused; without a word where it is right."""
    asked = []
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        own = microkernels.filter_saliency
        patch.setattr(microkernels, "filter_saliency", lambda input, gradient, shape, *rest: asked.append(tuple(shape)) or own(input, gradient, shape, *rest))
        network = zoo.ZOO[0].make()
        make_engine("fused", network, "abs")(*zoo.images())
    assert sorted(asked) == sorted(tuple(p.shape) for p in network.parameters() if p.dim() == 4)
