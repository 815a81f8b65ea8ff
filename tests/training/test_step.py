"""Precision, compilation, accumulation, clipping, pieces of time: the same step within what is stated."""

import json

import pytest
import torch
from options import with_options
from processes import together
from safetensors.torch import load_file
from spikingjelly.activation_based import functional, layer, neuron, surrogate
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lasnn_sj import Callback, DirectEncoder, PoissonEncoder, models
from lasnn_sj.distillation import Attention, CrossEntropy, Sum
from lasnn_sj.distillation.taps import ChunkTaps, StudentTaps
from lasnn_sj.models.readout import BatchError
from lasnn_sj.neurons import LIFNode, convolution, linear, packing
from lasnn_sj.training import Trainer, TrainingOptions
from lasnn_sj.training.forward import StudentForward
from lasnn_sj.training.nonfinite import NonFiniteError

K, T = 4, 12
GENERATOR = torch.Generator().manual_seed(0)
X, Y = torch.rand(6, 1, 8, 8, generator=GENERATOR) * 2 - 1, torch.arange(6) % K


def paper_student(dropout):
    net = models.conv3_linear2(K, in_channels=1, image_size=8, width=0.15, dropout=dropout)
    for module in net.modules():
        if hasattr(module, "v_threshold"):
            module.v_threshold = 0.3
    return net


def stock_student():
    def lif():
        return neuron.LIFNode(v_threshold=0.1, surrogate_function=surrogate.ATan(), detach_reset=True)

    net = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1), lif(), layer.MaxPool2d(2), layer.Conv2d(8, 8, 3, padding=1), lif(),
        layer.Flatten(), layer.Dropout(0.3), layer.Linear(8 * 16, K),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def make(
    student="paper", attention="activation", dropout=0.2, code="poisson", run_dir=None, steps=T,
    alpha=0.9, through_trace=False, objective=None, **arguments
):  # fmt: skip
    torch.manual_seed(0)
    net = paper_student(dropout) if student == "paper" else stock_student()
    teacher = models.teacher_resnet20(K, in_channels=1, width=0.125).eval()
    poisson = PoissonEncoder(steps, torch.Generator().manual_seed(1))
    objective = CrossEntropy() if objective is None else objective
    if attention:
        objective = Sum((objective, Attention(attention, alpha=alpha, through_trace=through_trace)))
    return Trainer(
        net, objective, teacher=teacher if attention else None,
        encoder=poisson if code == "poisson" else DirectEncoder(steps), run_dir=run_dir, seed=0,
        optimizer=torch.optim.SGD(net.parameters(), lr=1.0), **with_options(arguments),
    )  # fmt: skip


def step(**arguments):
    """Parts of the loss and gradients of one step from the same weights and random numbers."""
    trainer = make(**arguments)
    torch.manual_seed(7)
    result = trainer.train_step(X, Y)
    gradients = {name: p.grad.clone() for name, p in trainer.student.named_parameters()}
    return result.parts, gradients, result.scores


def close(one, other, tolerance):
    """Parts and scores by value, gradients by their distance relative to their length."""
    for name, part in one[0].items():
        assert other[0][name].item() == pytest.approx(part.item(), rel=tolerance), name
    torch.testing.assert_close(other[2], one[2], rtol=tolerance, atol=tolerance)
    for name, gradient in one[1].items():
        assert gradient.norm() > 0, name
        assert (other[1][name] - gradient).norm() <= tolerance * gradient.norm(), name


@pytest.mark.parametrize("time_chunks", [2, 5, T])
@pytest.mark.parametrize(
    "arguments",
    [
        {"attention": "activation"},
        {"attention": "gradient"},
        {"attention": "gradient", "through_trace": True},
        {"attention": None, "code": "direct"},
        {"student": "stock", "attention": "activation"},
    ],
    ids=["activation", "gradient", "through trace", "direct", "stock"],
)
def test_pieces_of_time_have_the_gradients_of_the_whole(arguments, time_chunks):
    """Poisson code and dropout included; 12 steps in pieces of 6, of 2 and 3, of 1."""
    close(step(**arguments), step(time_chunks=time_chunks, **arguments), 1e-4)


def test_pieces_of_time_that_forgot_the_state_would_be_seen():
    """The same student run on halves by themselves: its gradients are far off."""
    whole = step(code="direct", attention=None)
    trainer = make(code="direct", attention=None, steps=T // 2)
    torch.manual_seed(7)
    scores = trainer.train_step(X, Y).scores
    assert (scores - whole[2]).norm() > 0.1 * whole[2].norm()


@pytest.mark.parametrize("attention", ["activation", "gradient"])
@pytest.mark.parametrize("accumulate", [2, 4, 6, 100])
def test_accumulated_pieces_have_the_gradients_of_the_batch(attention, accumulate):
    """6 images in pieces of 3, of 1 and 2, of 1; more pieces than images are images."""
    arguments = {"attention": attention, "dropout": 0.0, "code": "direct"}
    close(step(**arguments), step(accumulate=accumulate, **arguments), 1e-4)


def vector(net):
    return torch.cat([p.detach().flatten() for p in net.parameters()])


def test_clipping_by_hand():
    """Plain SGD at rate 1 moves by the gradient: clipped, by clip_norm in its direction."""
    moved = []
    for clip_norm in (None, 0.01):
        trainer = make(clip_norm=clip_norm)
        before = vector(trainer.student)
        torch.manual_seed(7)
        trainer.train_step(X, Y)
        moved.append(vector(trainer.student) - before)
    assert moved[0].norm() > 0.1
    assert moved[1].norm() == pytest.approx(0.01, rel=1e-3)
    torch.testing.assert_close(moved[1] / 0.01, moved[0] / moved[0].norm(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("precision", "tolerance"), [("bfloat16", 0.05), ("float16", 0.01)])
@pytest.mark.parametrize("attention", ["activation", "gradient"])
def test_half_precision_has_the_losses_of_float32(precision, tolerance, attention):
    """Of stock layers over SpikingJelly's and of ours; weights stay float32."""
    one = step(attention=attention)
    trainer = make(attention=attention, precision=precision)
    torch.manual_seed(7)
    result = trainer.train_step(X, Y)
    parts, scores = result.parts, result.scores
    for name, part in one[0].items():
        assert parts[name].item() == pytest.approx(part.item(), rel=tolerance)
    assert scores.dtype == torch.float32
    assert {p.dtype for p in trainer.student.parameters()} == {torch.float32}
    assert not torch.equal(scores, one[2])  # else nothing was cast


@pytest.mark.parametrize("through_trace", [False, True])
def test_maps_of_pieces_are_float32_in_half_precision(through_trace):
    """The same spikes, whole and in pieces: maps must agree far better than bfloat16's 8 bits."""
    node = LIFNode(step_mode="m")
    x = torch.rand(T, 2, 3, 4, 4, generator=torch.Generator().manual_seed(2)).bfloat16() * 2
    student = nn.Sequential(node)
    maps = []
    for make_taps, chunks in (
        (lambda: StudentTaps(student, [("0", "activation_map")], through_trace), 1),
        (lambda: ChunkTaps(student, [("0", "activation_map")], through_trace), 3),
    ):
        with torch.autocast("cpu", torch.bfloat16):
            forward = StudentForward(Scores(student), make_taps(), chunks)
            maps.append(forward(x)[1][0])
        functional.reset_net(student)
    assert maps[1].dtype == torch.float32
    torch.testing.assert_close(maps[1], maps[0], rtol=1e-5, atol=0)


class Scores(nn.Module):
    """Class scores [T, N, K] of a network's spikes."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x).mean((3, 4))


@pytest.mark.parametrize(("precision", "expected"), [("tf32", {(True, True)}), ("float32", {(False, False)})])
def test_tf32_is_set_for_a_whole_step_and_only_then(precision, expected):
    flags, seen = (torch.backends.cudnn, torch.backends.cuda.matmul), []

    def now(*_):
        seen.append(tuple(flag.allow_tf32 for flag in flags))

    class Watched(CrossEntropy):
        def __call__(self, signals):
            now()
            signals.scores.register_hook(now)
            return super().__call__(signals)

    before = [flag.allow_tf32 for flag in flags]
    try:
        for flag in flags:
            flag.allow_tf32 = False
        trainer = make(attention=None, objective=Watched(), precision=precision)
        trainer.optimizer.register_step_pre_hook(now)
        trainer.train_step(X, Y)
        assert len(seen) == 3
        assert set(seen) == expected
        now()
        assert seen[-1] == (False, False)
    finally:
        for flag, value in zip(flags, before):
            flag.allow_tf32 = value


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_student_learns_in_half_precision_with_all_switches_together(precision, tmp_path):
    images = torch.cat([X, X])
    loader = DataLoader(TensorDataset(images, torch.cat([Y, Y])), 6)
    trainer = make(
        attention="gradient", precision=precision, accumulate=2, time_chunks=3, clip_norm=1.0,
        on_nonfinite="skip", checkpoint_every=1, run_dir=tmp_path,
    )  # fmt: skip
    trainer.optimizer.param_groups[0]["lr"] = 0.3
    history = trainer.fit(loader, epochs=8)
    assert history[-1]["loss"] < 0.97 * history[0]["loss"]


def test_float16_finds_its_scale_and_keeps_it_over_a_restart(tmp_path):
    """At a scale of 2^60 the first gradients overflow: no step, half the scale, until they fit."""
    loader = DataLoader(TensorDataset(X, Y), 6)
    trainer = make(precision="float16", run_dir=tmp_path)
    trainer.mixed_precision.scaler = trainer.progress.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24)
    before = trainer.student.output.weight.clone()
    trainer.fit(loader, epochs=1)
    assert torch.equal(before, trainer.student.output.weight)
    assert trainer.mixed_precision.scaler.get_scale() == 2.0**23
    again = make(precision="float16", run_dir=tmp_path)
    again.fit(loader, epochs=2)
    assert again.mixed_precision.scaler.get_scale() in (2.0**22, 2.0**23)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [
        ({"attention": "activation"}, 1e-3),
        ({"attention": "gradient"}, 1e-3),
        ({"attention": "activation", "time_chunks": 3, "accumulate": 2, "clip_norm": 1.0}, 1e-3),
        ({"attention": "activation", "precision": "bfloat16"}, 0.05),
    ],
)
def test_compiled_steps_are_those_of_plain_ones(arguments, tolerance):
    """A fit that follows another has taps of its own, which the compiled pass must see."""
    arguments = {"dropout": 0.0, "code": "direct"} | arguments
    plain, compiled = make(**arguments), make(compile=True, **arguments)
    loader = DataLoader(TensorDataset(X, Y), 3)
    for epochs in (1, 2):
        one, other = plain.fit(loader, epochs=epochs)[-1], compiled.fit(loader, epochs=epochs)[-1]
        for name in ("loss", "ce", "attention"):
            assert other[name] == pytest.approx(one[name], rel=tolerance)


def test_switches_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"time_chunks cannot be used with batch norm \(1\)"):
        Trainer(
            nn.Sequential(layer.Conv2d(1, 2, 3), layer.BatchNorm2d(2)), options=TrainingOptions(time_chunks=2)
        )
    with pytest.raises(ValueError, match="time_chunks must be at most the T = 12 time steps, got 13"):
        make(time_chunks=13).train_step(X, Y)
    flat = nn.Sequential(nn.Flatten(1), nn.Linear(64, K))
    with pytest.raises(
        ValueError, match=r"needs a student that gives \[T, N, K\], Sequential gives \(3, 4\)"
    ):
        Trainer(flat, options=TrainingOptions(time_chunks=2)).train_step(X, Y)
    for name, value in {
        "accumulate": 0,
        "time_chunks": 1.5,
        "clip_norm": 0.0,
        "checkpoint_every": True,
    }.items():
        with pytest.raises(ValueError, match=f"{name} must be"):
            make(**{name: value})
    with pytest.raises(
        ValueError, match='precision must be "float32", "tf32", "bfloat16" or "float16", got \'half\''
    ):
        make(precision="half")
    with pytest.raises(ValueError, match='on_nonfinite must be "stop" or "skip"'):
        make(on_nonfinite="ignore")


# ---- losses and gradients that are not finite ----


class Spoiled(CrossEntropy):
    """Cross-entropy whose value or gradient is infinite at one call."""

    def __init__(self, at, what):
        object.__setattr__(self, "calls", 0)
        object.__setattr__(self, "at", at)
        object.__setattr__(self, "what", what)

    def __call__(self, signals):
        object.__setattr__(self, "calls", self.calls + 1)
        ce = super().__call__(signals)["ce"]
        if self.calls == self.at:
            if self.what == "loss":
                return {"ce": ce * torch.inf}
            zero = signals.scores.sum() * 0
            return {"ce": ce + zero.abs().sqrt()}  # 0, with a slope that is none
        return {"ce": ce}


LOADER = DataLoader(TensorDataset(X, Y), 2)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_and_is_kept(tmp_path, what):
    trainer = make(objective=Spoiled(5, what), run_dir=tmp_path)
    weights = []

    class Weights(Callback):
        def on_step(self, trainer, parts):
            weights.append({n: t.clone() for n, t in trainer.student.state_dict().items()})

    trainer.callbacks.append(Weights())
    message = rf"batch 1 of epoch 2: the {what} is not finite.*samples are \[2, 3\]; the step is kept in"
    with pytest.raises(NonFiniteError, match=message) as raised:
        trainer.fit(LOADER, epochs=3)
    if what == "gradient":
        assert raised.value.layer == "output.weight"
    kept = load_file(tmp_path / "nonfinite" / "student.safetensors")
    now = trainer.student.state_dict()
    assert all(torch.equal(kept[n], weights[-1][n]) and torch.equal(now[n], kept[n]) for n in kept)
    batch = load_file(tmp_path / "nonfinite" / "batch.safetensors")
    assert torch.equal(batch["images"], X[2:4])
    assert batch["labels"].tolist() == [2, 3]
    told = json.loads((tmp_path / "nonfinite" / "what.json").read_text())
    assert (told["step"], told["epoch"], told["batch"], told["indices"]) == (5, 2, 1, [2, 3])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_not_finite_is_left_out_and_counted(caplog, what):
    trainer = make(objective=Spoiled(5, what), on_nonfinite="skip")
    history = trainer.fit(LOADER, epochs=3)
    assert [row.get("skipped") for row in history] == [None, 1, None]
    assert trainer.step == 8
    assert all(torch.isfinite(p).all() for p in trainer.student.parameters())
    assert f"left out: batch 1 of epoch 2: the {what} is not finite" in caplog.text


def test_batch_norm_forgets_a_step_that_was_left_out():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, K))
    spoiled = X.clone()
    spoiled[2:4] = 3e38  # finite, but not what the linear layer makes of it
    trainer = Trainer(net, options=TrainingOptions(on_nonfinite="skip"))
    history = trainer.fit(DataLoader(TensorDataset(spoiled, Y), 2), epochs=1)
    assert history[0]["skipped"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in net.state_dict().values())
    assert net[2].num_batches_tracked == 2


def test_only_steps_that_are_not_finite():
    with pytest.raises(BatchError, match="gave only batches that were left out, 3 in epoch 1"):
        make(alpha=float("inf"), on_nonfinite="skip").fit(LOADER, epochs=1)


@pytest.mark.parametrize("student", ["paper", "stock"])
def test_the_first_layer_that_is_not_finite_is_named(student):
    trainer = make(student=student)
    trainer.prepare(X, Y)
    name = "features.2.weights" if student == "paper" else "3"
    with torch.no_grad():
        trainer.student.get_submodule(name).weight[0, 0] = torch.inf
    with pytest.raises(NonFiniteError, match=rf"not finite.*first in {name}$") as raised:
        trainer.train_step(X, Y)
    assert raised.value.layer == name


@pytest.mark.parametrize(("time_chunks", "processes"), [(1, 1), (2, 1), (1, 2)])
def test_layers_that_leave_zeros_out_train_as_dense_ones(time_chunks, processes, monkeypatch):
    """With taps, dropout masks, pieces of time, and two processes; a flipped spike may change a digit."""
    calls = []
    for module, names in (
        (linear, ["sparse_product"]),
        (convolution, ["sparse_convolution", "sparse_weight_gradient"]),
    ):
        for name in names:
            kernel = getattr(module, name)
            noted = lambda a, b, kernel=kernel: calls.append(kernel.__name__) or kernel(a, b)  # noqa: E731
            monkeypatch.setattr(module, name, noted)

    def step(rank=0):
        torch.manual_seed(0)
        net = models.conv3_linear2(K, in_channels=1, image_size=8, width=0.5, dropout=0.2)
        teacher = models.teacher_resnet20(K, in_channels=1, width=0.125).eval()
        encoder = PoissonEncoder(T, torch.Generator().manual_seed(1))
        objective, options = Sum((CrossEntropy(), Attention())), TrainingOptions(time_chunks=time_chunks)
        trainer = Trainer(net, objective, teacher=teacher, encoder=encoder, seed=0, options=options)
        parts = trainer.train_step(X, Y).parts
        return float(parts["attention"]), torch.cat([p.grad.flatten() for p in net.parameters()]), set(calls)

    def run():
        return together(step)[0] if processes > 1 else step()

    dense = run()
    assert not dense[2]
    for name, value in {"SMALLEST": 1, "DENSEST": 0.9, "COPYING": 0, "COLUMNS": 1}.items():
        monkeypatch.setattr(linear, name, value)
    for name, value in {"SMALLEST": 1, "OUTPUT": 0.9, "WEIGHT": 0.9, "PIXELS": 1}.items():
        monkeypatch.setattr(convolution, name, value)
    monkeypatch.setattr(packing, "SMALLEST", 0)
    sparse = run()
    assert sparse[2] == {"sparse_product", "sparse_convolution", "sparse_weight_gradient"}
    assert sparse[0] == pytest.approx(dense[0], rel=1e-3)
    assert float(torch.cosine_similarity(sparse[1], dense[1], dim=0)) > 0.999
    assert float(sparse[1].norm() / dense[1].norm()) == pytest.approx(1, abs=0.01)
