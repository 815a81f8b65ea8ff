"""Recorded steps equal plain ones: on a device where there is one, and always with a stand-in on the CPU."""

import collections
import json
from functools import partial

import numpy as np
import pytest
import torch
from late_steps import (
    MESSAGES,
    METHODS,
    OTHERS,
    READS,
    Interrupts,
    SmallTeacher,
    Steps,
    assert_equal,
    bad_batches,
    batches,
    student,
    waits,
)
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from lasnn_sj import LaSNNTrainer, PoissonEncoder, models
from lasnn_sj.data import DeviceLoader, Images, transforms
from lasnn_sj.data.late_checks import LateChecks
from lasnn_sj.distillation import Attention, CrossEntropy
from lasnn_sj.models.readout import BatchError
from lasnn_sj.training import NonFiniteError, TrainingOptions
from lasnn_sj.training.graph import WARM_UP, GraphedStep
from lasnn_sj.training.step import LAG, TrainingStep


class CpuRecorder(TorchDispatchMode):
    """Stands in for a CUDA graph: runs recorded operations again, on the tensors of the recording.

    As there, Python does not run again, numbers are those of the recording, reading a value is an error,
    and recording changes no tensor and no random-number generator.
    """

    device = "cpu"
    made: list = []
    memory = 2**30  # bytes of a recording

    def __init__(self, device):
        super().__init__()
        self.calls, self.recordings, self.replays = [], 0, 0
        CpuRecorder.made.append(self)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.removeprefix("aten::"), kwargs or {}
        if name in READS:
            raise RuntimeError(f"{name}: operation not permitted when stream is capturing")
        for given, value in zip(func._schema.arguments, args):
            declared = given.alias_info is not None and given.alias_info.is_write
            if declared or given.name in ("running_mean", "running_var"):  # whose change is not declared
                for tensor in tree_flatten(value)[0]:
                    self.before.setdefault(tensor.data_ptr(), (tensor, tensor.clone()))
        out = func(*args, **kwargs)
        self.memory -= sum(t.nbytes for t in tree_flatten(out)[0] if isinstance(t, torch.Tensor))
        if self.memory < 0:
            raise torch.OutOfMemoryError("CUDA out of memory")
        aliases = [r.alias_info for r in func._schema.returns]
        if not name.startswith(("empty", "new_empty")) and not any(a and not a.is_write for a in aliases):
            fresh = [] if any(aliases) else [out]
            self.calls.append((func, args, kwargs, fresh))
        return out

    def run(self, function):
        return function()

    def record(self, function, generators):
        self.calls, self.before, self.recordings = [], {}, self.recordings + 1
        generators = [torch.default_generator, *generators]
        states = [generator.get_state() for generator in generators]
        try:
            with self:
                return function()
        finally:
            for tensor, value in self.before.values():
                tensor.detach().copy_(value)
            for generator, state in zip(generators, states):
                generator.set_state(state)

    @torch.no_grad()
    def replay(self):
        self.replays += 1
        for func, args, kwargs, recorded in self.calls:
            out = func(*args, **kwargs)
            for old, new in zip(tree_flatten(recorded)[0], tree_flatten([out])[0]):
                if isinstance(old, torch.Tensor):
                    old.copy_(new)

    def close(self):
        self.calls = []


@pytest.fixture
def late(monkeypatch):
    """Check late as on CUDA, of CPU tensors too."""
    monkeypatch.setattr(TrainingStep, "late_on_cpu", True)


@pytest.fixture(params=["stand-in", "cuda"])
def device(request, monkeypatch):
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        with torch.backends.cudnn.flags(deterministic=True, benchmark=False):
            yield "cuda"
        return
    monkeypatch.setattr(TrainingStep, "late_on_cpu", True)
    monkeypatch.setattr(GraphedStep, "recorder", CpuRecorder)
    monkeypatch.setattr(CpuRecorder, "made", [])
    yield "cpu"


def trainer(
    objective=None, net=None, folder=None, callbacks=(), device="cpu", optimizer=torch.optim.Adam, **options
):
    """A trainer whose learning rates a float32 holds exactly."""
    net = student() if net is None else net
    optimizer = optimizer(net.to(device).parameters(), lr=2**-7, fused=True)
    spiking = isinstance(net, models.VGG)
    objective = CrossEntropy() if objective is None else objective
    return LaSNNTrainer(
        net, SmallTeacher().eval() if objective.needs_teacher else None, objective=objective,
        attention=None, optimizer=optimizer, run_dir=folder, seed=1, callbacks=callbacks, device=device,
        scheduler=torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        encoder=PoissonEncoder(3, torch.Generator(device).manual_seed(5)) if spiking else None,
        options=TrainingOptions(**options),
    )  # fmt: skip


def weights(one):
    return {name: value.clone() for name, value in one.student.state_dict().items()}


def rows(one):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in one.history]


CASES = [
    *((name, False, {}) for name in METHODS),
    ("hybrid", True, {"clip_norm": 0.1, "precision": "bfloat16"}),
    ("lasnn", False, {"accumulate": 2}),
]


@pytest.mark.parametrize(("method", "batch_norm", "options"), CASES, ids=str)
def test_recorded_steps_are_the_plain_ones(method, batch_norm, options, device, tmp_path):
    """Weights, logged numbers and files, with a learning rate that changes."""
    data, results = batches(LAG + 2, device=device), []
    for compiled in (False, "graph"):
        folder = tmp_path / str(compiled)
        shared = {"device": device, "compile": compiled} | options
        one = trainer(METHODS[method](), student(batch_norm), folder, **shared)
        one.fit(data, epochs=2)
        results.append((weights(one), rows(one), (folder / "steps.csv").read_text()))
    if device == "cuda":
        for name, expected in results[0][0].items():
            torch.testing.assert_close(results[1][0][name], expected, rtol=1e-3, atol=1e-4)
        return
    assert_equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]
    (recorder,) = CpuRecorder.made
    assert recorder.recordings == 1 + 2  # before training, and one for each epoch
    assert recorder.replays == 2 * (LAG + 2) - WARM_UP


def test_settings_that_change_between_steps_are_followed(device):
    """Learning rate without a new recording; alpha, clipping and the optimizer's state with one."""
    results, data = [], batches(14, device=device)
    for compiled in (False, "graph"):
        objective = CrossEntropy() + Attention("activation", alpha=0.9)
        one = trainer(objective, device=device, compile=compiled)
        losses, counts = [], []
        for number, batch in enumerate(data):
            if number in (5, 6):
                one.optimizer.param_groups[0]["lr"] *= 0.5
            elif number == 8:
                objective.objectives[1].alpha = 0.25
            elif number == 10:
                one.options.clip_norm = 0.01
            elif number == 12:
                one.optimizer.load_state_dict(one.optimizer.state_dict())
            losses.append({name: float(part) for name, part in one.train_step(*batch).parts.items()})
            if CpuRecorder.made:
                counts.append(CpuRecorder.made[0].recordings)
        one.finish_steps()
        results.append((weights(one), losses))
    if device == "cpu":
        assert_equal(results[0][0], results[1][0])
        assert results[0][1] == results[1][1]
        assert counts == [1] * WARM_UP + [2] * 5 + [3] * 2 + [4] * 2 + [5] * 2
    else:
        for name, expected in results[0][0].items():
            torch.testing.assert_close(results[1][0][name], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_other_fused_optimizers(optimizer, device):
    results = []
    for compiled in (False, "graph"):
        one = trainer(device=device, optimizer=optimizer, compile=compiled)
        for batch in batches(8, device=device):
            one.train_step(*batch)
        one.finish_steps()
        results.append(weights(one))
    for name, expected in results[0].items():
        torch.testing.assert_close(results[1][name], expected, rtol=0 if device == "cpu" else 1e-3, atol=1e-6)


class BadOnOnes(CrossEntropy):
    """Cross-entropy that is infinite, or whose gradient is, for images of ones."""

    def __init__(self, what):
        self.what = what

    def __call__(self, signals):
        ce = super().__call__(signals)["ce"]
        ones = signals.inputs.abs().mean() == 1
        if self.what == "loss":
            return {"ce": ce + torch.where(ones, torch.inf, 0.0)}
        most = torch.where(ones, 3e38, 0.0)
        return {"ce": ce + ((signals.scores - signals.scores.detach()).sum() * most) * most}


@pytest.fixture
def stand_in(late, monkeypatch):
    monkeypatch.setattr(GraphedStep, "recorder", CpuRecorder)
    monkeypatch.setattr(CpuRecorder, "made", [])


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_bad_step_is_named_and_the_weights_are_those_before_it(kind, stand_in, tmp_path):
    at = 7
    before = trainer(BadOnOnes("loss"), compile="graph")
    before.fit(batches(LAG + 9)[:at], epochs=1)
    one = trainer(BadOnOnes(kind), folder=tmp_path, compile="graph")
    error, message = MESSAGES[kind]
    with pytest.raises(error) as raised:
        one.fit(bad_batches(kind, at), epochs=1)
    assert message in str(raised.value)
    assert f"batch {at} of epoch 1" in str(raised.value)
    assert CpuRecorder.made[-1].replays == LAG - WARM_UP  # the later steps ran and changed nothing
    assert_equal(weights(one), weights(before))
    if error is NonFiniteError:
        kept = json.loads((tmp_path / "nonfinite" / "what.json").read_text())
        assert (kept["step"], kept["batch"]) == (at + 1, at)


@pytest.mark.parametrize("kind", ["loss", "gradient"])
def test_a_skipped_step_changes_nothing(kind, late, monkeypatch):
    monkeypatch.setattr(GraphedStep, "recorder", CpuRecorder)
    results = []
    for compiled in (False, "graph"):
        one = trainer(BadOnOnes(kind), student(True), compile=compiled, on_nonfinite="skip")
        data = batches(9)
        data[6][0].fill_(1)
        one.fit(data, epochs=1)
        results.append((weights(one), rows(one), one.step))
    assert_equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]
    assert (results[1][1][0]["skipped"], results[1][2]) == (1, 8)


def test_an_interrupted_run_resumes_to_the_bit(stand_in, tmp_path):
    data = batches(12)
    whole = trainer(METHODS["lasnn"](), compile="graph")
    whole.fit(data, epochs=2)

    first = trainer(METHODS["lasnn"](), folder=tmp_path, compile="graph")
    interrupting = Interrupts(data)
    interrupting.at = 10
    with pytest.raises(KeyboardInterrupt):
        first.fit(interrupting, epochs=2)
    assert first.step == 11
    resumed = trainer(METHODS["lasnn"](), folder=tmp_path, compile="graph")
    resumed.fit(Interrupts(data), epochs=2)
    assert_equal(weights(resumed), weights(whole))
    assert rows(resumed) == rows(whole)
    assert CpuRecorder.made[-1].replays == 13 - WARM_UP


def test_every_address_is_fixed_after_the_warm_up(device):
    """Parameters, gradients, buffers, optimizer state, learning rate, input, results, the flag that stops."""
    one = trainer(METHODS["lasnn_gradient"](), device=device, compile="graph")

    def addresses():
        graph, trained = one._step._graph, list(one.student.parameters())
        result = graph._result
        tensors = [
            *trained, *(p.grad for p in trained), *one.student.buffers(), one._step._stopped,
            *(t for state in one.optimizer.state.values() for t in state.values()),
            graph._images, graph._labels, graph._bad_batch, *graph._rates,
            result.scores, *result.parts.values(), *result.logged.values(),
        ]  # fmt: skip
        return [tensor.data_ptr() for tensor in tensors]

    found, scores = [], []
    for images, labels in batches(WARM_UP + 6, device=device):
        scores.append(one.train_step(images, labels).scores)
        if len(scores) > WARM_UP:
            found.append(addresses())
    one.finish_steps()
    assert found == [found[0]] * 6
    assert len({each.data_ptr() for each in scores}) == len(scores)  # results are the caller's own


class Sequence(TorchDispatchMode):
    """Lists operations with the shapes and dtypes of their tensors, and those that wait for the device."""

    def __init__(self):
        super().__init__()
        self.seen, self.reads = [], collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        tensors = [t for t in tree_flatten((args, out))[0] if isinstance(t, torch.Tensor)]
        self.seen.append((str(func), [(t.dtype, tuple(t.shape), t.stride()) for t in tensors]))
        self.reads[func._schema.name] += waits(func, args)
        return out


@pytest.mark.parametrize("method", METHODS | OTHERS)
def test_every_step_runs_the_same_operations(method, late):
    """No control flow depends on data, and nothing is read."""
    one, steady = trainer((METHODS | OTHERS)[method](), clip_norm=1.0), []
    one.train_step(*batches(1)[0])
    for images, labels in [*batches(3), (torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long))]:
        with Sequence() as sequence:
            one.train_step(images, labels)
        steady.append(sequence)
    one.finish_steps()
    assert len(steady[0].seen) > 100
    assert all(each.seen == steady[0].seen for each in steady)
    assert +steady[0].reads == {}


def tensors_of(one):
    """The step as a function of tensors to tensors."""

    def step(images, labels):
        checks = LateChecks(on_cpu=True)
        with checks:
            result = one._step.run_at_once(images, labels, checks)
        return [result.scores, *result.parts.values(), *result.logged.values(), checks.failed()]

    return step


@pytest.mark.parametrize("method", METHODS)
def test_a_whole_step_is_one_graph_without_values(method, late):
    """Traced with tensors that have no values, and compiled as one graph: steps equal to the bit.

    Dynamo itself does not follow ``Optimizer.zero_grad`` and ``step``, which are on its skip list, so the
    step is traced below it, by operation.
    """
    data, results = batches(4), []
    for kind in ("plain", "traced", "compiled"):
        one = trainer(METHODS[method](), clip_norm=1.0)
        one.encoder.generator = None  # a graph of operations holds no generator
        for batch in data[:2]:
            one.train_step(*batch)
        one.finish_steps()
        step = tensors_of(one)
        if kind != "plain":
            step = make_fx(step, tracing_mode="fake", _allow_non_fake_inputs=True)(*data[0])
        if kind == "compiled":
            for node in reversed(step.graph.nodes):
                if "profiler" in str(node.target):
                    step.graph.erase_node(node)
            step.recompile()
            step = torch.compile(step, fullgraph=True, backend="eager")
        torch.manual_seed(2)
        values = [[value.clone() for value in step(*batch)] for batch in data]
        results.append((weights(one), values))
    for found, values in results[1:]:
        assert_equal(found, results[0][0])
        assert all(torch.equal(*pair) for each in zip(values, results[0][1]) for pair in zip(*each))


@pytest.mark.parametrize("method", METHODS)
def test_no_steady_step_synchronises(method):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    for compiled in (False, "graph"):
        one = trainer(METHODS[method](), device="cuda", compile=compiled)
        data = batches(2 * WARM_UP + 2, device="cuda")
        for batch in data[: WARM_UP + 1]:
            one.train_step(*batch)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for batch in data[WARM_UP + 1 :]:
                one.train_step(*batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        one.finish_steps()


def loaders_with_a_smaller_last_batch(samples=10):
    data = TensorDataset(*(torch.cat(part) for part in zip(*batches(5, size=2))))

    class Stream(IterableDataset):
        def __iter__(self):
            return iter(data)

    images = Images(np.zeros((samples, 8, 8, 3), np.uint8), np.zeros(samples, int), transforms(8, False))
    return {
        "DataLoader": partial(DataLoader, data),
        "sampler": partial(DataLoader, data, sampler=range(samples)),
        "stream": partial(DataLoader, Stream()),
        "DeviceLoader": partial(DeviceLoader, images, device="cpu"),
    }


@pytest.mark.parametrize("kind", ["DataLoader", "sampler", "stream", "DeviceLoader"])
def test_a_smaller_last_batch_is_refused_before_training(kind, stand_in, tmp_path):
    loader = loaders_with_a_smaller_last_batch()[kind]
    problem = "may be smaller" if kind == "stream" else "has 2 of 4 samples"
    message = f'compile="graph" needs batches of one size, and the last one of train_loader {problem}; .*drop'
    one = trainer(folder=tmp_path / "run", compile="graph")
    with pytest.raises(ValueError, match=message):
        one.fit(loader(batch_size=4), epochs=1)
    assert not (tmp_path / "run").exists()
    assert one.step == 0
    one.fit(loader(batch_size=4, drop_last=True), epochs=1)
    assert one.step == 2
    if kind != "stream":
        one.fit(loader(batch_size=5), epochs=2)  # all of one size, though another one than before
        one.fit(loader(batch_size=16), epochs=3)  # one batch
        assert one.step == 5


def test_a_batch_of_another_shape_is_refused_and_the_run_goes_on_without_the_graph(stand_in, tmp_path):
    data = batches(WARM_UP + 2) + batches(1, size=2) + batches(2)
    one = trainer(folder=tmp_path, compile="graph", checkpoint_every=1)
    message = r"batch 5 of epoch 1: compile=\"graph\".*of images \(4, 3, 8, 8\) in float32, got \(2, "
    with pytest.raises(BatchError, match=message):
        one.fit(data, epochs=1)
    plain, expected = trainer(folder=tmp_path), trainer()
    plain.fit(data, epochs=1)
    assert plain.step == len(data)
    expected.fit(data, epochs=1)
    assert_equal(weights(plain), weights(expected))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float16"}, 'cannot be used with precision="float16"'),
        ({"time_chunks": 3}, "cannot be used with time_chunks=3"),
    ],
)
def test_what_cannot_be_recorded_is_refused_by_its_name(options, message, stand_in):
    with pytest.raises(ValueError, match=message):
        trainer(compile="graph", **options)


def test_an_optimizer_that_cannot_skip_on_the_device_is_refused(stand_in):
    net = student()
    with pytest.raises(ValueError, match="needs a fused optimizer.*got RMSprop; give Adam"):
        LaSNNTrainer(net, optimizer=torch.optim.RMSprop(net.parameters()), encoder=PoissonEncoder(3),
                     options=TrainingOptions(compile="graph"))  # fmt: skip


def test_a_cuda_graph_needs_a_cuda_device(tmp_path):
    with pytest.raises(ValueError, match='compile="graph" needs a CUDA device, got device cpu'):
        trainer(folder=tmp_path / "run", compile="graph")
    assert not (tmp_path / "run").exists()
    with pytest.raises(ValueError, match="compile must be False, True or \"graph\", got 'fast'"):
        TrainingOptions(compile="fast")


def test_too_little_memory_is_said_and_the_run_can_go_on_without(stand_in, tmp_path, monkeypatch):
    monkeypatch.setattr(CpuRecorder, "memory", 10_000)
    data, before = batches(8), trainer()
    one = trainer(folder=tmp_path, compile="graph")
    message = r'compile="graph" needs memory for a recorded step of \(4, 3, 8, 8\).*a smaller batch_size'
    for _ in range(2):
        with pytest.raises(torch.OutOfMemoryError, match=message):
            one.fit(data, epochs=1)
        assert one.step == 0
        assert_equal(weights(one), weights(before))
    plain, expected = trainer(folder=tmp_path), trainer()
    plain.fit(data, epochs=1)
    expected.fit(data, epochs=1)
    assert_equal(weights(plain), weights(expected))


def test_an_objective_that_reads_a_value_is_said(stand_in):
    class Reads(CrossEntropy):
        def __call__(self, signals):
            ce = super().__call__(signals)["ce"]
            return {"ce": ce * (1 if ce.item() > 0 else 2)}

    one, before = trainer(Reads(), student(batch_norm=True), compile="graph"), student(batch_norm=True)
    message = r'compile="graph" cannot record the step: _local_scalar_dense.*item'
    with pytest.raises(RuntimeError, match=message):
        one.train_step(*batches(1)[0])
    assert_equal(weights(one), before.state_dict())
    assert all(p.grad is None for p in one.student.parameters())


def test_a_callback_sees_each_step_once(stand_in):
    steps = Steps()
    trainer(callbacks=[steps], compile="graph").fit(batches(LAG + 3), epochs=1)
    assert [number for number, _ in steps.seen] == list(range(1, LAG + 4))
    assert len({loss for _, loss in steps.seen}) == LAG + 3
