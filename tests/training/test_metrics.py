"""Rows of the metrics in words."""

from lasnn_sj.training.metrics import describe, name_of


def test_a_row_in_words():
    row = {"epoch": 3, "loss": 0.73501, "ce": 0.1, "top1": 98.538, "attention_low": 0.5, "val_top1": 97.0,
           "lr": 5e-4}  # fmt: skip
    assert describe(row) == (
        "epoch 3, training loss 0.735, cross-entropy 0.1, training accuracy 98.54 %, attention low 0.5, "
        "validation accuracy 97.00 %, learning rate 0.0005"
    )
    assert name_of("my_own_part") == "my own part"
