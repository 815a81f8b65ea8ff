"""Inspections hold the values that the networks gave, and change nothing."""

import importlib.metadata
import json
import sys

import numpy as np
import pytest
import torch
from spikingjelly.activation_based import functional, layer, neuron
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lasnn_sj import DirectEncoder, LaSNNTrainer, PoissonEncoder, models
from lasnn_sj.analysis.energy import count_operations
from lasnn_sj.analysis.environment import environment
from lasnn_sj.analysis.inspection import inspect, inspect_student
from lasnn_sj.analysis.spikes import record_traces, spike_statistics
from lasnn_sj.distillation import Attention, activation_map, spike_activation_map
from lasnn_sj.distillation.taps import TapError
from lasnn_sj.models.readout import BatchError
from lasnn_sj.training.evaluation import evaluate

K, T = 4, 4


def batches(n=24, size=8, shape=(3, 16, 16)):
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(n, *shape, generator=generator) * 2 - 1
    return DataLoader(TensorDataset(x, torch.arange(n) % K), size)


def student(seed=0):
    torch.manual_seed(seed)
    net = models.conv3_linear2(K, 3, 16, width=0.1)
    for module in net.modules():
        if hasattr(module, "v_threshold"):
            module.v_threshold = 0.2
    return net


def teacher():
    torch.manual_seed(1)
    return models.teacher_resnet20(K, width=0.25).eval()


def read(folder):
    with np.load(folder / "inspection.npz", allow_pickle=False) as arrays:
        return json.loads((folder / "inspection.json").read_text()), dict(arrays)


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    folder, net = tmp_path_factory.mktemp("run"), student()
    path = inspect_student(net, teacher(), batches(), DirectEncoder(T), folder, seed=3, examples=6)
    assert path == folder / "inspection.json"
    return net, *read(folder)


def test_accuracy_spikes_and_energy_are_those_of_their_own_functions(seen):
    net, found, _ = seen
    result = evaluate(net, batches(), DirectEncoder(T), over_time=True)
    assert {key: found[key] for key in result} == result
    spikes = spike_statistics(net, batches(), DirectEncoder(T))
    assert [layer["name"] for layer in found["layers"]] == list(spikes.neurons)
    assert [layer["neurons"] for layer in found["layers"]] == list(spikes.neurons.values())
    for entry in found["layers"]:
        assert entry["spikes_per_neuron"] == spikes.spikes_per_neuron[entry["name"]]
        assert entry["firing_rate"] * T == pytest.approx(entry["spikes_per_neuron"])
        assert entry["v_threshold"] == 0.2
    assert found["spikes_per_neuron"] == spikes.mean > 0
    operations = count_operations(net, batches(), DirectEncoder(T))
    assert found["operations"]["synops"] == list(operations.synops)
    assert found["operations"]["energy_pj"] == operations.energy_pj
    assert found["operations"]["ann_energy_pj"] == operations.ann_energy_pj
    assert (found["seed"], found["T"], found["readout"]) == (3, T, "last")
    assert found["parameters"] == sum(p.numel() for p in net.parameters())


def test_examples_are_right_and_wrong_ones_with_both_networks_maps(seen):
    net, found, arrays = seen
    x, labels = batches(24, 24).dataset.tensors
    with torch.no_grad():
        guesses = net.eval()(DirectEncoder(T)(x))[-1].argmax(1)
        functional.reset_net(net)
        taught = teacher()(x).argmax(1)
    right = [e["label"] == e["prediction"] for e in found["examples"]]
    assert right == [True] * 3 + [False] * 3
    for entry in found["examples"]:
        assert entry["label"] == labels[entry["index"]]
        assert entry["prediction"] == guesses[entry["index"]]
        assert entry["teacher"] == taught[entry["index"]]
    chosen = x[[entry["index"] for entry in found["examples"]]]
    np.testing.assert_array_equal(
        arrays["inputs"], (127.5 * (chosen + 1)).round().numpy().astype(np.uint8).transpose(0, 2, 3, 1)
    )
    seen_spikes, activations = {}, {}
    hooks = []
    for number, level in enumerate(found["levels"]):
        for network, into in ((net, seen_spikes), (the_teacher := teacher(), activations)):
            name = level["student"] if network is net else level["teacher"]
            hooks.append(network.get_submodule(name).register_forward_hook(
                lambda m, args, out, into=into, number=number: into.__setitem__(number, out)
            ))  # fmt: skip
        with torch.no_grad():
            the_teacher(chosen)
    with torch.no_grad():
        net(DirectEncoder(T)(chosen))
    functional.reset_net(net)
    for hook in hooks:
        hook.remove()
    assert len(found["levels"]) == 3
    for number in range(3):
        rate, activation = seen_spikes[number].mean(0), activations[number]
        expected = activation_map(rate, power=1).view(-1, *rate.shape[-2:])
        np.testing.assert_allclose(arrays[f"student_{number}"], expected, atol=1e-6)
        expected = activation_map(activation).view(-1, *activation.shape[-2:])
        np.testing.assert_allclose(arrays[f"teacher_{number}"], expected, atol=1e-6)
        norms = np.square(arrays[f"teacher_{number}"]).sum((1, 2))
        np.testing.assert_allclose(norms, 1, rtol=1e-5)


def test_the_confusion_matrix_counts_every_sample(seen):
    net, _, arrays = seen
    x, labels = batches(24, 24).dataset.tensors
    with torch.no_grad():
        guesses = net.eval()(DirectEncoder(T)(x))[-1].argmax(1)
    functional.reset_net(net)
    expected = np.zeros((K, K))
    for label, guess in zip(labels, guesses):
        expected[label, guess] += 1
    np.testing.assert_array_equal(arrays["confusion"], expected)


def test_traces_are_those_of_the_first_example(seen):
    net, found, arrays = seen
    image = batches().dataset.tensors[0][[found["examples"][0]["index"]]]
    traces = record_traces(net, image, DirectEncoder(T))
    assert [entry["layer"] for entry in found["traces"]] == list(traces.neurons)
    assert [entry["neurons"] for entry in found["traces"]] == list(traces.neurons.values())
    assert {entry["v_threshold"] for entry in found["traces"]} == {0.2}
    np.testing.assert_array_equal(arrays["trace_spikes"], torch.cat(list(traces.spikes.values()), 1))
    np.testing.assert_array_equal(arrays["trace_potentials"], torch.cat(list(traces.potentials.values()), 1))


def test_names_of_the_classes(tmp_path):
    loader = batches()
    loader.dataset.classes = ["cat", "dog", "bird", "fish", "more"]
    inspect_student(student(), None, loader, DirectEncoder(T), tmp_path)
    assert read(tmp_path)[0]["classes"] == ["cat", "dog", "bird", "fish"]
    part = DataLoader(torch.utils.data.Subset(loader.dataset, range(8)), 8)
    inspect_student(student(), None, part, DirectEncoder(T), tmp_path)
    assert read(tmp_path)[0]["classes"] == ["cat", "dog", "bird", "fish"]
    inspect_student(student(), None, batches(), DirectEncoder(T), tmp_path, classes="abcd")
    assert read(tmp_path)[0]["classes"] == list("abcd")
    inspect_student(student(), None, batches(), DirectEncoder(T), tmp_path)
    assert read(tmp_path)[0]["classes"] is None


def test_a_network_that_needs_its_whole_sequence_has_no_traces(tmp_path):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = student()

        def forward(self, x):
            if len(x) != T:
                raise RuntimeError(f"this network takes {T} steps")
            return self.net(x)

    inspect_student(Whole(), None, batches(), DirectEncoder(T), tmp_path)
    found, arrays = read(tmp_path)
    assert found["traces"] == []
    assert "trace_spikes" not in arrays


def test_gradient_maps(tmp_path):
    net = student()
    inspect_student(
        net, teacher(), batches(), DirectEncoder(T), tmp_path, attention=Attention("gradient"), examples=2
    )
    found, arrays = read(tmp_path)
    images = torch.stack([batches().dataset[e["index"]][0] for e in found["examples"]])
    spikes = {}
    hook = net.features[0].neuron.register_forward_hook(lambda m, a, out: spikes.update(out=out))
    with torch.no_grad():
        net.eval()(DirectEncoder(T)(images))
    hook.remove()
    expected = spike_activation_map(spikes["out"]).view(-1, 16, 16)
    np.testing.assert_allclose(arrays["student_0"], expected, atol=1e-6)
    assert arrays["teacher_0"].shape == (2, 16, 16)
    assert np.square(arrays["teacher_0"]).sum((1, 2)) == pytest.approx([1, 1])


@pytest.mark.parametrize("part_of_another", [False, True])
def test_looking_changes_nothing(part_of_another, tmp_path):
    own = torch.Generator().manual_seed(5)
    encoder = PoissonEncoder(T, own)
    encoder = nn.Sequential(encoder) if part_of_another else encoder
    net, the_teacher = student().train(), teacher()
    net.features[1].eval()
    torch.manual_seed(11)
    inspect_student(net, the_teacher, batches(), encoder, tmp_path)
    after = torch.rand(3), torch.rand(3, generator=own)
    torch.manual_seed(11)
    assert torch.equal(after[0], torch.rand(3))
    assert torch.equal(after[1], torch.rand(3, generator=torch.Generator().manual_seed(5)))
    assert net.training
    assert not net.features[1].training
    assert not the_teacher.training
    assert not net.features[0].neuron.record
    assert not any(isinstance(getattr(m, "v", None), torch.Tensor) for m in net.modules())
    assert not any(module._forward_hooks for module in net.modules())


def test_event_frames_and_no_teacher(tmp_path):
    frames = torch.randint(0, 3, (4, 6, 2, 8, 8)).float()
    torch.manual_seed(0)
    net = nn.Sequential(
        layer.Conv2d(2, 4, 3, padding=1, bias=False), neuron.IFNode(v_threshold=0.1), layer.MaxPool2d(2),
        layer.Flatten(), layer.Linear(4 * 4 * 4, K),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    inspect_student(net, None, [(frames, torch.arange(6) % K)], None, tmp_path, examples=4)
    found, arrays = read(tmp_path)
    assert found["levels"] == [{"student": "1", "teacher": None}]
    assert sorted(arrays) == ["confusion", "inputs", "student_0", "trace_potentials", "trace_spikes"]
    assert (found["teacher"], found["missing"], found["T"]) == (None, None, 4)
    assert all(entry["teacher"] is None for entry in found["examples"])
    assert not any(found["operations"]["macs"])  # events are spikes
    one = frames[:, [entry["index"] for entry in found["examples"]]].sum(0)
    first = torch.nonzero((one[0, 0] == 0) & (one[0, 1] == 0))
    assert all((arrays["inputs"][0, h, w] == 255).all() for h, w in first)  # no event is white


def test_a_student_without_feature_maps_has_the_rest(tmp_path):
    net = nn.Sequential(layer.Flatten(), layer.Linear(3, 8), neuron.IFNode(), layer.Linear(8, K))
    functional.set_step_mode(net, "m")
    inspect_student(net, None, batches(shape=(3, 1, 1)), DirectEncoder(T), tmp_path)
    found, arrays = read(tmp_path)
    assert found["levels"] == []
    assert "has no spiking layer with a feature map" in found["missing"]
    assert len(found["top1_over_time"]) == T
    exits = found["early_exit"]
    assert len(exits["confidence"]) == len(exits["steps"]) == len(exits["top1"])
    assert (exits["steps"][0], exits["top1"][0]) == (1, found["top1_over_time"][0])
    assert exits["steps"] == sorted(exits["steps"])
    assert (exits["steps"][-1], exits["top1"][-1]) == (T, pytest.approx(found["top1"]))
    assert not any(name.startswith(("student", "teacher")) for name in arrays)


@pytest.mark.parametrize("encoder", [DirectEncoder(T), None])
def test_features_instead_of_images(tmp_path, encoder):
    net = nn.Sequential(layer.Linear(5, 8), neuron.IFNode(), layer.Linear(8, K))
    functional.set_step_mode(net, "m")
    x = torch.rand(6, 5) * 2 - 1
    batch = (x if encoder else x.expand(T, 6, 5), torch.arange(6) % K)
    inspect_student(net, None, [batch], encoder, tmp_path, examples=4)
    found, arrays = read(tmp_path)
    assert (found["T"], found["samples"], len(found["examples"])) == (T, 6, 4)
    assert arrays["inputs"].shape == (4, 1, 5, 3)


def test_scores_without_steps_and_a_teacher_without_maps(tmp_path):
    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = student()

        def forward(self, x):
            return self.net(x)[-1]

    scorer = nn.Sequential(nn.Flatten(), nn.Linear(3 * 16 * 16, K))
    inspect_student(Whole(), scorer, batches(), DirectEncoder(T), tmp_path)
    found, _ = read(tmp_path)
    assert found["top1_over_time"] is None
    assert found["early_exit"]["steps"] == []
    assert found["top1"] is not None
    assert "no attention maps of the teacher" in found["missing"]
    assert len(found["levels"]) == 3


def test_the_trainer_looks_with_its_own_parts(tmp_path):
    trainer = LaSNNTrainer(
        student(), teacher(), encoder=DirectEncoder(T), pairs=[("features.0.neuron", "layer1")],
        run_dir=tmp_path, seed=7,
    )  # fmt: skip
    inspect(trainer, batches())
    found, _ = read(tmp_path)
    assert found["levels"] == [{"student": "features.0.neuron", "teacher": "layer1"}]
    assert (found["seed"], found["attention"]) == (7, "activation")
    trainer.fit(batches(), epochs=1)  # looking at a fresh run does not stand in its way
    with pytest.raises(ValueError, match="give the trainer a run_dir"):
        inspect(LaSNNTrainer(student(), encoder=DirectEncoder(T)), batches())


def test_tensorboard_has_the_pictures_and_the_settings_with_what_came_of_them(tmp_path):
    trainer = LaSNNTrainer(student(), teacher(), encoder=DirectEncoder(T), run_dir=tmp_path, seed=0)
    trainer.fit(batches(), epochs=2)
    result = trainer.evaluate(batches())
    inspect(trainer, batches())
    written = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in written.Scalars("attention")] == [1, 2]
    assert written.Scalars("result/top1")[0].value == pytest.approx(result["top1"])
    levels = {f"inspection/level {n}, {who}" for n in range(3) for who in ("student", "teacher")}
    assert set(written.Tags()["images"]) == levels | {"inspection/input"}
    summary = written.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    assert b"DirectEncoder(T=4)" in summary
    assert b"Attention()" in summary


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"loader": []}, BatchError, "gave no batch"),
        ({"examples": 0}, ValueError, "examples must be at least 1, got 0"),
        (
            {"classes": ["cat"]},
            ValueError,
            "classes must be 4 names, .* got 1",
        ),
        ({"encoder": None}, ValueError, r"give an encoder for images \(8, 3, 16, 16\)"),
        (
            {"attention": Attention(pairs=[("features.9", "layer1")])},
            TapError,
            "student tap 'features.9' matches no module",
        ),
    ],
)
def test_bad_arguments_are_named(change, error, message, tmp_path):
    arguments = {"loader": batches(), "encoder": DirectEncoder(T)} | change
    with pytest.raises(error, match=message):
        inspect_student(student(), teacher(), run_dir=tmp_path, **arguments)


def test_the_environment_is_named(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "--epochs", "a few"])
    found = json.loads(json.dumps(environment()))
    assert found["versions"]["torch"] == importlib.metadata.version("torch")
    assert found["hardware"]["threads"] == torch.get_num_threads()
    assert found["neurons"].startswith("numba")
    assert found["command"] == "train.py --epochs 'a few'"
