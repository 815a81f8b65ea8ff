"""Operations by hand, against SpikingJelly's counters, and where those do not see the spikes."""

import pytest
import torch
from spikingjelly.activation_based import layer, neuron
from spikingjelly.activation_based.op_counter import DispatchCounterMode, MACCounter, SynOpCounter
from torch import nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import weight_norm

from lasnn_sj import DirectEncoder, PoissonEncoder, models
from lasnn_sj.analysis.energy import Operations, count_operations


def count(net, frames):
    """Operations on encoded input ``[T, N, ...]``."""
    return count_operations(net, [(frames, torch.zeros(frames.shape[1], dtype=torch.long))])


def conv(c_in, c_out, **arguments):
    return layer.Conv2d(c_in, c_out, bias=False, step_mode="m", **arguments)


def test_spikes_times_synapses_by_hand():
    x = torch.zeros(2, 1, 1, 4, 4)  # T = 2
    x[0, 0, 0, 1, 1] = 1  # in the middle: 9 positions of a 3x3 kernel with padding
    x[0, 0, 0, 0, 0] = -1  # in a corner: 4 of them; a signed spike is a spike
    x[1, 0, 0, 0, 2] = 1  # at an edge: 6
    found = count(conv(1, 5, kernel_size=3, padding=1), x)
    assert found == Operations((5 * 13.0, 5 * 6.0), (0, 0), 16 * 9 * 5, 1)
    assert found.energy_pj == pytest.approx([0.9 * 65, 0.9 * 95])
    assert found.ann_energy_pj == pytest.approx(4.6 * 720)


def test_a_pooled_spike_counts_once_by_hand():
    x = torch.zeros(2, 1, 1, 4, 4)
    x[0, 0, 0, :2, :2] = torch.tensor([[1.0, 1.0], [1.0, 0.0]])  # one pooled pixel of 3/4
    x[1, 0, 0, 3, 3] = 1
    net = nn.Sequential(layer.AvgPool2d(2, step_mode="m"), layer.Flatten(step_mode="m"), nn.Linear(4, 7))
    assert count(net, x) == Operations((3 * 7.0, 7.0), (0, 0), 4 * 7, 1)
    # two pools one after the other, the second by its output size
    net = nn.Sequential(
        layer.AvgPool2d(2, step_mode="m"), layer.AdaptiveAvgPool2d(1, step_mode="m"),
        layer.Flatten(step_mode="m"), nn.Linear(1, 7),
    )  # fmt: skip
    assert count(net, x).synops == (3 * 7, 7)


def test_overlapping_pools_and_odd_sizes_by_hand():
    x = torch.zeros(1, 1, 1, 5, 5)
    x[0, 0, 0, 2, 2] = x[0, 0, 0, 0, 4] = 1  # the first lies in all four windows, the second in one
    net = nn.Sequential(
        layer.AvgPool2d(3, stride=2, step_mode="m"), layer.Flatten(step_mode="m"), nn.Linear(4, 3)
    )
    assert count(net, x).synops == (5 * 3,)
    net = nn.Sequential(
        layer.AvgPool2d(2, step_mode="m"), layer.Flatten(step_mode="m"), nn.Linear(4, 3)
    )  # the last row and column are in no window
    assert count(net, x).synops == (3,)


@pytest.mark.parametrize(
    ("pool", "synops", "macs"),
    [
        ({"kernel_size": 3, "stride": 2, "padding": 1}, 1, 0),  # the corner's window is divided by 9 too
        ({"kernel_size": 2, "divisor_override": 1}, 0, 0),  # 4x4 of 5x5: the corner is in no window
        ({"kernel_size": 2, "divisor_override": 3, "padding": 1}, 1, 0),
        ({"kernel_size": 3, "stride": 2, "padding": 1, "count_include_pad": False}, 0, 9),
        ({"kernel_size": 2, "ceil_mode": True}, 0, 9),  # the corner's window holds one pixel and gives 1
    ],
)
def test_how_a_pool_divides_by_hand(pool, synops, macs):
    x = torch.zeros(1, 1, 1, 5, 5)
    x[..., 4, 4] = 1
    x[..., 0, 0] = 1 if macs else 0  # in a window of another size
    pooled = nn.Sequential(layer.AvgPool2d(**pool, step_mode="m"), layer.Flatten(step_mode="m"))
    found = count(nn.Sequential(pooled, nn.Linear(pooled(x).shape[-1], 1)), x)
    assert (found.synops, found.macs) == ((synops,), (macs,))


def test_events_count_as_spikes_only_where_they_are_events():
    x = torch.zeros(1, 2, 3)
    x[0, 0] = torch.tensor([4.0, 0.0, 1.0])
    assert count(nn.Linear(3, 2), x).synops == (2 * 5 / 2,)
    images = [(x[0], torch.zeros(2, dtype=torch.long))]
    assert count_operations(nn.Linear(3, 2), images, DirectEncoder(1)) == Operations((0,), (6,), 6, 2)


@pytest.mark.parametrize("name", ["conv3_linear2", "resnet12"])
@pytest.mark.parametrize("encoder", [DirectEncoder(5), PoissonEncoder(5)])
def test_the_anns_side_is_what_the_ann_gives(name, encoder):
    build = getattr(models, name)
    x = torch.rand(4, 3, 16, 16) * 2 - 1
    snn, ann = build(10, 3, 16, 0.25), build(10, 3, 16, 0.25, spiking=False).eval()
    found = count_operations(snn, [(x, torch.zeros(4, dtype=torch.long))], encoder)
    counter = MACCounter()
    with DispatchCounterMode([counter]), torch.no_grad():
        ann(x)
    assert found.ann_macs == counter.get_total() / 4
    # real values go into the first convolution alone, and there once
    first = 3 * 9 * 16 * round(64 * 0.25) * 16 if isinstance(encoder, DirectEncoder) else 0
    assert found.macs == (first, 0, 0, 0, 0)


def test_without_pools_it_is_spikingjellys_count():
    torch.manual_seed(0)
    net = nn.Sequential(
        conv(2, 6, kernel_size=3, stride=2, padding=1), neuron.IFNode(step_mode="m"),
        conv(6, 8, kernel_size=3, groups=2), neuron.IFNode(step_mode="m"),
        layer.Flatten(step_mode="m"), nn.Linear(8 * 2 * 2, 5),
    )  # fmt: skip
    for module in net.modules():
        if hasattr(module, "weight"):
            nn.init.uniform_(module.weight, 0, 0.5)
    x = (torch.rand(3, 2, 2, 8, 8) < 0.4).float()
    found, counter = count(net, x), SynOpCounter()
    with DispatchCounterMode([counter]), torch.no_grad():
        net(x)
    assert sum(found.synops) * 2 == pytest.approx(counter.get_total())
    assert counter.get_total() > 0
    assert not any(found.macs)


class OverTime(nn.Module):
    """Runs a network of single steps step by step."""

    def __init__(self, step):
        super().__init__()
        self.step = step

    def forward(self, x):
        return torch.stack([self.step(image) for image in x])


def test_a_loop_over_time_gives_the_same():
    torch.manual_seed(0)
    multi = nn.Sequential(conv(1, 4, kernel_size=3), neuron.IFNode(step_mode="m"), conv(4, 2, kernel_size=2))
    single = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), neuron.IFNode(), nn.Conv2d(4, 2, 2, bias=False))
    nn.init.uniform_(multi[0].weight, 0, 1)
    single.load_state_dict(multi.state_dict())
    x = torch.rand(3, 2, 1, 6, 6)
    expected = count(multi, x)
    assert count(OverTime(single), x) == expected
    assert sum(expected.synops) > 0
    assert expected.macs == (9 * 4 * 16,) * 3


@pytest.mark.parametrize("reparametrise", [lambda m: prune.identity(m, "weight"), weight_norm])
def test_a_loop_whose_weights_are_made_anew_at_each_step_gives_the_same(reparametrise):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), neuron.IFNode(), nn.Conv2d(4, 2, 2, bias=False))
    nn.init.uniform_(net[0].weight, 0, 1)
    x = torch.rand(3, 2, 1, 6, 6)
    expected = count(OverTime(net), x)
    assert all(expected.synops)
    reparametrise(net[0])
    reparametrise(net[2])
    assert count(OverTime(net), x) == expected


def test_a_layer_that_is_called_twice_in_a_step():
    single, several = nn.Conv2d(2, 2, 3, padding=1, bias=False), conv(2, 2, kernel_size=3, padding=1)
    nn.init.uniform_(single.weight, 0, 1)
    several.load_state_dict(single.state_dict())
    x = torch.rand(3, 2, 2, 6, 6)
    found = count(OverTime(nn.Sequential(single, neuron.IFNode(), single)), x)
    assert found == count(nn.Sequential(several, neuron.IFNode(step_mode="m"), several), x)
    assert found.ann_macs == 2 * 36 * 2 * 2 * 9
    assert found.macs == (36 * 2 * 2 * 9,) * 3


def test_a_sum_of_spikes_is_spikes_by_hand():
    class Residual(nn.Module):
        def forward(self, x):
            return x + x.flip(-1)

    x = torch.zeros(2, 1, 1, 1, 3)
    x[0, 0, 0, 0] = torch.tensor([1.0, 1.0, 0.0])  # sums to 1, 2, 1
    net = nn.Sequential(Residual(), conv(1, 5, kernel_size=1))
    assert count(net, x) == Operations((5 * 4, 0), (0, 0), 15, 1)
    # sums of real values stay real
    assert count(net, x / 2).macs == (15, 15)


def test_products_of_activations_are_spread_over_the_steps():
    class Product(nn.Module):
        def forward(self, x):
            return x.flatten(0, 1) @ x.flatten(0, 1).transpose(1, 2)

    x = torch.full((2, 1, 3, 4), 0.3)
    assert count(Product(), x) == Operations((0, 0), (36, 36), 36, 1)


def test_counting_leaves_the_network_as_it_was():
    net = models.conv3_linear2(4, 1, 8, 0.1).train()
    count(net, torch.rand(2, 1, 1, 8, 8))
    assert net.training
    assert not any(isinstance(getattr(m, "v", None), torch.Tensor) for m in net.modules())


def test_samples_of_several_batches_are_averaged_by_hand():
    x = torch.zeros(1, 5, 2)  # five samples with 0, 1, 1, 2, 2 spikes
    x[0, 1:, 0], x[0, 3:, 1] = 1, 1
    batches = [(x[:, :2], torch.zeros(2).long()), (x[:, 2:], torch.zeros(3).long())]
    net = nn.Linear(2, 10)
    assert count_operations(net, batches) == Operations((10 * 6 / 5,), (0,), 20, 5)
    assert count_operations(net, batches, samples=3) == Operations((10 * 2 / 3,), (0,), 20, 3)


def test_an_input_that_cannot_be_counted_is_named():
    batch = torch.rand(2, 3), torch.zeros(2, dtype=torch.long)
    with pytest.raises(ValueError, match=r"batch 0 has no time axis: give an encoder for images \(2, 3\)"):
        count_operations(nn.Linear(3, 2), [batch])
    with pytest.raises(ValueError, match="the loader gave no sample; operations cannot be counted"):
        count_operations(nn.Linear(3, 2), [], DirectEncoder(2))
    with pytest.raises(ValueError, match="samples must be at least 1, got 0"):
        count_operations(nn.Linear(3, 2), [batch], DirectEncoder(2), samples=0)
