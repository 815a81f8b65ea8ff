"""Steps on a CUDA device that is not there: tensors that only have shape, dtype and device.

A step must keep all its tensors on the device, copy nothing from the host (a recorded step cannot), and take
the same course whatever the values are. Autograd's engine needs a driver, so gradients are zeros here; the
layers' own backward passes are tested on the CPU.
"""

import pytest
import torch
from late_steps import METHODS, OTHERS, SmallTeacher, student
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from lasnn_sj import DirectEncoder, LaSNNTrainer, PoissonEncoder, models
from lasnn_sj.distillation import CrossEntropy, LabelKD
from lasnn_sj.neurons import accelerate, cuda, marks, nodes
from lasnn_sj.runtime import distributed
from lasnn_sj.training import TrainingOptions, checks, trainer
from lasnn_sj.training.state import Progress

LAZY = {"BKD", "EnOF", "KDSNN", "SASTC"}  # their weights get their shape late, which fake tensors cannot


class Values(TorchDispatchMode):
    """Gives values to what is read before training."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name in ("allclose", "equal"):
            return True
        if name == "_local_scalar_dense":
            return 0.5 if args[0].is_floating_point() else 1
        return func(*args, **kwargs or {})


class Operations(TorchDispatchMode):
    """Lists operations, and those with a tensor of the host."""

    def __init__(self):
        super().__init__()
        self.names, self.on_host = [], set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.names.append(func._schema.name)
        tensors = [t for t in tree_flatten((args, kwargs, out))[0] if isinstance(t, torch.Tensor)]
        if any(t.device.type == "cpu" for t in tensors):
            self.on_host.add(func._schema.name)
        return out


@pytest.fixture
def fake_device(monkeypatch):
    """A CUDA device whose tensors have no values, with kernels for the neurons."""
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    device = torch.device("cuda", 0)
    monkeypatch.setattr(cuda, "why_not", lambda target: None)
    monkeypatch.setattr(checks, "device", lambda given: device)
    monkeypatch.setattr(distributed, "initialise", lambda device: device)
    monkeypatch.setattr(trainer, "place", lambda module, device: None)  # modules are created there
    monkeypatch.setattr(nodes, "is_in_torch_dispatch_mode", lambda: False)  # or pools would run by themselves
    monkeypatch.setattr(marks, "SMALLEST", 0)
    monkeypatch.setattr(Progress, "random_state", lambda self: {})
    monkeypatch.setattr(Progress, "set_random_state", lambda self, state: None)
    monkeypatch.setattr(torch.autograd, "grad", lambda outputs, inputs, **_: _zeros(inputs))
    with FakeTensorMode(), device:
        yield


def _zeros(inputs):
    return [torch.zeros_like(t) for t in (inputs if isinstance(inputs, (list, tuple)) else [inputs])]


def operations(monkeypatch, net, objective, encoder, size=8, **options):
    """The operations of a second step."""
    teacher = SmallTeacher().eval() if objective.needs_teacher else None
    adam = torch.optim.Adam(net.parameters(), fused=True)
    one = LaSNNTrainer(
        net, teacher, objective=objective, attention=None, encoder=encoder, optimizer=adam,
        options=TrainingOptions(**options),
    )  # fmt: skip

    def backward(loss):
        assert loss.requires_grad
        for group in one.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    images, labels = torch.rand(4, 3, size, size), torch.zeros(4, dtype=torch.long)
    with Values():
        one.prepare(images, labels)
    one.train_step(images, labels)
    with Operations() as seen:
        result = one.train_step(images, labels)
    assert all(part.device.type == "cuda" for part in result.parts.values())
    assert "aten::_fused_adam_" in seen.names
    return seen


@pytest.mark.parametrize("name", sorted((METHODS | OTHERS).keys() - LAZY))
def test_a_step_of_every_objective_stays_on_the_device(name, fake_device, monkeypatch):
    objective = (METHODS | OTHERS)[name]()
    seen = operations(monkeypatch, student(), objective, PoissonEncoder(3), clip_norm=1.0)
    assert seen.on_host == set()
    assert seen.names.count("lasnn_sj::time_loop") >= 4


NETWORKS = {
    "vgg5": lambda: models.vgg5(4, width=0.1),
    "resnet12": lambda: models.resnet12(4, width=0.1),
    "spiking_resnet18": lambda: accelerate(models.spiking_resnet18(4, 3, 32, 0.125)),
}


@pytest.mark.parametrize("options", [{}, {"accumulate": 2}, {"on_nonfinite": "skip"}], ids=str)
@pytest.mark.parametrize("network", NETWORKS)
def test_a_step_of_other_networks_stays_on_the_device(network, options, fake_device, monkeypatch):
    seen = operations(monkeypatch, NETWORKS[network](), LabelKD(), DirectEncoder(3), 32, **options)
    assert seen.on_host == set()


def test_the_time_loop_averages_and_spikes_are_kept_as_bytes_there(fake_device, monkeypatch):
    net = models.vgg5(4, width=0.1)
    for parameter in net.parameters():
        if parameter.dim() == 4:
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    seen = operations(monkeypatch, net, CrossEntropy(), DirectEncoder(3), 32)
    assert seen.names.count("lasnn_sj::time_loop") == 5
    assert "aten::avg_pool2d" not in seen.names
    monkeypatch.setattr(marks, "DEVICE", "none")
    without = operations(monkeypatch, net, CrossEntropy(), DirectEncoder(3), 32)
    # inputs of a convolution and two linear layers
    assert seen.names.count("aten::ne") == without.names.count("aten::ne") + 3


class OfTheHost(CrossEntropy):
    """Cross-entropy times a number that is made on the host."""

    def __call__(self, signals):
        return {"ce": super().__call__(signals)["ce"] * torch.tensor(2.0, device="cpu")}


class Reads(CrossEntropy):
    """Cross-entropy that depends on a value."""

    def __call__(self, signals):
        ce = super().__call__(signals)["ce"]
        return {"ce": ce if ce > 0 else -ce}


class Elsewhere(CrossEntropy):
    """Cross-entropy of scores to which a tensor of the host is added."""

    def __call__(self, signals):
        host = torch.zeros(signals.scores.shape, device="cpu")
        return {"ce": (signals.scores + host).square().mean()}


def test_what_does_not_stay_there_is_found(fake_device, monkeypatch):
    seen = operations(monkeypatch, student(), OfTheHost(), PoissonEncoder(3))
    assert "aten::mul" in seen.on_host
    with pytest.raises(DataDependentOutputException):
        operations(monkeypatch, student(), Reads(), PoissonEncoder(3))
    with pytest.raises(RuntimeError, match=r"two different devices"):
        operations(monkeypatch, student(), Elsewhere(), PoissonEncoder(3))
