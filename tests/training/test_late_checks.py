"""Steps that do not wait for the device: what is read, and that a bad step is named and nothing is lost."""

import collections
import json

import pytest
import torch
from late_steps import MESSAGES, Interrupts, Steps, assert_equal, bad_batches, batches, student, waits
from torch.utils._python_dispatch import TorchDispatchMode

from lasnn_sj import LaSNNTrainer, PoissonEncoder, models
from lasnn_sj.distillation import CrossEntropy, LabelKD
from lasnn_sj.models.readout import BatchError
from lasnn_sj.neurons import TimeLoopNode
from lasnn_sj.training import NonFiniteError, TrainingOptions
from lasnn_sj.training.step import LAG, TrainingStep


@pytest.fixture
def late(monkeypatch):
    """Check late as on CUDA, of CPU tensors too."""
    monkeypatch.setattr(TrainingStep, "late_on_cpu", True)


class CountReads(TorchDispatchMode):
    """Counts the operations that wait for the device, by their name."""

    def __init__(self):
        super().__init__()
        self.reads = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        # The fused CPU optimiser counts its steps itself; plain Adam reads them, on the CPU only.
        if waits(func, args):
            self.reads[func._schema.name] += 1
        return func(*args, **kwargs or {})


def trainer(net=None, folder=None, objective=None, callbacks=(), **options):
    net = student() if net is None else net
    spiking = isinstance(net, models.VGG)
    return LaSNNTrainer(
        net,
        optimizer=torch.optim.Adam(net.parameters(), 1e-2, fused=True),
        encoder=PoissonEncoder(3, torch.Generator().manual_seed(5)) if spiking else None,
        objective=objective, run_dir=folder, seed=1, options=TrainingOptions(**options), callbacks=callbacks,
    )  # fmt: skip


def fit(one, data, epochs=1):
    one.fit(data, epochs=epochs)
    return {name: value.clone() for name, value in one.student.state_dict().items()}


@pytest.mark.parametrize("attention", ["activation", "gradient"])
def test_a_steady_step_waits_for_nothing(late, attention, monkeypatch):
    """With fit's own work around it: checks, losses, gradients, clipping, update, metrics."""
    lists = []
    tolist = torch.Tensor.tolist  # which no dispatch mode sees
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(len(self)) or tolist(self))
    net = student()
    one = LaSNNTrainer(
        net, models.teacher_resnet20(4, width=0.25).eval(), attention=attention,
        objective=LabelKD() if attention == "activation" else None, encoder=PoissonEncoder(3),
        optimizer=torch.optim.Adam(net.parameters(), fused=True), options=TrainingOptions(clip_norm=1.0),
    )  # fmt: skip
    reads = []
    for steps in (LAG, 2 * LAG):
        lists.clear()
        with CountReads() as counted:
            one.fit(batches(steps), epochs=len(one.history) + 1)
        reads.append((sum(counted.reads.values()), len(lists)))
    (first, first_lists), (second, second_lists) = reads
    layers = sum(isinstance(module, TimeLoopNode) for module in net.modules())
    # Reads of an epoch, and of the look for silent layers before the first step.
    assert second == first < 12 + layers
    assert second_lists == first_lists + 1 == 2  # the conditions of LAG steps together
    assert len(one.history) == 2


def test_without_a_fused_optimizer_each_step_is_read_at_once(late):
    one = trainer()
    assert one._step.late
    one.optimizer = torch.optim.Adam(one.student.parameters())
    assert not one._step.late
    assert not trainer(precision="float16")._step.late


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1}, {"accumulate": 3}], ids=str)
def test_late_equals_at_once_to_the_bit(options, tmp_path, monkeypatch):
    data, results = batches(LAG + 5), []
    for on_cpu in (False, True):
        monkeypatch.setattr(TrainingStep, "late_on_cpu", on_cpu)
        one = trainer(folder=tmp_path / str(on_cpu), **options)
        weights = fit(one, data, epochs=2)
        rows = [{k: v for k, v in row.items() if k != "seconds"} for row in one.history]
        results.append((weights, rows, (tmp_path / str(on_cpu) / "steps.csv").read_text()))
    assert_equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]
    assert len(results[0][2].splitlines()) == 1 + 2 * (LAG + 5)


class BadAt(CrossEntropy):
    """Cross-entropy that is infinite, or whose gradient is NaN, when called the n-th time."""

    def __init__(self, at, what):
        self.at, self.what, self.calls = at, what, 0

    def __call__(self, signals):
        self.calls += 1
        ce = super().__call__(signals)["ce"]
        if self.calls == self.at + 1:
            bad = (signals.scores - signals.scores.detach()).abs().sum().sqrt()  # 0, its gradient NaN
            ce = ce + (torch.inf if self.what == "loss" else bad)
        return {"ce": ce}


def bad_run(kind, at, net=None, folder=None, **options):
    """A trainer and batches of which the one at position ``at`` cannot be trained on."""
    objective = BadAt(at, kind) if kind in ("loss", "gradient") else None
    return trainer(net, folder, objective, **options), bad_batches(kind, at)


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("at", [0, 7, LAG + 4])
def test_a_bad_step_is_named_and_the_weights_are_those_before_it(kind, at, late, tmp_path):
    expected = fit(trainer(), batches(LAG + 9)[:at]) if at else student().state_dict()
    one, data = bad_run(kind, at, folder=tmp_path)
    error, message = MESSAGES[kind]
    with pytest.raises(error) as raised:
        one.fit(data, epochs=1)
    assert message in str(raised.value)
    assert f"batch {at} of epoch 1" in str(raised.value)
    assert one.step == at
    assert_equal(one.student.state_dict(), expected)
    if error is NonFiniteError:
        kept = json.loads((tmp_path / "nonfinite" / "what.json").read_text())
        assert (kept["step"], kept["batch"]) == (at + 1, at)
    assert fit(one, batches(3))  # it can go on


@pytest.mark.parametrize("kind", ["loss", "gradient"])
@pytest.mark.parametrize("batch_norm", [False, True])
def test_a_skipped_step_changes_nothing(kind, batch_norm, monkeypatch):
    results = []
    for on_cpu in (False, True):
        monkeypatch.setattr(TrainingStep, "late_on_cpu", on_cpu)
        one, data = bad_run(kind, 5, net=student(batch_norm), on_nonfinite="skip")
        results.append((fit(one, data), one.history[0]["loss"], one.history[0]["skipped"], one.step))
    assert_equal(results[0][0], results[1][0])
    assert results[0][1:] == results[1][1:]
    assert results[1][2:] == (1, LAG + 8)


def test_a_first_step_that_is_skipped_leaves_no_momentum(late):
    """PyTorch's fused SGD creates its buffers without values and does not fill them in a skipped step."""
    results = []
    for first in (1.0, torch.nan):
        one = trainer(objective=CrossEntropy(), on_nonfinite="skip")
        one.optimizer = torch.optim.SGD(one.student.parameters(), 1e-2, momentum=0.9, fused=True)
        weight = one.student.output.weight
        weight.register_hook(lambda g, factor=first: g * factor)
        torch.empty(1000, 1000).fill_(torch.nan)  # memory that buffers without values may get
        one.train_step(*batches(1)[0])
        list(one._step.errors(one._direct))
        momenta = [state["momentum_buffer"].abs().sum().item() for state in one.optimizer.state.values()]
        results.append(momenta)
    assert all(results[0])
    assert results[1] == [0.0] * len(results[0])


@pytest.mark.parametrize("at", [3, LAG + 2])
def test_an_interrupted_run_resumes_to_the_bit(at, late, tmp_path):
    data = batches(LAG + 9)
    expected = fit(trainer(), data, epochs=2)

    first, interrupting = trainer(folder=tmp_path), Interrupts(data)
    interrupting.at = at
    with pytest.raises(KeyboardInterrupt):
        fit(first, interrupting, epochs=2)
    assert first.step == at + 1
    assert_equal(fit(trainer(folder=tmp_path), Interrupts(data), epochs=2), expected)


@pytest.mark.parametrize("every", [4, 5])
def test_checkpoints_are_written_when_they_are_due(every, late, tmp_path):
    """Also where the steps before are not read yet: each holds the weights of its step."""
    fit(trainer(folder=tmp_path, checkpoint_every=every), batches(LAG))
    assert len((tmp_path / "steps.csv").read_text().splitlines()) == 1 + LAG
    numbers = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit())
    assert numbers == [LAG // every * every if LAG % every else LAG - every, LAG]


def test_steps_on_their_own_are_read_together(late):
    one, data = bad_run("loss", 2)
    before = []
    for images, labels in data[:5]:
        before.append({k: v.clone() for k, v in one.student.state_dict().items()})
        one.train_step(images, labels)
    with pytest.raises(NonFiniteError, match="the loss is not finite"):
        one.finish_steps()
    assert_equal(one.student.state_dict(), before[2])
    one.train_step(*data[6])
    one.finish_steps()
    assert not torch.equal(one.student.output.weight, before[2]["output.weight"])
    for _ in range(LAG - 1):
        one.train_step(data[7][0], torch.full((4,), 9))
    with pytest.raises(BatchError, match="labels must lie in"):
        one.train_step(*data[8])


def test_a_callback_sees_each_step_once(late):
    steps = Steps()
    fit(trainer(callbacks=[steps]), batches(LAG + 3))
    assert [number for number, _ in steps.seen] == list(range(1, LAG + 4))
    assert len({loss for _, loss in steps.seen}) == LAG + 3


def test_the_students_pass_is_one_graph_and_its_steps_are_those_of_plain_ones(late):
    """No graph break and no data-dependent control flow in forward, taps and backward."""
    results = []
    for compiled in (False, True):
        net = student()
        one = LaSNNTrainer(
            net, models.teacher_resnet20(4, width=0.25).eval(), encoder=PoissonEncoder(3),
            optimizer=torch.optim.Adam(net.parameters(), fused=True),
        )  # fmt: skip
        data = batches(3)
        one.prepare(*data[0])
        if compiled:
            one._step._forward.compile(backend="aot_eager", fullgraph=True)
        torch.manual_seed(2)
        parts = [one.train_step(*batch).parts for batch in data]
        one.finish_steps()
        results.append((net.state_dict(), [{k: v.item() for k, v in each.items()} for each in parts]))
    assert_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_everything_that_a_step_updates_keeps_its_address(late):
    """As a CUDA graph needs it: parameters, buffers, optimiser state, the flag that stops."""
    one = trainer(student(batch_norm=True))

    def addresses():
        state = [t for s in one.optimizer.state.values() for t in s.values()]
        tensors = [*one.student.parameters(), *one.student.buffers(), *state, one._step._stopped]
        return [t.data_ptr() for t in tensors]

    data = batches(5)
    one.train_step(*data[0])
    first = addresses()
    for batch in data[1:]:
        one.train_step(*batch)
    assert addresses() == first
