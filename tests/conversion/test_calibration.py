"""Calibrated conversion of ANNs with batch norm and biases."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lasnn_sj import DirectEncoder, models
from lasnn_sj.conversion import calibration
from lasnn_sj.conversion.calibration import CalibratedNeuron, _threshold, calibrate
from lasnn_sj.conversion.convert import ConversionError
from lasnn_sj.training.evaluation import evaluate


def with_batch_norm():
    """A small network whose batch norms have statistics of their own."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.AvgPool2d(2),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, 4),
    )  # fmt: skip
    net.train()
    for _ in range(20):
        net(torch.rand(16, 3, 8, 8) * 2 - 1)
    return net.eval()


@pytest.fixture
def images():
    return torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
def error(snn, ann, images, T):
    """Relative distance of the SNN's mean logits from the ANN's."""
    wanted = ann(images)
    given = snn(DirectEncoder(T)(images))[-1] / T
    return ((given - wanted).norm() / wanted.norm()).item()


def test_many_steps_give_the_anns_logits(images):
    """Integrate-and-fire neurons come as near as one spike in T."""
    ann = with_batch_norm()
    errors = [
        error(calibrate(ann, images, DirectEncoder(T), correct=False), ann, images, T) for T in (16, 256)
    ]
    assert errors[1] < 0.02
    assert errors[1] < errors[0] / 8


@pytest.mark.parametrize("T", [2, 4, 8])
def test_calibration_is_nearer_at_few_steps(images, T):
    ann = with_batch_norm()
    other = torch.rand(64, 3, 8, 8, generator=torch.Generator().manual_seed(2)) * 2 - 1
    plain = calibrate(ann, images, DirectEncoder(T), correct=False)
    calibrated = calibrate(ann, images, DirectEncoder(T))
    assert error(calibrated, ann, other, T) < 0.6 * error(plain, ann, other, T)


def test_neuron_by_hand():
    """Threshold 2, half charged; 1 arrives each step, in the second channel by its bias.

    Potentials 2 (not above the threshold), 3 (a spike, worth 2), 2, 3.
    """
    neuron = CalibratedNeuron()
    neuron.T, neuron.charge, neuron.bias = 4, 0.5, torch.tensor([0.0, 1.0])
    neuron.node.v_threshold = 2.0
    x = torch.tensor([[1.0, 0.0]]).repeat(4, 1)
    assert neuron(x).tolist() == [[0, 0], [2, 2], [0, 0], [2, 2]]


def test_threshold_by_hand():
    """999 activations of 0.5 and one of 5 in two steps: threshold 1 has 0.5 exactly and clips the outlier."""
    activation = torch.cat([torch.full((999,), 0.5), torch.tensor([5.0])])
    assert _threshold(activation, T=2) == pytest.approx(1.0)
    assert _threshold(torch.full((10,), 0.5), T=1) == pytest.approx(0.5)


def test_a_large_layer_is_sampled_all_over():
    """One step; 0.5 but for the first column, of which every 64th activation is, and which is 1."""
    activation = torch.full((256, 8, 64, 64), 0.5)
    activation[..., 0] = 1.0
    assert _threshold(activation, T=1) == pytest.approx(0.5, abs=0.05)


def test_time_may_come_in_pieces(images):
    snn = calibrate(with_batch_norm(), images, DirectEncoder(6))
    loader = DataLoader(TensorDataset(images, torch.zeros(32, dtype=torch.long)), 8)
    whole = evaluate(snn, loader, DirectEncoder(6))
    assert evaluate(snn, loader, DirectEncoder(6), chunk=4) == pytest.approx(whole)


def test_memory_does_not_grow_with_the_steps(images, monkeypatch):
    """A layer is given a few steps at once; the biases are those of all steps at once."""
    ann, seen = with_batch_norm(), []
    ann[0].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    pieces = calibrate(ann, images, DirectEncoder(10))
    assert max(seen) == calibration.CHUNK * len(images) < 10 * len(images)
    monkeypatch.setattr(calibration, "CHUNK", 10)
    whole = calibrate(ann, images, DirectEncoder(10))
    assert max(seen) == 10 * len(images)
    for name, neuron in pieces.neurons.items():
        torch.testing.assert_close(neuron.bias, whole.neurons[name].bias)


def test_shortcuts_and_own_statistics_are_kept(images):
    """A residual teacher behind its own normalisation converts as it is."""
    torch.manual_seed(0)
    net = models.InputNormalization(models.teacher_resnet20(4, width=0.25), (0.5,) * 3, (0.25,) * 3)
    net.train()
    for _ in range(5):
        net(images)
    net.eval()
    snn = calibrate(net, images, DirectEncoder(128))
    assert len(snn.neurons) == 19
    assert error(snn, net, images, 128) < 0.2


def test_the_ann_is_left_alone(images):
    ann = with_batch_norm().train()
    before = {name: tensor.clone() for name, tensor in ann.state_dict().items()}
    calibrate(ann, images, DirectEncoder(4))
    assert ann.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in ann.state_dict().items())
    assert not any(module._forward_hooks for module in ann.modules())


def test_evaluation_leaves_the_network_in_evaluation_mode(images):
    """Training mode would let every forward move batch norm's statistics."""
    snn = calibrate(with_batch_norm(), images, DirectEncoder(2))
    evaluate(snn, [(images, torch.zeros(32, dtype=torch.long))], DirectEncoder(2))
    assert not any(module.training for module in snn.modules())


class OneReLU(nn.Module):
    """Two layers share the module, as in torchvision's residual blocks; it has one name."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.relu = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.ReLU()

    def forward(self, x):
        return self.relu(self.second(self.relu(self.first(x)))).mean((2, 3))


def test_a_relu_that_runs_twice_is_refused(images):
    """Its neurons would go on with the potentials of the other layer."""
    net = OneReLU()
    with pytest.raises(ConversionError, match="layer 'relu' .ReLU. runs more than once"):
        calibrate(net, images, DirectEncoder(4))
    assert not net.relu._forward_hooks


def test_what_cannot_be_converted_is_named(images):
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.LazyLinear(2))
    with pytest.raises(ConversionError, match="layer '2' .MaxPool2d. takes a maximum"):
        calibrate(pooled, images, DirectEncoder(4))
    with pytest.raises(ConversionError, match="nothing to convert"):
        calibrate(nn.ReLU(), images, DirectEncoder(4))
    silent = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 2))
    nn.init.constant_(silent[0].weight, 0.0)
    nn.init.constant_(silent[0].bias, -1.0)
    with pytest.raises(ConversionError, match="layer '1' .ReLU.: its largest activation .* is 0.0"):
        calibrate(silent, images, DirectEncoder(4))
