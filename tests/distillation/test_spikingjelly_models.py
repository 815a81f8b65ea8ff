"""SpikingJelly's own models as students: every one that takes 32x32 images trains here.

Left out are models for other input (MNISTNet and the event networks of ``parametric_lif_net``), the networks
of ``spiking_vggws_ottt``, which are trained online, one step at a time, and ``snas_net`` and ``spike_dhs``,
which need the result of an architecture search. A module's deeper and wider builders build the same layers.
"""

import functools
import inspect
import operator
import re

import numpy as np
import pytest
import timm
import torch
from spikingjelly.activation_based import functional, layer, model, neuron
from spikingjelly.activation_based.model import parametric_lif_net, sew_resnet, spiking_resnet, spiking_vgg
from torch.utils.data import DataLoader, TensorDataset

from lasnn_sj import DirectEncoder, LaSNNTrainer, distillation, models
from lasnn_sj.analysis.inspection import inspect_student
from lasnn_sj.conversion import prune_magnitude
from lasnn_sj.distillation import (
    DIST,
    SAMD,
    TET,
    TKS,
    TPD,
    Attention,
    CrossEntropy,
    DecoupledKD,
    DefaultKD,
    EntropyRegularization,
    LabelKD,
    Look,
    NoiseSmoothedKD,
    Objective,
    PerStepCE,
    RelationalKD,
    SeAlKD,
    SparseKD,
    StableNoise,
    StableSpike,
    StudentTaps,
    Synergy,
    TemporalKD,
    parse_objective,
)
from lasnn_sj.distillation.objective import members, trained_modules
from lasnn_sj.neurons import accelerate
from lasnn_sj.training.trainer import Trainer

T, K = 2, 4
LIF = {"spiking_neuron": neuron.LIFNode, "detach_reset": True}


def small_vgg():
    plan = [8, "M", 8, "M", 16, 16, "M", 16, "M", 512, "M"]
    with torch.device("meta"):  # its classifier of 4096, 4096, K takes a second to make
        net = spiking_vgg.SpikingVGG(plan, batch_norm=True, num_classes=K, **LIF)
    net.classifier = torch.nn.Sequential(layer.Linear(512 * 7 * 7, K))
    net.features.to_empty(device="cpu")
    for module in net.features:
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return net


def cifar10_net():
    net = parametric_lif_net.CIFAR10Net(channels=8, **LIF)
    net.conv_fc[-1] = layer.VotingLayer(100 // K)
    return net


ONE = (1, 1, 1)
MODELS = {
    "spiking_resnet19": lambda: models.spiking_resnet19(K, width=0.1),
    "sew_resnet": lambda: sew_resnet.SEWResNet(
        sew_resnet.BasicBlock, [1, *ONE], num_classes=K, cnf="ADD", **LIF
    ),
    "spiking_resnet": lambda: spiking_resnet.SpikingResNet(
        spiking_resnet.BasicBlock, [1, *ONE], num_classes=K, **LIF
    ),
    "spiking_vgg": small_vgg,
    "cifar10_net": cifar10_net,
    "ms_resnet": lambda: model.MSResNet(T, num_classes=K, layers=(1, *ONE), base_channels=8),
    "max_resnet": lambda: model.MaxResNet(T, num_classes=K, layers=(1, *ONE), base_channels=8),
    "att_ms_resnet": lambda: model.AttMSResNet(T, num_classes=K, layers=(1, *ONE), base_channels=16),
    "masnn": lambda: model.MASNN(T, 3, K, channels=(16, 16, 16), fc_hidden=16, reduction_t=2),
    "spikformer": lambda: model.Spikformer(
        T, 3, 32, 32, patch_size=4, num_classes=K, embed_dims=32, num_heads=4, depths=1
    ),
    "qkformer": lambda: model.QKFormer(
        T, num_classes=K, embed_dims=48, num_heads=(1, 2, 2), depths=ONE
    ),
    "maxformer": lambda: model.MaxFormer(T, num_classes=K, embed_dims=64, depths=ONE),
    "maxformer_cifar": lambda: model.MaxFormer(T, num_classes=K, embed_dims=64, depths=ONE, cifar=True),
    "spike_driven_transformer": lambda: model.SpikeDrivenTransformer(
        T, num_classes=K, embed_dims=32, num_heads=4, depths=1, pooling_stat="0011"
    ),
}  # fmt: skip
# Shapes of spiking layers' outputs after [T, N]: maps C, H, W; tokens C, L; inside attention heads, d, L.
SHAPES = {
    "spikformer": {"patch_embed.stages.3.neuron": (32, 8, 8), "blocks.0.attn.qkv_lif": (96, 64),
                   "blocks.0.attn.attn_lif": (4, 8, 64), "blocks.0.mlp.neuron2": (32, 64)},
    "qkformer": {"patch_embed1.lif2": (12, 8, 8), "stage1.0.attn.attn_lif": (1, 1, 64),
                 "stage1.0.mlp.lif2": (12, 64), "stage3.0.mlp.lif2": (48, 4)},
    "maxformer": {"stage2.0.mlp.lif2": (128, 4, 4), "stage3.0.attn.proj_lif": (64, 4)},
    "maxformer_cifar": {"stage3.0.attn.input_lif": (64, 64), "stage3.0.mlp.lif2": (256, 8, 8)},
    "spike_driven_transformer": {"blocks.0.attn.q_lif": (32, 8, 8), "blocks.0.attn.attn_lif": (4, 1, 8),
                                 "blocks.0.mlp.lif2": (128, 8, 8)},
}  # fmt: skip


def build(name):
    torch.manual_seed(0)
    net = MODELS[name]()
    functional.set_step_mode(net, "m")
    return net


def loader():
    torch.manual_seed(1)
    return DataLoader(TensorDataset(2 * torch.rand(8, 3, 32, 32) - 1, torch.arange(8) % K), batch_size=8)


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_of_the_transformers_spikes(name):
    net, shapes = build(name), {}
    for path, module in net.named_modules():
        if isinstance(module, neuron.BaseNode):
            module.register_forward_hook(lambda m, a, y, path=path: shapes.update({path: tuple(y.shape[2:])}))
    net(DirectEncoder(T)(torch.rand(2, 3, 32, 32)))
    assert {path: shapes[path] for path in SHAPES[name]} == SHAPES[name]


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_logit_distillation_trains_the_network(name):
    teacher = models.teacher_resnet20(K, width=0.25).eval()
    for objective in (CrossEntropy(), LabelKD(), DefaultKD(), SparseKD(prune_magnitude(build(name), 0.3))):
        net = build(name)
        before = {path: weight.detach().clone() for path, weight in net.named_parameters()}
        trainer = LaSNNTrainer(
            net, teacher if objective.needs_teacher else None, objective=objective, encoder=DirectEncoder(T),
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        )  # fmt: skip
        (row,) = trainer.fit(loader(), epochs=1)
        assert 0 < row["loss"] < 10 * torch.tensor(K).log()
        changed = [path for path, weight in net.named_parameters() if not torch.equal(weight, before[path])]
        assert len(changed) > len(before) / 2, objective


class Together(Objective):
    """Methods whose parts have names of their own here; the gradients of each part are looked at."""

    needs_teacher = True

    def __init__(self, inner):
        self.inner, self.reached = inner, {}

    def prepare(self, look):
        return functools.reduce(operator.or_, (one.prepare(look) for one in self.inner))

    def __call__(self, signals):
        parts, signals.epoch, signals.epochs = {}, 1, 2  # in the first epoch TKS has no weight
        for one in self.inner:
            parts |= {f"{type(one).__name__}.{name}": part for name, part in one(signals).items()}
        read = [signals.scores, signals.outputs, *signals.student.values()]
        for name, part in parts.items():
            found = torch.autograd.grad(part, read, retain_graph=True, allow_unused=True)
            self.reached[name] = any(g is not None and bool(g.any()) for g in found)
        return parts


WITH_WEIGHTS = "CrossEntropy() + KDSNN() + BKD() + EnOF() + SASTC(batch_size=32, beta=1.0)"
ON_SCORES = [LabelKD, DecoupledKD, DIST, NoiseSmoothedKD, RelationalKD, SAMD, StableSpike, DefaultKD]
ON_STEPS = [PerStepCE, TET, TemporalKD, TKS, TPD, Synergy, SeAlKD, EntropyRegularization]
WITHOUT_STEPS = {"ms_resnet", "max_resnet", "att_ms_resnet", "masnn", "qkformer", "maxformer",
                 "maxformer_cifar", "spike_driven_transformer"}  # fmt: skip
# Class scores that are one linear layer of the last spikes; others add spikes of several layers before it,
# pool them by other means, or vote.
ONE_LINEAR_LAYER = {"spiking_resnet19", "spiking_resnet", "ms_resnet", "max_resnet", "att_ms_resnet",
                    "maxformer", "maxformer_cifar", "spike_driven_transformer"}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_every_method_trains_the_network(name):
    """Each part's gradient reaches the student; the weights of methods move, too."""
    torch.manual_seed(0)
    teacher = models.teacher_resnet20(K, width=0.25).eval()
    steps = [] if name in WITHOUT_STEPS else ON_STEPS
    noise = [StableNoise] if name in ONE_LINEAR_LAYER else []
    net, together = build(name), Together([kind() for kind in (*ON_SCORES, *steps, *noise)])
    for module in net.modules():
        if hasattr(module, "v_threshold"):
            module.v_threshold = 0.2  # an untrained network is silent at 1
    trainer = Trainer(
        net, parse_objective(WITH_WEIGHTS) + together, teacher=teacher, encoder=DirectEncoder(T),
        optimizer=torch.optim.SGD(net.parameters(), lr=0.01),
    )  # fmt: skip
    (batch,) = loader()
    trainer.prepare(*batch)
    own = {f"{kind}.{key}": p for kind, method in trained_modules(trainer.objective)
           for key, p in method.named_parameters() if p.numel()}  # fmt: skip
    before = [p.detach().clone() for p in (*own.values(), *net.parameters())]
    parts = trainer.train_step(*batch).parts
    assert all(part.isfinite() for part in parts.values())
    assert {"features", "blurred", "output_features", "calibrated"} <= parts.keys()
    quiet = [part for part, reached in together.reached.items() if not reached]
    assert quiet == [], quiet
    moved = [not torch.equal(a, b) for a, b in zip(before, (*own.values(), *net.parameters()))]
    assert [key for key, changed in zip(own, moved) if not changed] == []
    assert sum(moved) > len(moved) / 2


@pytest.mark.parametrize("name", MODELS)
def test_methods_that_a_network_cannot_have_say_why(name):
    net, images = build(name).eval(), next(iter(loader()))[0][:2]
    frames = DirectEncoder(T)(images)
    with torch.no_grad():
        outputs = net(frames)
    functional.reset_net(net)
    assert (outputs.dim() == 2) == (name in WITHOUT_STEPS)
    look = Look(net, None, frames, images, outputs, K)
    for kind in [StableNoise] * (name not in ONE_LINEAR_LAYER) + ON_STEPS * (name in WITHOUT_STEPS):
        said = "one linear layer of the firing rates" if kind is StableNoise else "the scores of every step"
        with pytest.raises(ValueError, match=f"{kind.__name__} needs a student .*{said}"):
            kind().prepare(look)


def test_the_list_of_methods_is_complete():
    tested = {kind.__name__ for kind in (*ON_SCORES, *ON_STEPS, StableNoise)}
    tested |= set(re.findall(r"\w+(?=\()", WITH_WEIGHTS)) | {"Attention", "SparseKD"}
    found = {
        name for name in distillation.__all__
        if inspect.isclass(kind := getattr(distillation, name)) and issubclass(kind, Objective)
    }  # fmt: skip
    # SpikeKD needs a student and a spiking teacher that end in an integrator
    assert found - {"Objective", "Sum", "SpikeKD"} == tested


@pytest.fixture(scope="module")
def vit():
    """A small ViT of timm, whose class token makes its scores."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, embed_dim=32, depth=4, num_heads=2, num_classes=K
    ).eval()


@pytest.mark.parametrize("kind", ["activation", "gradient"])
@pytest.mark.parametrize("name", MODELS)
def test_a_step_of_attention_trains_the_network(name, kind, vit):
    """By a convolutional teacher; transformers by a ViT, too."""
    for teacher in [models.teacher_resnet20(K).eval(), vit][: 1 + (name in SHAPES)]:
        net = build(name)
        before = {path: weight.detach().clone() for path, weight in net.named_parameters()}
        trainer = LaSNNTrainer(
            net, teacher, encoder=DirectEncoder(T), attention=kind,
            optimizer=torch.optim.SGD(net.parameters(), lr=0.1),
        )  # fmt: skip
        (row,) = trainer.fit(loader(), epochs=1)
        (attention,) = [one for one in members(trainer.objective) if isinstance(one, Attention)]
        assert [pair.level for pair in attention.chosen] == ["low", "middle", "high"]
        assert all(min(pair.size) >= 4 for pair in attention.chosen)
        assert 0 < row["attention"] < 3  # 0.9 / 2 of three distances, each below 2
        changed = [path for path, weight in net.named_parameters() if not torch.equal(weight, before[path])]
        assert len(changed) > len(before) / 2


def test_readings_of_tokens_are_those_of_accelerated_neurons():
    """Stock neurons are read from their spikes, accelerated ones by their time loop."""
    wanted = [(path, reading) for path in ("blocks.0.attn.qkv_lif", "blocks.0.mlp.neuron2")
              for reading in ("firing_rate", "activation_map")]  # fmt: skip
    found = []
    for prepare in (lambda net: net, accelerate):
        net = prepare(build("spikformer").train())
        torch.manual_seed(1)
        with StudentTaps(net, wanted) as taps, torch.no_grad():
            net(DirectEncoder(8)(2 * torch.rand(2, 3, 32, 32) - 1))
            found.append(taps.collect())
    for stock, fast in zip(*found):
        assert stock.any()
        torch.testing.assert_close(stock, fast)


@pytest.mark.parametrize("name", ["spikformer", "qkformer", "ms_resnet"])
def test_maps_of_its_levels_can_be_inspected(name, vit, tmp_path):
    """A student that returns [N, K], too; the maps are the student's at their own size."""
    path = inspect_student(build(name), vit, loader(), DirectEncoder(T), tmp_path, examples=2)
    with np.load(path.with_suffix(".npz")) as arrays:
        shapes = {key: arrays[key].shape for key in arrays.files}
    assert shapes["student_2"] == shapes["teacher_2"]
    assert shapes["student_2"][1:] == {"spikformer": (8, 8), "qkformer": (4, 4), "ms_resnet": (4, 4)}[name]
