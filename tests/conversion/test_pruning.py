"""Masks: exact counts, what they do to forward and training, and where they survive."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from spikingjelly.activation_based import functional, layer, neuron
from torch import nn

from lasnn_sj import LaSNNTrainer, models
from lasnn_sj.conversion.pruning import make_permanent, prune_magnitude, sparsity


def small_net(seed=0):
    torch.manual_seed(seed)
    net = nn.Sequential(
        layer.Conv2d(1, 8, 3, padding=1), layer.BatchNorm2d(8), neuron.IFNode(),
        layer.Conv2d(8, 12, 3, stride=2), layer.BatchNorm2d(12), neuron.IFNode(),
        layer.Conv2d(12, 4, 1), layer.Flatten(), layer.Linear(36, 4),
    )  # fmt: skip
    functional.set_step_mode(net, "m")
    return net


def effective(net):
    return torch.cat([m.weight.detach().flatten() for m in net.modules() if isinstance(m, nn.Conv2d)])


def outputs(net, x):
    functional.reset_net(net)
    with torch.no_grad():
        return net(x)


def test_by_hand():
    """Eight connections in two layers, three pruned: |0.1|, |-0.2| and |0.3|, wherever they are."""
    net = nn.Sequential(nn.Conv2d(1, 1, 2, bias=False), nn.Conv2d(1, 1, 2, bias=True), nn.Linear(2, 2))
    net[0].weight.data = torch.tensor([0.1, -0.2, 1.0, -2.0]).view(1, 1, 2, 2)
    net[1].weight.data = torch.tensor([0.3, 0.4, -0.5, 0.6]).view(1, 1, 2, 2)
    net[2].weight.data.fill_(0.01)  # not a convolution
    bias = net[1].bias.clone()
    assert prune_magnitude(net, 0.375) is net
    assert net[0].weight.flatten().tolist() == [0, 0, 1, -2]
    assert net[0].weight_mask.flatten().tolist() == [0, 0, 1, 1]
    torch.testing.assert_close(net[1].weight.flatten(), torch.tensor([0, 0.4, -0.5, 0.6]))
    assert torch.equal(net[1].bias, bias)
    assert (net[2].weight == 0.01).all()
    report = sparsity(net)
    assert report.layers == {"0": (2, 4), "1": (1, 4)}
    assert (report.zeros, report.connections, report.total, report.fraction("1")) == (3, 8, 0.375, 0.25)
    assert str(report).splitlines() == [
        "0     50.00 %  2 of 4", "1     25.00 %  1 of 4", "all   37.50 %  3 of 8",
    ]  # fmt: skip


def test_each_layer_by_hand():
    net = nn.Sequential(nn.Conv2d(1, 1, 2, bias=False), nn.Conv2d(1, 1, 2, bias=False))
    net[0].weight.data = torch.tensor([10.0, 20, 30, 40]).view(1, 1, 2, 2)
    net[1].weight.data = torch.tensor([4.0, 3, 2, 1]).view(1, 1, 2, 2)
    prune_magnitude(net, 0.5, scope="layer")
    assert net[0].weight.flatten().tolist() == [0, 0, 30, 40]
    assert net[1].weight.flatten().tolist() == [4, 3, 0, 0]


@settings(max_examples=25, deadline=None)
@given(ratio=st.floats(0, 1, exclude_max=True), scope=st.sampled_from(["global", "layer"]))
def test_counts_are_exact_to_one_connection(ratio, scope):
    net = small_net()
    weights = effective(net)
    report = sparsity(prune_magnitude(net, ratio, scope))
    if scope == "global":
        assert report.zeros == round(ratio * report.connections)
        kept = effective(net) != 0
        assert not kept.any() or kept.all() or weights[kept].abs().min() >= weights[~kept].abs().max()
    else:
        assert all(zeros == round(ratio * count) for zeros, count in report.layers.values())


def test_the_full_network():
    net = models.spiking_resnet18(100)
    report = sparsity(prune_magnitude(net, 0.3))
    # 11,220,132 parameters without 9,600 of batch norm and 51,300 of the classifier
    assert report.connections == 11_159_232
    assert report.zeros == round(0.3 * 11_159_232)
    assert (
        sum(int((m.weight_mask == 0).sum()) for m in net.modules() if hasattr(m, "weight_mask"))
        == report.zeros
    )


def test_many_equal_weights_are_pruned_to_the_count():
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    net[0].weight.data.fill_(0.5)
    assert sparsity(prune_magnitude(net, 0.3)).zeros == round(0.3 * 216)


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_forward_is_that_of_zeros_written_by_hand(scope):
    net, by_hand, x = small_net().eval(), small_net().eval(), torch.randn(4, 3, 1, 8, 8)
    convolutions = [m for m in by_hand.modules() if isinstance(m, nn.Conv2d)]
    groups = [convolutions] if scope == "global" else [[m] for m in convolutions]
    with torch.no_grad():
        for group in groups:
            ranked = torch.cat([m.weight.abs().flatten() for m in group]).sort().values
            limit = ranked[round(0.6 * len(ranked))]
            for module in group:
                module.weight[module.weight.abs() < limit] = 0
    prune_magnitude(net, 0.6, scope)
    assert torch.equal(effective(net), effective(by_hand))
    assert torch.equal(outputs(net, x), outputs(by_hand, x))


@pytest.mark.parametrize("made_before", [True, False])
def test_masked_weights_stay_0_in_training(made_before):
    """100 steps with momentum and weight decay, the optimiser made before or after pruning."""
    net = small_net()
    x, y = torch.randn(2, 8, 1, 8, 8), torch.arange(8) % 4

    def sgd():
        return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)

    optimizer = sgd() if made_before else None
    if made_before:  # momentum that would move masked weights
        LaSNNTrainer(net, optimizer=optimizer).train_step(x, y)
    prune_magnitude(net, 0.5)
    masked = torch.cat([m.weight_mask.flatten() == 0 for m in net.modules() if hasattr(m, "weight_mask")])
    before = effective(net)
    trainer = LaSNNTrainer(net, optimizer=optimizer or sgd())
    net.train()
    for _ in range(100):
        trainer.train_step(x, y)
    report = sparsity(net)
    assert report.zeros == round(0.5 * report.connections)
    net.eval()
    outputs(net, x)
    after = effective(net)
    assert (after[masked] == 0).all()
    assert (after != before)[~masked].float().mean() > 0.9
    assert (effective(make_permanent(net))[masked] == 0).all()


def test_masks_survive_state_dict_and_safetensors(tmp_path):
    net, x = prune_magnitude(small_net(), 0.4).eval(), torch.randn(2, 3, 1, 8, 8)
    torch.save(net.state_dict(), tmp_path / "net.pt")
    save_file(net.state_dict(), tmp_path / "net.safetensors")
    for state in (
        torch.load(tmp_path / "net.pt", weights_only=True),
        load_file(tmp_path / "net.safetensors"),
    ):
        loaded = prune_magnitude(small_net(seed=1), 0.0).eval()
        loaded.load_state_dict(state)
        assert sparsity(loaded) == sparsity(net)  # before any forward
        assert torch.equal(outputs(loaded, x), outputs(net, x))


def test_masks_survive_a_trainers_checkpoint(tmp_path):
    batches = [(torch.randn(2, 8, 1, 8, 8), torch.arange(8) % 4)]
    nets = [prune_magnitude(small_net(), 0.4), prune_magnitude(small_net(seed=1), 0.0)]
    for net, epochs in zip(nets, (1, 2)):  # the second goes on from the first's checkpoint
        LaSNNTrainer(net, run_dir=tmp_path, seed=0).fit(batches, epochs=epochs)
        assert sparsity(net).total == pytest.approx(0.4, abs=1e-3)


def test_made_permanent():
    net, x = prune_magnitude(small_net(), 0.4).eval(), torch.randn(2, 3, 1, 8, 8)
    before, report = outputs(net, x), sparsity(net)
    assert make_permanent(net) is net
    assert net.state_dict().keys() == small_net().state_dict().keys()
    assert torch.equal(outputs(net, x), before)
    assert sparsity(net) == report
    assert sparsity(prune_magnitude(net, 0.6)).zeros == round(0.6 * report.connections)
    make_permanent(small_net())  # without masks: nothing to do


def test_a_ratio_of_0_changes_nothing_but_attaches_masks():
    net, x = small_net().eval(), torch.randn(2, 3, 1, 8, 8)
    before = outputs(net, x)
    prune_magnitude(net, 0)
    assert sparsity(net).zeros == 0
    assert torch.equal(outputs(net, x), before)
    assert "0.weight_mask" in net.state_dict()


def test_channels_last_weights():
    net, other = small_net().to(memory_format=torch.channels_last), small_net()
    prune_magnitude(net, 0.5)
    prune_magnitude(other, 0.5)
    assert torch.equal(effective(net), effective(other))


def test_a_pruned_network_can_be_copied():
    net = copy.deepcopy(prune_magnitude(small_net(), 0.5))
    assert sparsity(net).total == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("ratio", [1, 1.0, -0.1, 1.5, float("nan"), True, "0.5", None])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_a_ratio_outside_0_to_1_is_refused_and_nothing_masked(ratio, scope):
    net = small_net()
    with pytest.raises(ValueError, match=r"ratio must lie in \[0, 1\)"):
        prune_magnitude(net, ratio, scope)
    assert sparsity(net).zeros == 0
    assert "0.weight" in net.state_dict()


def test_other_bad_arguments():
    with pytest.raises(ValueError, match='scope must be "global" or "layer", got \'all\''):
        prune_magnitude(small_net(), 0.5, "all")
    with pytest.raises(ValueError, match="Linear has no convolution to prune"):
        prune_magnitude(nn.Linear(2, 2), 0.5)
    net = prune_magnitude(small_net(), 0.5)
    with pytest.raises(ValueError, match=r"0 already has a pruning mask; call make_permanent\(model\)"):
        prune_magnitude(net, 0.7)
