"""Trained students as folders: what is written is read again, and nothing else is."""

import json
import pickle
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from lasnn_sj import DirectEncoder, PoissonEncoder, models
from lasnn_sj.conversion import balance_thresholds, convert, prune_magnitude
from lasnn_sj.models import PretrainedError, from_pretrained, save_pretrained
from lasnn_sj.models.pretrained import FORMAT
from lasnn_sj.neurons import LIFNode, LinearSurrogate


@pytest.fixture(scope="module")
def student():
    """A converted and balanced VGG5, with the surrogate of another gamma."""
    torch.manual_seed(0)
    snn = convert(models.vgg5(10, width=0.05, spiking=False), leak=0.9)
    balance_thresholds(snn, torch.rand(4, 3, 32, 32) * 2 - 1, DirectEncoder(60), scale=0.2)
    for module in snn.modules():
        if isinstance(module, LIFNode):
            module.surrogate_function = LinearSurrogate(0.5)
    return snn.eval()


@pytest.fixture
def folder(student, tmp_path):
    return save_pretrained(
        student, DirectEncoder(5), tmp_path / "vgg5", metrics={"top1": 12.5}, training={"epochs": 3}
    )


def change(folder, **values):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | values))


def test_a_student_comes_back_as_it_was(student, folder):
    net, encoder = from_pretrained(folder)
    assert type(encoder) is DirectEncoder
    assert encoder.T == 5
    assert not net.training
    state, there = student.state_dict(), net.state_dict()
    assert list(state) == list(there)
    assert all(torch.equal(tensor, there[name]) for name, tensor in state.items())
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(net(encoder(images)), student(encoder(images)))
    assert student(encoder(images)).abs().sum() > 0
    assert net.features[0].neuron.surrogate_function.alpha == 0.5
    net(encoder(images)).sum().backward()  # and can be trained further
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_the_config_holds_the_facts(folder):
    config = from_pretrained(folder / "model.safetensors")[0].pretrained_config
    assert config == json.loads((folder / "config.json").read_text())
    assert config["format"] == FORMAT
    assert config["architecture"]["name"] == "vgg5"
    assert config["architecture"]["arguments"]["leak"] == 0.9
    assert config["normalization"] == {"mean": [0.5], "std": [0.5]}
    assert config["metrics"] == {"top1": 12.5}
    assert config["training"] == {"epochs": 3}
    assert set(load_file(folder / "model.safetensors")) == {
        name for name in from_pretrained(folder)[0].state_dict() if "extra_state" not in name
    }


def test_the_model_card_tells_them(folder):
    card = (folder / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: lasnn_sj\n")
    for words in ("# vgg5", "`DirectEncoder(T=5)`", "| top1 | 12.5 |", "| epochs | 3 |", "from_pretrained"):
        assert words in card


@pytest.mark.parametrize(
    "name", [name for name in models.list_models() if not name.startswith("teacher") and name != "vgg5"]
)
def test_every_student_of_the_package_can_be_saved(name, tmp_path):
    torch.manual_seed(0)
    net = models.create(name, num_classes=4, width=0.03).eval()
    code = torch.rand(2, 1, 3, 32, 32)
    wanted = net(code)
    there, encoder = from_pretrained(save_pretrained(net, PoissonEncoder(7), tmp_path))
    assert (type(encoder), encoder.T) == (PoissonEncoder, 7)
    assert torch.equal(there(code), wanted)


def test_event_frames_need_no_encoder(tmp_path):
    net = models.spiking_resnet18(11, in_channels=2, image_size=64, width=0.05)
    assert from_pretrained(save_pretrained(net, None, tmp_path))[1] is None


def test_a_second_save_replaces_the_first(student, folder):
    save_pretrained(student, PoissonEncoder(3), folder)
    assert from_pretrained(folder)[1].T == 3
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]


# ---- what cannot be saved ----


@pytest.mark.parametrize(("make", "message"), [
    (lambda: nn.Linear(2, 2), "Linear was not built by a function of lasnn_sj.models"),
    (lambda: prune_magnitude(models.vgg5(10, width=0.05), 0.5), "plain vgg5: it misses tensors features.0"),
    (lambda: models.vgg5(10, width=0.05).half(), r"tensor .* is .*float16.*F32"),
])  # fmt: skip
def test_a_network_that_cannot_be_built_again_is_not_saved(make, message, tmp_path):
    with pytest.raises(PretrainedError, match=message):
        save_pretrained(make(), DirectEncoder(5), tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_other_encoders_surrogates_and_facts_are_not_saved(student, tmp_path):
    with pytest.raises(
        PretrainedError, match="encoder must be one of DirectEncoder, PoissonEncoder, got Ident"
    ):
        save_pretrained(student, nn.Identity(), tmp_path)
    with pytest.raises(PretrainedError, match="metrics and training must hold what JSON can"):
        save_pretrained(student, None, tmp_path, training={"device": torch.device("cpu")})
    with pytest.raises(PretrainedError, match="metrics and training must hold what JSON can"):
        save_pretrained(student, None, tmp_path, metrics={"top1": float("nan")})
    net = models.vgg5(10, width=0.05)
    net.features[0].neuron.surrogate_function = nn.Hardtanh()
    with pytest.raises(PretrainedError, match="neuron 'features.0.neuron' has surrogate Hardtanh"):
        save_pretrained(net, None, tmp_path)
    assert not list(tmp_path.iterdir())


# ---- what is refused ----


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "student.pt"])
@pytest.mark.parametrize("writer", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))])
def test_a_pickle_is_refused_and_not_executed(name, writer, folder):
    (folder / "model.safetensors").unlink()
    writer(Bomb(folder / "executed"), folder / name)
    for source in (folder, folder / name):
        with pytest.raises(
            PretrainedError, match=f"{name} is a pickle, which can execute code and is not read"
        ):
            from_pretrained(source)
    assert not (folder / "executed").exists()


def test_tensors_that_miss_are_left_over_or_have_another_shape(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    first = "features.0.weights.weight"
    for changed, message in (
        ({k: v for k, v in tensors.items() if k != first}, f"misses tensors {first}$"),
        (tensors | {"features.0.bias": torch.zeros(3)}, "has extra tensors features.0.bias$"),
        (tensors | {first: torch.zeros(3, 3, 3, 4)}, r"tensor features.0.weights.weight is \(\(3, 3, 3, 4\)"),
        (tensors | {first: tensors[first].double()}, r"is \(.*'F64'\), the network's is \(.*'F32'\)"),
    ):
        save_file(changed, path)
        with pytest.raises(PretrainedError, match=message):
            from_pretrained(folder)


def test_a_cut_file_is_refused(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(PretrainedError, match="model.safetensors is damaged"):
        from_pretrained(folder)


def build(name="vgg5", **arguments):
    return {"architecture": {"name": name, "arguments": {"num_classes": 10} | arguments}}


NEURON = {"v_threshold": 1.0, "leak": 0.9, "gamma": 0.5}


@pytest.mark.parametrize(("values", "message"), [
    ({"format": 2}, "config.json has format 2, this version of lasnn_sj reads format 1"),
    ({"format": None}, "has format None"),
    ({"code": "import os"}, "has unknown keys: 'code'"),
    (build("vgg6"), "unknown model 'vgg6'; similar names: vgg"),
    (build("__import__"), "unknown model '__import__'"),
    (build(["vgg5"]), "config.json: architecture"),
    (build(depth=3), "unexpected keyword argument 'depth'"),
    (build(width="wide"), "config.json: architecture"),
    (build(width=1e300), "config.json: architecture"),
    (build(image_size=2**50), "tensor features.0.weights.weight"),
    (build(), "tensor features.0.weights.weight is .* the network's is .*64, 3, 3, 3"),
    ({"architecture": "vgg5"}, "architecture must hold arguments and name"),
    ({"architecture": {"name": "vgg5", "arguments": [10]}}, "arguments must be names and values"),
    ({"normalization": [0.5]}, "normalization must hold mean and std"),
    ({"encoder": {"name": "eval", "T": 3}}, "encoder must be null, or a name"),
    ({"encoder": {"name": ["DirectEncoder"], "T": 3}}, "encoder must be null, or a name"),
    ({"encoder": {"name": "DirectEncoder", "T": 0}}, "encoder: T must be a whole number"),
    ({"neurons": {}}, r"they differ in \['classifier.0.neuron'"),
    ({"neurons": None}, "neurons are not those of the network"),
])  # fmt: skip
def test_a_config_that_fits_no_network_is_refused(values, message, folder):
    change(folder, **values)
    with pytest.raises(PretrainedError, match=message):
        from_pretrained(folder)


@pytest.mark.parametrize("values", [
    NEURON | {"v_threshold": 0.0}, NEURON | {"v_threshold": float("nan")}, NEURON | {"v_threshold": True},
    NEURON | {"leak": 1.5}, NEURON | {"gamma": "0.3"}, {"v_threshold": 1.0}, 1.0,
])  # fmt: skip
def test_a_neuron_s_numbers_are_checked(values, folder):
    neurons = json.loads((folder / "config.json").read_text())["neurons"]
    change(folder, neurons=neurons | {"features.2.neuron": values})
    with pytest.raises(PretrainedError, match="neuron 'features.2.neuron'"):
        from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b"[]", b" " * (2 << 20)])
def test_a_damaged_config_is_refused(content, folder):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(PretrainedError, match=r"config.json (cannot be read|has format None)"):
        from_pretrained(folder)


def test_missing_files_are_named(folder, tmp_path):
    with pytest.raises(PretrainedError, match="nowhere does not exist"):
        from_pretrained(tmp_path / "nowhere")
    (folder / "config.json").unlink()
    with pytest.raises(PretrainedError, match=r"config.json cannot be read"):
        from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(PretrainedError, match=r"vgg5 has no model.safetensors$"):
        from_pretrained(folder)


# ---- the Hub, up to the network ----


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """huggingface_hub with a folder in place of the network."""
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, repo_id, private, exist_ok):
            calls.append(("create", repo_id, private, exist_ok))

        def upload_folder(self, repo_id, folder_path, allow_patterns):
            shutil.copytree(folder_path, tmp_path / repo_id)
            calls.append(("upload", repo_id, allow_patterns))
            return f"https://huggingface.co/{repo_id}/commit/1"

    def download(repo_id, filename, revision=None):
        calls.append(("download", repo_id, filename, revision))
        (tmp_path / "blobs").mkdir(exist_ok=True)
        link = tmp_path / "blobs" / filename
        link.unlink(missing_ok=True)
        link.symlink_to(tmp_path / repo_id / filename)  # as the cache of the Hub does
        return str(link)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return SimpleNamespace(calls=calls, path=tmp_path)


def test_a_student_goes_to_the_hub_and_comes_back(hub, folder, student):
    address = models.push_to_hub(folder, "someone/vgg5-cifar10", private=True)
    assert address == "https://huggingface.co/someone/vgg5-cifar10/commit/1"
    net, encoder = models.from_hub("someone/vgg5-cifar10", revision="v1")
    assert encoder.T == 5
    assert all(torch.equal(net.state_dict()[name], tensor) for name, tensor in student.state_dict().items())
    files = ["model.safetensors", "config.json", "README.md"]
    assert hub.calls == [
        ("create", "someone/vgg5-cifar10", True, True),
        ("upload", "someone/vgg5-cifar10", files),
        ("download", "someone/vgg5-cifar10", "config.json", "v1"),
        ("download", "someone/vgg5-cifar10", "model.safetensors", "v1"),
    ]


def test_a_folder_that_cannot_be_read_is_not_uploaded(hub, folder):
    change(folder, format=0)
    with pytest.raises(PretrainedError, match="format 0"):
        models.push_to_hub(folder, "someone/vgg5")
    assert hub.calls == []


def test_the_hub_without_its_package(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'lasnn-sj\[hub\]'"):
        models.push_to_hub(folder, "someone/vgg5")
