"""Models by name."""

import pytest
import torch

from lasnn_sj import models
from lasnn_sj.conversion import convert


def test_every_builder_is_listed_and_public():
    names = models.list_models()
    assert {"conv3_linear2", "vgg5", "spiking_resnet19", "teacher_densenet121"} <= set(names)
    assert names == sorted(names)
    assert set(names) <= set(models.__all__)


def test_names_by_pattern():
    assert models.list_models("vgg[579]") == ["vgg5", "vgg7", "vgg9"]
    assert models.list_models("*vgg16") == ["spiking_vgg16", "teacher_vgg16", "vgg16"]
    assert models.list_models("alexnet") == []


@pytest.mark.parametrize("name", models.list_models())
def test_a_model_by_name_is_what_its_builder_builds(name):
    with torch.device("meta"):
        net, built = models.create(name, num_classes=7), getattr(models, name)(7)
    assert type(net) is type(built)
    assert [(n, p.shape) for n, p in net.named_parameters()] == [
        (n, p.shape) for n, p in built.named_parameters()
    ]
    assert net.architecture == built.architecture
    assert net.architecture["name"] == name
    assert net.architecture["arguments"]["num_classes"] == 7


def test_a_network_remembers_all_its_arguments():
    net = models.vgg5(10, 1, width=0.1, leak=0.5)
    assert net.architecture == {"name": "vgg5", "arguments": {
        "num_classes": 10, "in_channels": 1, "image_size": 32, "width": 0.1, "spiking": True, "leak": 0.5,
        "dropout": 0.2,
    }}  # fmt: skip


def test_a_converted_network_is_remembered_as_the_spiking_one():
    ann = models.vgg5(10, width=0.05, spiking=False)
    snn = convert(ann, leak=1.0)
    assert snn.architecture["arguments"] == ann.architecture["arguments"] | {"spiking": True, "leak": 1.0}
    assert ann.architecture["arguments"]["spiking"] is False


def test_builders_keep_their_signature_and_docstring():
    with pytest.raises(TypeError, match="num_classes"):
        models.vgg5()
    assert models.vgg5.__name__ == "vgg5"
    assert "Rathi" in models.vgg5.__doc__


@pytest.mark.parametrize(("name", "near"), [
    ("vgg6", "vgg9"), ("spiking_resnet", "spiking_resnet19"), ("VGG5", "vgg"), ("swin", "teacher_vgg16"),
])  # fmt: skip
def test_an_unknown_name_is_answered_with_similar_ones(name, near):
    with pytest.raises(ValueError, match=f"unknown model '{name}'; similar names: .*{near}"):
        models.create(name, num_classes=10)


@pytest.mark.parametrize("name", ["vgg5", "spiking_vgg9", "teacher_resnet20"])
@pytest.mark.parametrize(
    ("argument", "value"), [("num_classes", 0), ("num_classes", 2.5), ("in_channels", -1)]
)
def test_a_number_of_classes_or_channels_below_one_is_refused(name, argument, value):
    with pytest.raises(
        ValueError, match=rf"{name}: {argument} must be a whole number, at least 1; got {value}"
    ):
        models.create(name, **{"num_classes": 10, argument: value})


@pytest.mark.parametrize(("arguments", "message"), [
    ({}, "missing a required argument: 'num_classes'"),
    ({"num_classes": 10, "depth": 5}, "unexpected keyword argument 'depth'; it takes num_classes"),
])  # fmt: skip
def test_wrong_arguments_name_the_model_and_what_it_takes(arguments, message):
    with pytest.raises(TypeError, match=f"model 'vgg5': .*{message}"):
        models.create("vgg5", **arguments)
