"""Mean spikes per neuron, and accuracy after each time step."""

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lasnn_sj import DirectEncoder, models
from lasnn_sj.analysis.energy import count_operations
from lasnn_sj.analysis.spikes import record_traces, spike_statistics
from lasnn_sj.models.readout import BatchError
from lasnn_sj.neurons import IFNode, IntegratorNode
from lasnn_sj.training import evaluation
from lasnn_sj.training.evaluation import accuracy_over_time, evaluate


def identity_layer(width):
    linear = layer.Linear(width, width, bias=False, step_mode="m")
    nn.init.eye_(linear.weight)
    return linear


def batches(x, size=2):
    return DataLoader(TensorDataset(x, torch.zeros(len(x), dtype=torch.long)), size)


def two_layers():
    """Neurons that pass on what they are given; thresholds 1 and 2, so the second fires half as often."""
    return nn.Sequential(
        identity_layer(2), IFNode(step_mode="m"), identity_layer(2), IFNode(2.0, step_mode="m")
    )


def test_spikes_by_hand():
    """In 10 steps of 0.6 arrive 6.0, of which the soft reset loses nothing: 5 spikes, as the 6th would need
    more than that. The second layer is given those 5 and needs more than 2 for each of its own.
    """
    x = torch.tensor([[0.6, 0.0], [0.6, 0.0], [0.0, 0.0]])
    found = spike_statistics(two_layers(), batches(x), DirectEncoder(10))
    assert found.neurons == {"1": 2, "3": 2}
    assert found.spikes_per_neuron == {"1": pytest.approx(5 * 2 / 6), "3": pytest.approx(2 * 2 / 6)}
    assert found.mean == pytest.approx((5 + 2) * 2 / (3 * 4))
    assert (found.samples, found.T) == (3, 10)


def test_only_the_samples_that_were_asked_for():
    x = torch.tensor([[0.6, 0.0], [0.0, 0.0], [0.0, 0.0]])
    found = spike_statistics(two_layers(), batches(x), DirectEncoder(10), samples=1)
    assert found.samples == 1
    assert found.spikes_per_neuron["1"] == pytest.approx(5 / 2)


@pytest.mark.parametrize("chunk", [1, 3, 10])
def test_pieces_of_time_change_nothing(chunk):
    torch.manual_seed(0)
    net = models.vgg5(4, width=0.05, image_size=16)
    images = batches(torch.rand(5, 3, 16, 16))
    whole = spike_statistics(net, images, DirectEncoder(10))
    assert whole.mean > 0
    assert spike_statistics(net, images, DirectEncoder(10), chunk=chunk) == whole


def test_pieces_of_a_batch_change_nothing(monkeypatch):
    torch.manual_seed(0)
    net = models.vgg5(4, width=0.05, image_size=16)
    images, seen = batches(torch.rand(5, 3, 16, 16), 5), []
    whole = spike_statistics(net, images, DirectEncoder(10), samples=4)
    net.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    monkeypatch.setattr(evaluation, "MOST_AT_ONCE", 30)
    assert spike_statistics(net, images, DirectEncoder(10), samples=4) == whole
    assert seen == [3, 1]


def test_event_frames_need_no_encoder():
    frames = torch.full((10, 3, 2), 0.6)[..., None, None]
    net = nn.Sequential(layer.Flatten(step_mode="m"), *two_layers())
    found = spike_statistics(net, [(frames, torch.zeros(3, dtype=torch.long))])
    assert found.T == 10
    assert found.spikes_per_neuron["2"] == 5


def test_frames_of_features_are_cut_by_samples_and_not_by_time():
    frames = torch.full((10, 3, 2), 0.6)
    frames[:, 1:] = 0
    batch = [(frames, torch.zeros(3, dtype=torch.long))]
    found = spike_statistics(two_layers(), batch)
    assert (found.T, found.samples, found.spikes_per_neuron["1"]) == (10, 3, pytest.approx(5 / 3))
    found = spike_statistics(two_layers(), batch, samples=1)
    assert (found.T, found.samples, found.spikes_per_neuron["1"]) == (10, 1, 5)


def test_a_loop_over_time_counts_the_same():
    class Loop(nn.Module):
        def __init__(self, step):
            super().__init__()
            self.step = step

        def forward(self, x):
            return torch.stack([self.step(image) for image in x])

    torch.manual_seed(0)
    several = nn.Sequential(layer.Conv2d(1, 4, 3, step_mode="m"), neuron.IFNode(0.2, step_mode="m"))
    single = nn.Sequential(nn.Conv2d(1, 4, 3), neuron.IFNode(0.2))
    single.load_state_dict(several.state_dict())
    x = batches(torch.rand(5, 1, 6, 6))
    expected = spike_statistics(several, x, DirectEncoder(4))
    found = spike_statistics(Loop(single), x, DirectEncoder(4))
    assert found.neurons == {"step.1": 64}
    assert found.spikes_per_neuron["step.1"] == expected.spikes_per_neuron["1"] > 0


def test_layers_that_never_fire_are_named():
    net = two_layers()
    net[3].v_threshold = 100.0
    found = spike_statistics(net, batches(torch.tensor([[0.6, 0.0]])), DirectEncoder(10))
    assert found.silent == ("3",)
    assert spike_statistics(two_layers(), batches(torch.ones(1, 2)), DirectEncoder(10)).silent == ()


def test_images_without_encoder_are_refused():
    with pytest.raises(ValueError, match=r"batch 0 has no time axis: give an encoder for images \(2, 2\)"):
        spike_statistics(two_layers(), batches(torch.zeros(2, 2)))


def test_traces_by_hand():
    """Steps of 0.6: 0.6, 1.2 (spike), 0.8, 1.4 (spike), ... The second neuron of a layer is given nothing."""
    net = two_layers().train()
    found = record_traces(net, torch.tensor([[0.6, 0.0]]), DirectEncoder(6))
    assert found.neurons == {"1": [0, 1], "3": [0, 1]}
    torch.testing.assert_close(found.potentials["1"][:, 0], torch.tensor([0.6, 1.2, 0.8, 1.4, 1.0, 1.6]))
    assert found.spikes["1"].tolist() == [[v > 1, False] for v in (0.6, 1.2, 0.8, 1.4, 1.0, 1.6)]
    assert found.potentials["3"][:, 0].tolist() == [0, 1, 1, 2, 2, 3]
    assert found.spikes["3"][:, 0].tolist() == [False] * 5 + [True]
    assert not found.spikes["3"][:, 1].any()
    assert net.training
    assert not any(isinstance(getattr(module, "v", None), torch.Tensor) for module in net.modules())


def test_traces_prefer_neurons_that_fire_and_match_a_whole_run():
    torch.manual_seed(0)
    net = models.vgg5(4, width=0.05, image_size=16)
    x = torch.rand(1, 3, 16, 16)
    found = record_traces(net, x, DirectEncoder(5), neurons=4)
    seen = {}
    node = net.features[0].neuron
    handle = node.register_forward_hook(lambda module, args, output: seen.update(whole=output[:, 0]))
    with torch.no_grad():
        net.eval()(DirectEncoder(5)(x))
    handle.remove()
    whole = seen["whole"].flatten(1).bool()
    assert whole.any(0).sum() > 4
    assert found.spikes["features.0.neuron"].any(0).all()
    assert torch.equal(found.spikes["features.0.neuron"], whole[:, found.neurons["features.0.neuron"]])


def test_traces_of_what_cannot_be_traced():
    with pytest.raises(ValueError, match=r"must hold one sample, .* of images \(2, 2\)"):
        record_traces(two_layers(), torch.zeros(2, 2), DirectEncoder(2))
    with pytest.raises(ValueError, match="neurons must be at least 1, got 0"):
        record_traces(two_layers(), torch.zeros(1, 2), DirectEncoder(2), neurons=0)
    with pytest.raises(ValueError, match="no neuron of Linear ran"):
        record_traces(identity_layer(2), torch.zeros(1, 2), DirectEncoder(2))


def test_no_neuron_or_no_sample_is_an_error():
    with pytest.raises(ValueError, match="no neuron of Linear ran"):
        spike_statistics(identity_layer(2), batches(torch.zeros(2, 2)), DirectEncoder(2))
    with pytest.raises(ValueError, match="the loader gave no sample"):
        spike_statistics(two_layers(), [], DirectEncoder(2))
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        spike_statistics(two_layers(), [], DirectEncoder(2), samples=0)


@pytest.mark.parametrize(
    "look",
    [
        lambda net, x: evaluate(net, batches(x), DirectEncoder(2)),
        lambda net, x: spike_statistics(net, batches(x), DirectEncoder(2)),
        lambda net, x: count_operations(net, batches(x), DirectEncoder(2)),
    ],
)
def test_each_layer_keeps_its_own_mode(look):
    net = nn.Sequential(two_layers(), nn.BatchNorm1d(2), nn.Dropout()).train()
    net[1] = nn.Sequential(layer.SeqToANNContainer(net[1].eval()))  # trains with fixed statistics
    before = {name: module.training for name, module in net.named_modules()}
    assert len(set(before.values())) == 2
    look(net, torch.rand(3, 2))
    assert {name: module.training for name, module in net.named_modules()} == before


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.zeros(2, 3), torch.zeros(2), torch.arange(2)), r"give \(images, labels\), got tuple of 3"),
        (torch.zeros(2, 3), r"give \(images, labels\), got Tensor$"),
        ((torch.tensor([0.0, float("nan")]), torch.arange(2)), r"NaN or infinity, in samples \[1\]"),
    ],
)
def test_a_batch_that_cannot_be_used_is_named(batch, message):
    with pytest.raises(BatchError, match=f"evaluation batch 0: .*{message}"):
        evaluate(nn.Linear(3, 3), [batch])


class Scores(nn.Module):
    """Potentials ``[T, N, 2]`` by the images: image ``x`` flips its class after step ``x``."""

    def forward(self, x):
        steps = torch.arange(1, len(x) + 1).view(-1, 1)
        first = (steps <= x[..., 0]).float()
        return torch.stack([first, 1 - first], dim=-1)


def test_accuracy_over_time_by_hand():
    """Mean of the scores: an image that shows class 0 for k steps has it until step 2k - 1."""
    x, y = torch.tensor([[1.0], [2.0], [5.0]]), torch.zeros(3, dtype=torch.long)
    loader = DataLoader(TensorDataset(x, y), 2)
    curve = accuracy_over_time(Scores(), loader, DirectEncoder(5))
    # class 0 wins ties, being first: image 1 until step 2, image 2 until step 4, image 5 always
    assert curve == pytest.approx([100, 100, 200 / 3, 200 / 3, 100 / 3])
    integrated = nn.Sequential(Scores(), IntegratorNode(step_mode="m"))
    assert accuracy_over_time(integrated, loader, DirectEncoder(5)) == pytest.approx(curve)


@pytest.mark.parametrize("chunk", [1, 3, None])
def test_each_point_is_the_accuracy_of_a_shorter_run(chunk):
    torch.manual_seed(0)
    net = models.vgg5(4, width=0.05, image_size=16)
    x, y = torch.rand(20, 3, 16, 16), torch.randint(4, (20,))
    loader = DataLoader(TensorDataset(x, y), 8)
    result = evaluate(net, loader, DirectEncoder(7), chunk=chunk, over_time=True)
    expected = [evaluate(net, loader, DirectEncoder(t))["top1"] for t in range(1, 8)]
    assert result["top1_over_time"] == pytest.approx(expected)
    assert result["top1"] == pytest.approx(expected[-1])


def test_a_network_without_steps_has_no_curve():
    loader = batches(torch.rand(2, 3))
    with pytest.raises(ValueError, match=r"over_time needs a network .* Linear gives \(2, 3\)"):
        evaluate(nn.Linear(3, 3), loader, over_time=True)


def test_the_confusion_matrix_by_hand():
    class Fixed(nn.Module):
        def forward(self, x):
            return x

    scores = torch.eye(3)[[0, 1, 1, 2, 0]]
    loader = DataLoader(TensorDataset(scores, torch.tensor([0, 1, 2, 2, 1])), 2)
    result = evaluate(Fixed(), loader, confusion=True)
    assert result["confusion"].tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert result["top1"] == 60
    assert "confusion" not in evaluate(Fixed(), loader)
