"""Mistakes of a first hour, each with the sentence that it must end in: argument, value, remedy."""

import functools
import logging
import re

import pytest
import torch
from spikingjelly.activation_based import base, functional, layer, neuron, surrogate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lasnn_sj import Callback, DirectEncoder, LaSNNTrainer, PoissonEncoder, models
from lasnn_sj.conversion import balance_thresholds, convert
from lasnn_sj.distillation import CrossEntropy, LabelKD
from lasnn_sj.neurons import accelerate
from lasnn_sj.training import Trainer, TrainingOptions, evaluate

K, T, N = 4, 4, 8


def student(step_mode="m", v_threshold=0.1):
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(1, 4, 3, padding=1), neuron.IFNode(v_threshold, surrogate_function=surrogate.ATan()),
        layer.Flatten(), layer.Linear(4 * 64, K),
    )  # fmt: skip
    functional.set_step_mode(net, step_mode)
    return net


def linear_student(step_mode="m"):
    """Takes any number of leading dimensions: in single-step mode nothing fails by itself."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(-3), nn.Linear(64, 16), neuron.IFNode(0.1), nn.Linear(16, K))
    functional.set_step_mode(net, step_mode)
    return net


def teacher(seed=1):
    torch.manual_seed(seed)
    return models.teacher_resnet20(K, in_channels=1, width=0.125).eval()


def images(n=N, shape=(1, 8, 8)):
    return torch.rand(n, *shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def loader(x=None, **arguments):
    x = images() if x is None else x
    return DataLoader(TensorDataset(x, torch.arange(len(x)) % K), N, **arguments)


def fit(
    net=None, *, data=None, val=None, epochs=1, kind=Trainer, optimizer=None, scheduler=None, **arguments
):
    net = student() if net is None else net
    arguments = {"encoder": DirectEncoder(T)} | arguments
    if optimizer is not None:
        arguments["optimizer"] = optimizer(net.parameters())
    return kind(net, **arguments).fit(loader() if data is None else data, val, epochs=epochs)


lasnn = functools.partial(fit, models.conv3_linear2, kind=LaSNNTrainer)


def with_pairs(pairs):
    torch.manual_seed(0)
    net = models.conv3_linear2(K, in_channels=1, image_size=8, width=0.1)
    return fit(net, kind=LaSNNTrainer, teacher=teacher(), pairs=pairs)


class KeepsState(nn.Module):
    """As snnTorch's neurons with ``init_hidden``: a potential that nobody resets."""

    def __init__(self):
        super().__init__()
        self.linear, self.v = nn.Linear(64, K), 0.0

    def forward(self, x):
        if isinstance(self.v, torch.Tensor) and len(self.v) != x.shape[1]:
            self.v = 0.0
        outputs = []
        for now in self.linear(x.flatten(2)):
            self.v = 0.9 * self.v + now.detach()
            outputs.append(self.v + now)
        return torch.stack(outputs)


class Tuple(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = teacher()

    def forward(self, x):
        return self.net(x), None


def meta():
    with torch.device("meta"):
        return teacher()


def frozen():
    net = student()
    return fit(net.requires_grad_(False), optimizer=lambda p: torch.optim.SGD(p, 0.1))


def frames(n, steps):
    return loader(torch.rand(n, steps, 1, 8, 8))


def plateau(**arguments):
    net = student()
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    Trainer(net, encoder=DirectEncoder(T), optimizer=optimizer, scheduler=scheduler).fit(
        loader(), **arguments
    )


def itself(net):
    return fit(net, teacher=net, **KD)


KD = {"objective": LabelKD()}
ERRORS = {
    "images in NHWC": (
        lambda: fit(data=loader(images(shape=(8, 8, 1)))),
        r"batch is \(8, 8, 8, 1\); images look like .N, H, W, C., give .N, C, H, W.: images.permute\(0, 3,",
    ),
    "uint8 images": (
        lambda: fit(data=loader((images() * 127 + 128).byte())),
        "images are uint8, networks take floats in .-1, 1.; give the data set lasnn_sj.data.transforms, or",
    ),
    "uint8 images, evaluated": (
        lambda: evaluate(student(), loader((images() * 127 + 128).byte()), DirectEncoder(T)),
        "evaluation batch 0: images are uint8",
    ),
    "0..255 with Poisson": (lambda: fit(data=loader(images() * 255), encoder=PoissonEncoder(T)), "pixels"),
    "teacher on the meta device": (
        lambda: fit(teacher=meta(), **KD),
        r"teacher has no values: conv1.weight is on the meta device; build it outside torch.device\('meta'\)",
    ),
    "student on the meta device": (lambda: fit(meta(), encoder=None), "student has no values"),
    "single-step student": (
        lambda: fit(student("s")),
        r"1 is in single-step mode and is given all time steps at once; call|"
        r"0 is in single-step mode: call functional.set_step_mode\(student, 'm'\)",
    ),
    "single-step student, silent": (
        lambda: fit(linear_student("s")),
        r"2 is in single-step mode and is given all time steps at once; call",
    ),
    "no encoder": (
        lambda: fit(encoder=None),
        r"a spiking student takes .T, N, ....: give the trainer encoder=DirectEncoder\(T\)",
    ),
    "events as [N, T, ...]": (
        lambda: fit(data=[(images(6, (T, 1, 8, 8)), torch.arange(6) % K)], encoder=None),
        r"frames look like .N, T, C, H, W., give .T, N, C, H, W.: images.transpose\(0, 1\)",
    ),
    "events as [N, T, ...] with N = T": (
        lambda: fit(data=frames(N, N), encoder=None),
        r"the loader stacks event frames as .N, T, C, H, W..*give the DataLoader",
    ),
    "encoder given as class": (
        lambda: fit(encoder=DirectEncoder),
        r"encoder is the class DirectEncoder; give encoder=DirectEncoder\(T\)",
    ),
    "encoder given as lambda": (
        lambda: fit(encoder=lambda x: x.expand(T, *x.shape)),
        r"encoder must be a module such as DirectEncoder\(T\) .*, got a function; put a function into the",
    ),
    "student given as class": (lambda: fit(nn.Linear), r"student is the class Linear; give a network,"),
    "teacher given as a name": (
        lambda: fit(teacher="resnet20", **KD),
        r"teacher must be a network .*, got the name 'resnet20'; build one, for example with",
    ),
    "teacher returning a tuple": (
        lambda: fit(teacher=Tuple(), **KD),
        r"teacher must give logits .N, 4., as many classes as the student, got a tuple; wrap it in a module",
    ),
    "teacher of other classes": (
        lambda: fit(teacher=models.teacher_resnet20(7, in_channels=1, width=0.125).eval(), **KD),
        r"teacher must give logits .N, 4.*got shape \(2, 7\)",
    ),
    "teacher of other channels": (
        lambda: fit(teacher=models.teacher_resnet20(K, width=0.125).eval(), **KD),
        r"teacher cannot take images \(2, 1, 8, 8\): ",
    ),
    "flat pairs": (lambda: with_pairs(("features.0.neuron", "layer1")), "pairs must be a list of .student"),
    "pairs as dict": (lambda: with_pairs({"features.0.neuron": "layer1"}), "pairs must be a list of"),
    "empty pairs": (lambda: with_pairs([]), "pairs must be a list of .student module"),
    "swapped pairs": (
        lambda: with_pairs([("layer1", "features.0.neuron")]),
        r"student tap 'layer1' matches no module of VGG; it is one of the teacher's: pairs are \(student,",
    ),
    "lr = 0": (
        lambda: fit(optimizer=lambda p: torch.optim.SGD(p, 0.0)),
        "optimizer has lr = 0, so nothing would be trained; give a learning rate above 0",
    ),
    "a frozen student": (frozen, r"only frozen parameters .*call student.requires_grad_\(True\), or"),
    "a data set instead of a loader": (
        lambda: fit(data=loader().dataset),
        r"train_loader is a data set \(TensorDataset\), not a loader of batches; give DataLoader\(dataset,",
    ),
    "a generator instead of a loader": (
        lambda: fit(data=iter(loader())),
        "train_loader is a .*Iter, which can be iterated over only once; give a DataLoader or a",
    ),
    "CUDA that is not there": (
        lambda: fit(device="cuda"),
        "device is cuda, but PyTorch sees no CUDA device; give device='cpu'",
    ),
    "a device that does not exist": (lambda: fit(device="gpu"), "device must be such as cpu, cuda or"),
    "epochs 0": (lambda: fit(epochs=0), "epochs must be a whole number, at least 1, got 0"),
    "epochs -1": (lambda: fit(epochs=-1), "epochs must be a whole number, at least 1, got -1"),
    'epochs "3"': (lambda: fit(epochs="3"), "epochs must be a whole number, at least 1, got '3'"),
    "ReduceLROnPlateau without validation": (plateau, "scheduler is a ReduceLROnPlateau, .*give fit a"),
    "an empty validation loader": (
        lambda: fit(data=NeverTouched(), val=DataLoader(TensorDataset(images(0), torch.arange(0)))),
        "val_loader is empty, the evaluation loader gave no batch; give None for none",
    ),
    "NHWC, evaluated": (
        lambda: evaluate(student(), loader(images(shape=(8, 8, 1))), DirectEncoder(T)),
        r"evaluation batch 0: .*the batch is \(8, 8, 8, 1\); images look like .N, H, W, C.",
    ),
    "float64 images": (
        lambda: fit(data=loader(images().double())),
        r"it is torch.float64, the network's weights are torch.float32: give images.to\(torch.float32\)",
    ),
    "an encoder before an ANN": (
        lambda: fit(models.conv3_linear2(K, 1, 8, 0.1, spiking=False)),
        "the network is an ANN, which has no time steps: leave the encoder out",
    ),
    "images of another size": (
        lambda: fit(models.conv3_linear2(K, 1, 16, 0.1)),
        "the network was built for in_channels=1, image_size=16",
    ),
    "a data set, evaluated": (
        lambda: evaluate(student(), loader().dataset, DirectEncoder(T)),
        r"loader is a data set \(TensorDataset\), not a loader of batches",
    ),
    "no training loader": (
        lambda: Trainer(student(), encoder=DirectEncoder(T)).fit(None),
        "train_loader must give batches, got NoneType; give a DataLoader",
    ),
    "the student as its own teacher": (
        lambda: itself(student()), r"teacher and student are one network, .*give a copy, teacher=copy.deepc"
    ),
    "objective given as class": (
        lambda: fit(objective=LabelKD, teacher=teacher()), r"objective is the class LabelKD; give objective=L"
    ),
    "objective given as a name": (
        lambda: fit(objective="kd"), r"objective must be callable with signals, got 'kd'; give one of"
    ),
    "optimizer given as class": (
        lambda: Trainer(student(), optimizer=torch.optim.Adam),
        r"optimizer must be an object such as torch.optim.Adam\(student.parameters\(\), lr=1e-4\), got the",
    ),
    "optimizer given as a name": (
        lambda: Trainer(student(), optimizer="adam"), "optimizer must be an object such as .*, got 'adam'"
    ),
    "scheduler given as class": (
        lambda: Trainer(student(), scheduler=torch.optim.lr_scheduler.StepLR),
        "scheduler must be an object such as .*, got the class StepLR",
    ),
    "options given as a dict": (
        lambda: fit(options={"precision": "bfloat16"}), "options must be an object such as TrainingOptions"
    ),
    "one callback": (lambda: fit(callbacks=Callback()), r"callbacks must be a list of objects, such as"),
    "a callback's class": (lambda: fit(callbacks=[Callback]), "callbacks must be a list of objects"),
    "a seed in quotes": (lambda: fit(seed="0"), "seed must be a whole number or None, got '0'"),
    "lr = nan": (
        lambda: fit(optimizer=lambda p: torch.optim.SGD(p, float("nan"))),
        "optimizer has lr = nan, which is not finite; give a learning rate above 0",
    ),
    "a loader in place of images": (
        lambda: balance_thresholds(models.conv3_linear2(K, 1, 8, 0.1), loader(), DirectEncoder(T)),
        r"images must be one batch .N, C, H, W., got a DataLoader; of a loader give the images of next",
    ),
    "a name in place of an ANN": (lambda: convert("vgg9"), "ann must be a network .*, got 'vgg9'"),
    "a run_dir that cannot be made": (
        lambda: fit(run_dir="/proc/run"), "run_dir /proc/run cannot be made .*; give a folder elsewhere"
    ),
    "clip_norm in quotes": (lambda: TrainingOptions(clip_norm="1"), "clip_norm must be above 0, or None"),
    "an unknown precision": (lambda: TrainingOptions(precision="half"), 'precision must be "float32", '),
}  # fmt: skip


class NeverTouched:
    def __iter__(self):
        raise AssertionError("this mistake is to be found before the first epoch")


@pytest.mark.parametrize("mistake", ERRORS)
def test_it_ends_in_one_sentence(mistake):
    call, message = ERRORS[mistake]
    if "CUDA" in mistake and torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


class OwnLoss:
    """An objective as a newcomer writes one: a plain class that says nothing of a teacher."""

    def __init__(self, parts):
        self.parts = parts

    def __call__(self, signals):
        return self.parts(signals)


def own(parts):
    return fit(objective=OwnLoss(parts))


DICT = "OwnLoss must return a dict of the loss' parts by name, .*, got "
OWN = {
    "a tensor": (lambda: own(lambda s: s.scores.sum()), TypeError, f"{DICT}Tensor"),
    "an empty dict": (lambda: own(lambda s: {}), TypeError, f"{DICT}an empty dict"),
    "nothing": (lambda: own(lambda s: None), TypeError, f"{DICT}NoneType"),
    "a vector": (
        lambda: own(lambda s: {"ce": s.scores[:, 0]}), TypeError, "part 'ce' of OwnLoss must be a scalar ten"
    ),
    "a number": (lambda: own(lambda s: {"ce": 1.0}), TypeError, "of OwnLoss must be a scalar .*, got float"),
    "a detached part": (
        lambda: own(lambda s: {"ce": s.scores.detach().sum()}), ValueError,
        "the loss of OwnLoss.* depends on no weight, .*compute it from signals.scores, without detach",
    ),
    "logits of no teacher": (
        lambda: own(lambda s: {"kd": (s.teacher_logits - s.scores).sum()}), ValueError,
        "OwnLoss reads the teacher's logits, but there are none .*; give its class needs_teacher = True, and",
    ),
    "a teacher that it does not ask for": (
        lambda: fit(objective=OwnLoss(None), teacher=teacher()), ValueError,
        r"objective OwnLoss\(parts=None\) makes no use of the teacher; .*says so by needs_teacher = True",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", OWN)
def test_an_objective_of_one_s_own_that_gives(mistake):
    call, kind, message = OWN[mistake]
    with pytest.raises(kind, match=message):
        call()


def test_gradient_attention_of_stock_neurons_suggests_accelerate(caplog):
    suggested = r"spike activation maps of 1 \(IFNode\) are computed from the output spikes; .*accelerate"
    arguments = {"kind": LaSNNTrainer, "teacher": teacher(), "attention": "gradient"}
    with caplog.at_level(logging.INFO, "lasnn_sj"):
        fit(accelerate(student()), **arguments)
        assert not re.search(suggested, caplog.text)
        (row,) = fit(**arguments)
    assert re.search(suggested, caplog.text)
    assert 0 < row["attention"] < 0.45 * 3


def test_an_objective_s_class_in_a_sum():
    with pytest.raises(TypeError, match=r"an objective is the class LabelKD; give LabelKD\(...\)"):
        CrossEntropy() + LabelKD


def test_a_run_dir_that_is_a_file(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ValueError, match="run_dir must be a folder, .*run is a file; give another name"):
        fit(run_dir=tmp_path / "run")


def silent_student():
    return student(v_threshold=1000.0)


WARNINGS = {
    "0..255 with direct input": (
        lambda: fit(data=loader((images() + 1) * 127)),
        r"images reach \d+.*, networks take pixels in .-1, 1.; divide by 127.5 and subtract 1",
    ),
    "0..255 with direct input, evaluated": (
        lambda: evaluate(student(), loader((images() + 1) * 127), DirectEncoder(T)), r"images reach \d+",
    ),
    "a network that keeps its state": (
        lambda: fit(KeepsState(), encoder=DirectEncoder(T)),
        "another output for the same input after functional.reset_net: it keeps a state",
    ),
    "alpha = 100": (
        lambda: fit(
            models.conv3_linear2(K, in_channels=1, image_size=8, width=0.1),
            kind=LaSNNTrainer, teacher=teacher(), alpha=100,
        ),
        "alpha = 100 lets attention outweigh the cross-entropy; the paper has 0.9",
    ),
    "float16 on the CPU": (
        lambda: fit(options=TrainingOptions(precision="float16")),
        "precision='float16' is slower than 'float32' on a CPU, many times; give 'bfloat16'",
    ),
    "a silent student": (
        lambda: fit(silent_student()),
        r"no spike on the first 8 samples in 1: .*lower v_threshold, balance the thresholds .*, or add",
    ),
    "a silent student, evaluated": (
        lambda: evaluate(silent_student(), loader(), DirectEncoder(T)),
        "no spike on the first 8 samples in 1: ",
    ),
    "a silent student whose output has no bias": (
        lambda: fit(nn.Sequential(*silent_student()[:3], layer.Linear(256, K, bias=False, step_mode="m"))),
        "no spike on the first 8 samples in 1, the output: ",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", WARNINGS)
def test_it_is_said_in_a_warning(mistake, caplog):
    call, message = WARNINGS[mistake]
    call()
    found = [r for r in caplog.records if r.levelno == logging.WARNING and re.search(message, r.message)]
    assert len(found) == 1


def test_a_fresh_network_with_batch_norm_is_not_called_silent(caplog):
    """By its first running averages it would be; training uses the batch's own."""
    net = models.spiking_resnet18(K, 1, 8, 0.1)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    trainer = Trainer(net, encoder=DirectEncoder(2))
    trainer.prepare(images(32), torch.arange(32) % K)
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []
    assert all(torch.equal(buffer, before[name]) for name, buffer in net.named_buffers())
    evaluate(net, loader(), DirectEncoder(2))
    assert re.search(
        "no signal passes; lower v_threshold, or, after the first steps, train on: batch norm's", caplog.text
    )


def test_nothing_is_said_where_nothing_is_wrong(caplog):
    """A teacher from another device is brought along; frames [T, N, ...] with N = T are right."""
    fit(teacher=teacher(), val=loader(), **KD)
    fit(data=[(torch.rand(N, N, 1, 8, 8), torch.arange(N) % K)], encoder=None)
    fit(linear_student())
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []


def test_a_custom_loop_over_time_may_use_single_steps(caplog):
    class Loop(base.MemoryModule):
        def __init__(self):
            super().__init__()
            self.net = linear_student("s")

        def forward(self, x):
            return torch.stack([self.net(now) for now in x])

    fit(Loop())
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == []
