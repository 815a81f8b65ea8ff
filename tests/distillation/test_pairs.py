"""Choice of the pairs of layers."""

import pytest
import torch
from spikingjelly.activation_based import layer
from torch import nn

from lasnn_sj import DirectEncoder, models
from lasnn_sj.distillation import TapError, as_map, choose_layers, choose_pairs
from lasnn_sj.distillation.pairs import _three_levels
from lasnn_sj.neurons import LIFNode

IMAGES = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1


def pairs_of(student, teacher, names=None, T=2, images=IMAGES):
    return choose_pairs(student, teacher, DirectEncoder(T)(images), images, names)


@pytest.mark.parametrize(
    ("sizes", "levels"),
    [
        ([32], [0]),
        ([32, 16], [0, 1]),
        ([32, 16, 16], [0, 1, 2]),
        ([32, 16, 16, 8, 8, 4, 2], [2, 4, 6]),  # VGG9: cut where the resolution changes, 3 + 2 + 2 deep
        ([32, 32, 16, 16, 8, 8, 8, 4, 4, 4, 2, 2, 2], [3, 6, 12]),  # VGG16: 4 + 3 + 6, or 4 + 6 + 3
        ([16] * 6, [1, 3, 5]),  # one resolution: by depth alone
        ([16, 16, 16, 16, 8], [1, 3, 4]),  # one change only: there, and in the middle of the rest
    ],
)
def test_three_levels(sizes, levels):
    chosen = _three_levels([(s, s) for s in sizes])
    if len(sizes) == 13:  # both cuts are equally even
        assert chosen in ([3, 6, 12], [3, 9, 12])
    else:
        assert chosen == levels


def test_pairs_of_vgg5_and_resnet20():
    """Each level of the student, of 32, 16 and 16 pixels, takes the teacher's last layer of that level."""
    found = pairs_of(models.vgg5(10, width=0.1), models.teacher_resnet20(10))
    assert [(p.level, p.student, p.teacher, p.size, p.teacher_size) for p in found] == [
        ("low", "features.0.neuron", "layer1", (32, 32), (32, 32)),
        ("middle", "features.2.neuron", "layer2", (16, 16), (16, 16)),
        ("high", "features.3.neuron", "layer3", (16, 16), (8, 8)),
    ]
    assert "interpolated" in str(found[2])
    assert str(found[0]) == "low: features.0.neuron [32x32] <- layer1 [32x32]"


@pytest.mark.parametrize("name", ["vgg9", "vgg16", "resnet12", "resnet20"])
def test_layers_of_fewer_than_16_pixels_are_left_out(name):
    found = pairs_of(getattr(models, name)(10, width=0.05), models.teacher_vgg16(10, width=0.05))
    assert [p.level for p in found] == ["low", "middle", "high"]
    assert all(min(p.size) >= 4 and min(p.teacher_size) >= 4 for p in found)


def test_inner_bottlenecks_of_a_teacher_are_left_out():
    """DenseNet's dense layers end in a bottleneck of 128 channels; the features around it are wider."""
    teacher = models.teacher_densenet121(10).eval()
    modules = dict(teacher.named_modules())
    found = pairs_of(models.vgg5(10, width=0.1), teacher)
    assert len(found) == 3
    for pair in found:
        assert not pair.teacher.endswith("relu2"), pair
        assert pair.teacher in modules


def test_networks_of_fewer_levels_have_the_upper_ones():
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU())
    (pair,) = pairs_of(models.vgg5(10, width=0.1), teacher)
    assert (pair.level, pair.student, pair.teacher) == ("high", "features.3.neuron", "1")


def test_functional_activations_are_found_by_their_sign():
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 3, padding=1), Block()
            self.head = nn.Linear(4, 10)

        def forward(self, x):
            return self.head(self.b(self.a(x)).mean((2, 3)))

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(4, 4, 3, padding=1)

        def forward(self, x):
            return torch.relu(self.conv(x))

    assert {p.teacher for p in pairs_of(models.vgg5(10, width=0.1), Functional())} == {"b"}


def test_named_pairs_and_patterns():
    student, teacher = models.vgg5(10, width=0.1), models.teacher_resnet20(10)
    (pair,) = pairs_of(student, teacher, [("features.2.n*", "layer3")])
    assert (pair.student, pair.teacher) == ("features.2.neuron", "layer3")


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (("features.9.neuron", "layer1"), "matches no module of VGG; near: features"),
        (("features.*.neuron", "layer1"), "matches 3 modules"),
        (("features.0.neuron", "layer7"), "teacher tap 'layer7' matches no module"),
        (("classifier.0.neuron", "layer1"), "student tap 'classifier.0.neuron' gives no feature map"),
        (("features.0.neuron", "linear"), "teacher tap 'linear' gives no feature map"),
    ],
)
def test_wrong_names_are_errors(pair, message):
    with pytest.raises(TapError, match=message.replace("*", r"\*")):
        pairs_of(models.vgg5(10, width=0.1), models.teacher_resnet20(10), [pair])


def test_a_module_that_runs_twice_cannot_be_named():
    relu = nn.ReLU()
    teacher = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), relu, nn.Conv2d(4, 4, 3, padding=1), relu)
    with pytest.raises(TapError, match="'1' runs 2 times"):
        pairs_of(models.vgg5(10, width=0.1), teacher, [("features.0.neuron", "1")])


def test_a_student_without_feature_maps_is_an_error():
    student = nn.Sequential(layer.Flatten(step_mode="m"), layer.Linear(3072, 10), LIFNode(step_mode="m"))
    with pytest.raises(TapError, match="no spiking layer with a feature map"):
        pairs_of(student, models.teacher_resnet20(10))


# ---- tokens ----


@pytest.mark.parametrize(
    ("form", "shape"),
    [("NCHW", (1, 2, 2, 3)), ("NHWC", (1, 2, 3, 2)), ("NCL", (1, 2, 6)), ("NLC", (1, 7, 2))],
)
def test_forms_of_a_map_by_hand(form, shape):
    """Channel c at (y, x) holds 100 c + 10 y + x; a class token before the grid is left out."""
    wanted = torch.tensor([[[0, 1, 2], [10, 11, 12]], [[100, 101, 102], [110, 111, 112]]])[None]
    x = {
        "NCHW": wanted,
        "NHWC": wanted.permute(0, 2, 3, 1),
        "NCL": wanted.flatten(2),
        "NLC": torch.cat([torch.tensor([[[-1, -2]]]), wanted.flatten(2).transpose(1, 2)], 1),
    }[form]
    assert x.shape == shape
    assert torch.equal(as_map(x, (2, 3), form), wanted)


class Transformer(nn.Module):
    """A spiking one: a convolution, tokens, heads inside the attention, tokens again."""

    def __init__(self, tokens_last=True):
        super().__init__()
        self.patch = layer.Conv2d(3, 16, 4, 4, step_mode="m")
        self.stem, self.qkv, self.heads, self.out = (
            LIFNode(v_threshold=0.1, step_mode="m") for _ in range(4)
        )
        self.head = layer.Linear(16, 10, step_mode="m")
        self.tokens_last = tokens_last

    def forward(self, x):
        tokens = self.stem(self.patch(x)).flatten(3)  # [T, N, 16, 64]
        if not self.tokens_last:
            tokens = tokens.transpose(2, 3)
        tokens = self.qkv(tokens)
        heads = self.heads(tokens.unflatten(2, (2, -1)))  # [T, N, 2, 8, 64], no map of 8 x 64 pixels
        tokens = self.out(heads.flatten(2, 3))
        return self.head(tokens.mean(3 if self.tokens_last else 2))


@pytest.mark.parametrize(("tokens_last", "form"), [(True, "NCL"), (False, "NLC")])
def test_tokens_of_a_spiking_transformer_are_maps(tokens_last, form):
    found = choose_layers(Transformer(tokens_last), DirectEncoder(2)(IMAGES))
    assert [(p.student, p.size, p.form) for p in found] == [
        ("stem", (8, 8), "NCHW"), ("qkv", (8, 8), form), ("out", (8, 8), form)
    ]  # fmt: skip


class ViT(nn.Module):
    """Two tokens before a grid of 4x4, three blocks; scores from the first token or the mean."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8))

        def forward(self, x):
            x = x + self.attention(x, x, x, need_weights=False)[0]
            return x + self.mlp(x)

    def __init__(self, pool):
        super().__init__()
        self.patch, self.pool = nn.Conv2d(3, 8, 8, 8), pool
        self.first = nn.Parameter(torch.randn(1, 2, 8))
        self.blocks = nn.ModuleList(self.Block() for _ in range(5))
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.first.expand(len(x), -1, -1), x], 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x[:, 0] if self.pool == "token" else x.mean(1))


@pytest.mark.parametrize(
    ("pool", "gradients", "last"), [("token", False, 4), ("mean", True, 4), ("token", True, 3)]
)
def test_blocks_of_a_vit_teach(pool, gradients, last):
    """Behind the last attention only the class token matters to the scores."""
    torch.manual_seed(0)
    teacher = ViT(pool).eval()
    found = choose_pairs(
        models.vgg5(10, width=0.1), teacher, DirectEncoder(2)(IMAGES), IMAGES, gradients=gradients
    )
    assert len(found) == 3
    assert all((p.teacher_size, p.teacher_form) == ((4, 4), "NLC") for p in found)
    numbers = [int(p.teacher.removeprefix("blocks.")) for p in found]
    assert numbers == sorted(set(numbers))
    assert numbers[-1] == last


def test_a_teacher_with_channels_last():
    class Stage(nn.Module):
        def __init__(self, stride):
            super().__init__()
            self.conv = nn.Conv2d(12, 12, 3, stride, 1)

        def forward(self, x):
            return self.conv(x.permute(0, 3, 1, 2)).relu().permute(0, 2, 3, 1)

    class Swin(nn.Module):
        def __init__(self):
            super().__init__()
            self.patch = nn.Conv2d(3, 12, 2, 2)
            self.layers = nn.Sequential(Stage(1), Stage(2), Stage(1))
            self.head = nn.Linear(12, 10)

        def forward(self, x):
            return self.head(self.layers(self.patch(x).permute(0, 2, 3, 1)).mean((1, 2)))

    found = pairs_of(models.vgg5(10, width=0.1), Swin().eval())
    assert [(p.teacher, p.teacher_size, p.teacher_form) for p in found] == [
        ("layers.0", (16, 16), "NHWC"), ("layers.1", (8, 8), "NHWC"), ("layers.2", (8, 8), "NHWC"),
    ]  # fmt: skip


def test_a_teacher_that_enlarges_its_images():
    """Its feature maps are larger than the images that it is given."""
    teacher = nn.Sequential(
        nn.Upsample(scale_factor=4), nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1),
        nn.ReLU(), nn.Conv2d(4, 4, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1),
        nn.Flatten(), nn.Linear(4, 10),
    )  # fmt: skip
    sizes = [p.teacher_size for p in pairs_of(models.vgg5(10, width=0.1), teacher)]
    assert sizes == [(128, 128), (64, 64), (32, 32)]


def test_a_layer_that_is_given_may_be_larger_than_those_before_it():
    class Enlarging(nn.Module):
        def forward(self, x):
            return x.repeat_interleave(8, -1).repeat_interleave(8, -2)

    student = nn.Sequential(
        layer.Conv2d(3, 4, 4, 4, step_mode="m"), Enlarging(), LIFNode(v_threshold=0.1, step_mode="m"),
        layer.AdaptiveAvgPool2d(1, step_mode="m"), layer.Flatten(step_mode="m"),
        layer.Linear(4, 10, step_mode="m"),
    )  # fmt: skip
    with pytest.raises(TapError, match="no spiking layer"):
        pairs_of(student, models.teacher_resnet20(10))
    (pair,) = pairs_of(student, models.teacher_resnet20(10), [("2", "layer1")])
    assert (pair.size, pair.form) == ((64, 64), "NCHW")
    with pytest.raises(TapError, match=r"'4' gives no feature map .*, but shape \(2, 2, 4\)"):
        pairs_of(student, models.teacher_resnet20(10), [("4", "layer1")])
