"""Independent calls on streams of their own: what waits for what, and who keeps memory back."""

from __future__ import annotations

import contextlib
from functools import partial

import pytest
import torch

from hflfnerv import _concurrent
from hflfnerv._concurrent import capture, concurrently, side_by_side
from hflfnerv.testing import requires

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() and not requires("cuda"), reason="PyTorch sees no CUDA device"
)


class OnDevice(torch.Tensor):
    """A tensor that says that it is on a CUDA device, and notes the streams that are recorded."""

    is_cuda = property(lambda self: True)
    device = property(lambda self: torch.device("cuda", 0))

    def record_stream(self, stream):
        self.__dict__.setdefault("recorded", []).append(stream.cuda_stream)


def on_device():
    return torch.zeros(1).as_subclass(OnDevice)


@pytest.fixture
def log(monkeypatch):
    """What streams do, in order; the current stream is 1 unless the log's attribute says otherwise."""

    class Log(list):
        current = 1
        created = 100

    class Stream:
        def __init__(self, device=None, priority=0, number=None):
            self.device, self.device_index = torch.device("cuda", 0), 0
            if number is None:
                events.created += 1
                number = events.created
            self.cuda_stream = number

        def wait_stream(self, other):
            events.append(f"{self.cuda_stream} waits for {other.cuda_stream}")

    @contextlib.contextmanager
    def stream(chosen):
        before, events.current = events.current, chosen.cuda_stream
        yield
        events.current = before

    events = Log()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(number=events.current))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(_concurrent, "_BESIDE", {})
    return events


def work(log, name, x):
    log.append(f"{name} on {log.current}")
    return [x + 1] if name == "b" else x + 1


def test_all_begin_after_the_current_stream_and_it_goes_on_after_all(log):
    inputs = [on_device() for _ in range(3)]
    with side_by_side():
        made = concurrently(*(partial(work, log, name, x) for name, x in zip("abc", inputs, strict=True)))
    assert log == [
        "101 waits for 1",
        "102 waits for 1",
        "a on 1",
        "b on 101",
        "c on 102",
        "1 waits for 101",
        "1 waits for 102",
    ]
    # Memory made on one stream and used on another: arguments there, results here.
    assert [x.__dict__.get("recorded") for x in inputs] == [None, [101], [102]]
    assert [x.__dict__.get("recorded") for x in (made[0], made[1][0], made[2])] == [None, [1], [1]]


def test_streams_belong_to_the_current_one(log):
    with side_by_side():
        for current in (1, 1, 7, 1):
            log.current = current
            concurrently(*(partial(work, log, name, on_device()) for name in "ac"))
    assert [entry for entry in log if entry.startswith("c")] == ["c on 101", "c on 101", "c on 102", "c on 101"]


def test_more_calls_than_streams_take_turns(log):
    with side_by_side():
        concurrently(*(partial(work, log, str(number), on_device()) for number in range(10)))
    ran = [entry for entry in log if " on " in entry]
    assert len({entry.split()[-1] for entry in ran}) == _concurrent._STREAMS
    assert ran[0].split()[-1] == ran[8].split()[-1] == "1"
    assert ran[1].split()[-1] == ran[9].split()[-1] == "101"


def test_an_error_leaves_no_stream_behind(log):
    def fails(x):
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), side_by_side():
        concurrently(partial(work, log, "a", on_device()), partial(fails, on_device()))
    assert log[-1] == "1 waits for 101"


def test_elsewhere_calls_run_one_after_another(log, monkeypatch):
    assert concurrently() == []
    concurrently(partial(work, log, "a", on_device()), partial(work, log, "c", on_device()))
    with side_by_side():
        pass
    concurrently(partial(work, log, "a", on_device()), partial(work, log, "c", on_device()))
    with side_by_side():
        concurrently(partial(work, log, "a", torch.zeros(1)), partial(work, log, "c", torch.zeros(1)))
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with side_by_side():
        concurrently(partial(work, log, "a", on_device()), partial(work, log, "c", on_device()))
    assert log == ["a on 1", "c on 1"] * 4


class FakeCapture:
    """A capture that begins and, unless ``ends`` is False, ends."""

    ends = True

    def __init__(self, graph, **settings):
        self.settings = settings

    def __enter__(self):
        torch.cuda.set_stream(self.settings["stream"])

    def __exit__(self, *exception):
        if not self.ends:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        torch.cuda.set_stream(self.settings["stream"].before)


@pytest.fixture
def capturing(log, monkeypatch):
    """A stream to capture on; graphs are fakes, and the log knows the current stream."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", FakeCapture)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(log, "current", stream.cuda_stream))
    monkeypatch.setattr(_concurrent, "_BROKEN", [])
    stream = torch.cuda.Stream(number=50)
    stream.before = torch.cuda.Stream(number=1)
    return stream


def streams_used(log):
    del log[:]
    with side_by_side():
        concurrently(partial(work, log, "a", on_device()), partial(work, log, "c", on_device()))
    return {entry.split()[-1] for entry in log if " on " in entry}


def test_a_capture_returns_the_graph_and_the_result(log, capturing):
    graph, result = capture(lambda: log.current, capturing)
    assert type(graph) is object
    assert (result, log.current) == (50, 1)


def test_an_error_in_a_capture_that_ends_is_raised_and_that_is_all(log, capturing):
    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        capture(fails, capturing)
    assert log.current == 1
    assert len(streams_used(log)) == 2


@pytest.mark.parametrize("error", [None, ValueError("no")])
def test_after_a_capture_that_cuda_breaks_off_there_is_one_stream(log, capturing, monkeypatch, error):
    def run():
        if error is not None:
            raise error

    monkeypatch.setattr(FakeCapture, "ends", False)
    with pytest.raises(
        RuntimeError if error is None else ValueError, match="error during capture" if error is None else "no"
    ):
        capture(run, capturing)
    assert log.current == 1
    assert streams_used(log) == {"1"}


@needs_gpu
@pytest.mark.parametrize("captured", [False, True])
def test_gradients_of_branches_are_those_of_a_sequence(captured):
    generator = torch.Generator("cuda").manual_seed(1)
    x = torch.randn(256, 256, device="cuda", generator=generator, requires_grad=True)
    weights = [torch.randn(256, 256, device="cuda", generator=generator, requires_grad=True) for _ in range(12)]

    def branch(weight, x):
        for _ in range(20):
            x = torch.tanh(x @ weight / 16)
        return x

    def step():
        x.grad = None
        for weight in weights:
            weight.grad = None
        sum(concurrently(*(partial(branch, weight, x) for weight in weights))).square().mean().backward()

    step()
    expected = [t.grad.clone() for t in (x, *weights)]
    stream = torch.cuda.Stream()
    with side_by_side(), torch.cuda.stream(stream):
        for _ in range(3):
            step()
    if captured:
        graph = torch.cuda.CUDAGraph()
        with side_by_side(), torch.cuda.graph(graph, stream=stream):
            step()
        for _ in range(3):
            graph.replay()
    torch.cuda.synchronize()
    for t, wanted in zip((x, *weights), expected, strict=True):
        # With several streams a library may sum in another order: 256 terms a product, 40 products one after another.
        assert (t.grad - wanted).norm() <= 40 * 256**0.5 * torch.finfo(torch.float32).eps * wanted.norm()
