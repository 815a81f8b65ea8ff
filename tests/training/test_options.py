"""Options: early stopping and the best weights, by scripted validations, the same after a restart."""

import logging

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lasnn_sj import Callback
from lasnn_sj.training import CheckpointError, Trainer, TrainingOptions, load_weights
from lasnn_sj.training.metrics import best_row, rows_since_best

K, NAN = 3, float("nan")
TOP1 = [50.0, 70.0, 60.0, 70.0, 65.0, 80.0]  # the best of the first five is the second, of equals the first
LOSS = [1.0, 0.9, 0.7, 0.7, 0.8, 0.6]


def loader(n=12):
    images = torch.randn(n, 4, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(images, torch.arange(n) % K), 4, shuffle=True,
                      generator=torch.Generator().manual_seed(2))  # fmt: skip


class Kept(Callback):
    """Weights after each epoch; ends a run after one of them as a kill would."""

    def __init__(self, stop=None):
        self.weights, self.stop = {}, stop

    def on_epoch(self, trainer, row):
        self.weights[row["epoch"]] = {k: v.clone() for k, v in trainer.student.state_dict().items()}
        if row["epoch"] == self.stop:
            raise KeyboardInterrupt


def make(folder=None, stop=None, top1=TOP1, loss=LOSS, **options):
    """A trainer whose validations give the numbers of a script."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, K))
    kept = Kept(stop)
    trainer = Trainer(
        net, optimizer=torch.optim.Adam(net.parameters(), 0.01), run_dir=folder, seed=0, callbacks=[kept],
        options=TrainingOptions(**options),
    )  # fmt: skip
    trainer.evaluate = lambda _: {"top1": top1[trainer.epoch], "loss": loss[trainer.epoch], "samples": 12}
    return trainer, kept


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("monitor", "patience", "epochs", "best"),
    [("val_top1", 3, 5, 2), ("val_top1", 4, 6, 6), ("val_loss", 2, 5, 3), ("val_loss", None, 6, 6)],
)
def test_it_stops_after_patience_and_keeps_the_best_weights(
    tmp_path, monitor, patience, epochs, best, caplog
):
    trainer, kept = make(tmp_path, monitor=monitor, patience=patience, keep_best=True)
    with caplog.at_level(logging.INFO, "lasnn_sj"):
        history = trainer.fit(loader(), loader(), epochs=6)
    assert [row["epoch"] for row in history] == list(range(1, epochs + 1))
    assert trainer.best["epoch"] == best
    assert same(load_file(tmp_path / "best.safetensors"), kept.weights[best])
    assert same(load_file(tmp_path / "weights.safetensors"), kept.weights[epochs])
    assert same(trainer.student.state_dict(), kept.weights[epochs])
    assert ("stopped early: no better epoch in" in caplog.text) == (epochs < 6)
    assert f"best epoch {best}: validation " in caplog.text
    net = load_weights(tmp_path / "best.safetensors", make()[0].student)
    assert same(net.state_dict(), kept.weights[best])


@pytest.mark.parametrize("stop", [2, 3])
def test_a_run_that_was_cut_off_stops_where_the_other_does(tmp_path, stop):
    options = {"patience": 3, "keep_best": True}
    alone, _ = make(tmp_path / "alone", **options)
    alone.fit(loader(), loader(), epochs=6)
    cut = tmp_path / "cut"
    with pytest.raises(KeyboardInterrupt):
        make(cut, stop, **options)[0].fit(loader(), loader(), epochs=6)
    again, _ = make(cut, **options)
    again.fit(loader(), loader(), epochs=6)
    assert len(again.history) == 5
    for name in ("best.safetensors", "weights.safetensors"):
        assert (cut / name).read_bytes() == (tmp_path / "alone" / name).read_bytes()


def test_a_run_that_stopped_early_is_finished_and_more_patience_goes_on(tmp_path, caplog):
    make(tmp_path, patience=3)[0].fit(loader(), loader(), epochs=6)
    trainer, kept = make(tmp_path, patience=3)
    assert len(trainer.fit(loader(), loader(), epochs=6)) == 5
    assert f"the run in {tmp_path} stopped early after epoch 5; nothing was trained" in caplog.text
    assert kept.weights == {}
    more, _ = make(tmp_path, patience=4)
    assert [row["epoch"] for row in more.fit(loader(), loader(), epochs=6)] == [1, 2, 3, 4, 5, 6]


def test_patience_counts_validations_not_epochs():
    trainer, _ = make(patience=1)
    history = trainer.fit(loader(), loader(), epochs=6, validate_every=2)
    assert [row.get("val_top1") for row in history] == [None, 70.0, None, 70.0]


def test_without_patience_nothing_stops_and_without_keep_best_nothing_is_kept(tmp_path):
    trainer, kept = make(tmp_path)
    assert len(trainer.fit(loader(), loader(), epochs=6)) == 6
    assert not (tmp_path / "best.safetensors").exists()
    assert same(load_file(tmp_path / "weights.safetensors"), kept.weights[6])


def test_a_loss_that_is_not_finite_is_never_the_best():
    history = [{"epoch": e, "val_loss": v} for e, v in enumerate([NAN, 2.0, 1.0, NAN, float("-inf"), 1.5], 1)]
    assert best_row(history, "val_loss")["epoch"] == 3
    assert rows_since_best(history, "val_loss") == 3
    assert best_row(history[:1], "val_loss") is None
    assert rows_since_best(history[:1], "val_loss") == 1
    assert best_row([{"epoch": 1}], "val_top1") is None


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ValueError, match='monitor must be "val_top1" or "val_loss", got \'top1\''):
        TrainingOptions(monitor="top1")
    with pytest.raises(ValueError, match="patience must be a whole number, at least 1, got 0"):
        TrainingOptions(patience=0)
    with pytest.raises(ValueError, match="keep_best writes best.safetensors to the run folder; give a run_d"):
        make(keep_best=True)
    for options, name in (({"patience": 2}, "patience"), ({"keep_best": True}, "keep_best")):
        trainer, _ = make(tmp_path / name, **options)
        with pytest.raises(ValueError, match=f"options.{name} watches val_top1; give fit a val_loader"):
            trainer.fit(loader(), epochs=2)
    make(tmp_path / "plain")[0].fit(loader(), loader(), epochs=1)
    with pytest.raises(ValueError, match="keep_best: there None, here True"):
        make(tmp_path / "plain", keep_best=True)[0].fit(loader(), loader(), epochs=2)
    with pytest.raises(CheckpointError, match="nothing.safetensors cannot be used"):
        load_weights(tmp_path / "nothing.safetensors", nn.Linear(1, 1))
    with pytest.raises(CheckpointError, match="weights.safetensors cannot be used"):
        load_weights(tmp_path / "plain" / "weights.safetensors", nn.Linear(1, 1))
