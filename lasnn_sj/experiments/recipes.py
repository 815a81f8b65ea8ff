"""Descriptions of runs: networks and settings of LaSNN and of reverse distillation."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Literal


@dataclass(frozen=True)
class Recipe:
    """One LaSNN run, with the paper's settings as defaults.

    Attributes:
        student: network of :mod:`lasnn_sj.models`. One of LaSNN's (``"vgg5"``, ...) is trained as an ANN and
            converted; an SNN with batch norm (``"spiking_resnet18"``, ...) has no ANN, and stage 3 starts
            from its initial weights.
        width: factor of the student's channels.
        T: time steps of training and inference.
        encoding: ``"poisson"`` or ``"direct"``.
        attention: ``"activation"`` or ``"gradient"``.
        alpha: weight of the attention loss.
        leak: factor of the potential per time step (Eq. 1); 1 is no leak.
        gamma: height of the surrogate (Eq. 15).
        dropout: dropout probability of the student, as ANN and as SNN.
        classifier_dropout: another one in the hidden layers of its classifier.
        teacher: ``"resnet20"``, ``"vgg16"`` or ``"densenet121"`` in CIFAR form.
        teacher_width: factor of the teacher's channels (not of DenseNet121's).
        teacher_epochs: of stage 1, the teacher's training by SGD.
        teacher_lr: learning rate of stage 1, a tenth after 60, 80 and 90 % of the epochs.
        teacher_batch: images of a training step in stage 1.
        ann_epochs: of stage 2, the intermediate ANN's training by SGD.
        ann_lr: learning rate of stage 2, falling as stage 1's.
        ann_batch: images of a training step in stage 2.
        calibration_images: how many threshold balancing sees.
        calibration_steps: time steps of threshold balancing.
        threshold_statistic: ``"max"`` or a percentile.
        threshold_scale: factor of the thresholds for stage 3 (the converted SNN itself has factor 1).
        output_scale: multiply the output layer's weights by one factor before stage 3, so that its loss
            begins low; see :func:`~lasnn_sj.conversion.scale_output`.
        epochs: of stage 3, the student's training by Adam; the baselines that train have the same.
        lr: learning rate of stage 3 in its first epoch.
        lr_schedule: learning rate over the epochs of stage 3: ``"constant"`` as in the paper, ``"linear"``
            (``1 - e / E`` of it in epoch ``e`` of ``E``, from 0 on), ``"cosine"``, or ``"steps"`` (a tenth
            after 40, 65 and 85 % of the epochs, as Rathi et al. have it).
        batch: images of a training step in stage 3.
        weight_decay: of stage 3.
        amsgrad: use the AMSGrad variant of Adam in stage 3.
        precision: of convolutions and linear layers in stage 3.
        validate_every: epochs between evaluations on the validation images, in every stage that trains.
        seed: of weights, order of the images, codes and dropout.
        workers: processes that load images.
    """

    student: str = "vgg5"
    width: float = 1.0
    T: int = 100
    encoding: Literal["poisson", "direct"] = "poisson"
    attention: Literal["activation", "gradient"] = "activation"
    alpha: float = 0.9
    leak: float = 0.99
    gamma: float = 0.3
    dropout: float = 0.2
    classifier_dropout: float | None = None
    teacher: Literal["resnet20", "vgg16", "densenet121"] = "resnet20"
    teacher_width: float = 1.0
    teacher_epochs: int = 300
    teacher_lr: float = 0.01
    teacher_batch: int = 256
    ann_epochs: int = 200
    ann_lr: float = 0.01
    ann_batch: int = 256
    calibration_images: int = 512
    calibration_steps: int = 2500
    threshold_statistic: Literal["max"] | float = "max"
    threshold_scale: float = 0.7
    output_scale: bool = False
    epochs: int = 100
    lr: float = 1e-4
    lr_schedule: Literal["constant", "linear", "cosine", "steps"] = "constant"
    batch: int = 16
    weight_decay: float = 5e-4
    amsgrad: bool = False
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    validate_every: int = 1
    seed: int = 0
    workers: int = 0


def rathi(recipe: Recipe) -> Recipe:
    """Return a recipe with the details of Rathi et al. (2020), on whose hybrid training LaSNN builds.

    Dropout 0.5 in the classifier, AMSGrad, a tenth of the learning rate after 40, 65 and 85 % of the epochs,
    and no leak. LaSNN's text mentions none of these.
    """
    return replace(recipe, classifier_dropout=0.5, amsgrad=True, lr_schedule="steps", leak=1.0)


def described(recipe: Recipe) -> dict[str, object]:
    """Return the settings for a run folder, without later options that have their defaults."""
    later = {"classifier_dropout": None, "amsgrad": False}
    return {k: v for k, v in asdict(recipe).items() if k not in later or v != later[k]}


@dataclass(frozen=True)
class ReverseRecipe:
    """Settings of the student's training, alone and with each teacher; the paper's CIFAR-100 is the default.

    The paper gives neither optimiser nor temperatures and weights; those are ours (Yuan et al.'s for the
    virtual teacher).

    Attributes:
        student: network of :mod:`lasnn_sj.models`; teachers are pruned copies of it.
        width: factor of its channels.
        epochs: of every training.
        batch: samples of a training step.
        lr: learning rate, with a cosine to 0 over the epochs.
        weight_decay: of every training.
        optimizer: ``"sgd"`` (momentum 0.9) or ``"adam"``.
        ratios: sparse-KD with teachers pruned this far; 0 is plain self-distillation.
        scope: ``"global"`` or ``"layer"``, what is ranked together when a teacher is pruned.
        temperature: of sparse-KD's softening.
        alpha: weight of sparse-KD's distillation, in [0, 1].
        reduction: of sparse-KD's divergence over the classes, ``"sum"`` or ``"mean"``.
        default: whether there is a row of teacher-default KD.
        default_probability: the virtual teacher's, of the true class, above 1 / K.
        default_temperature: of the virtual teacher's softening.
        default_alpha: weight of teacher-default KD's distillation, in [0, 1].
        default_soften: ``"probability"`` or ``"log"``, what of the virtual teacher is softened.
        precision: of convolutions and linear layers.
        validate_every: epochs between evaluations on the validation samples.
        seed: of weights, order of the samples and random codes; the same for every row.
        workers: processes that load samples.
    """

    student: Literal["spiking_resnet18", "spiking_wrn16_4", "spiking_vgg16"] = "spiking_resnet18"
    width: float = 1.0
    epochs: int = 200
    batch: int = 128
    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: float = 0.1
    weight_decay: float = 5e-4
    ratios: tuple[float, ...] = (0.0, 0.1, 0.3, 0.5, 0.7)
    scope: Literal["global", "layer"] = "global"
    temperature: float = 4.0
    alpha: float = 0.5
    reduction: Literal["sum", "mean"] = "sum"
    default: bool = True
    default_probability: float = 0.99
    default_temperature: float = 20.0
    default_alpha: float = 0.1
    default_soften: Literal["probability", "log"] = "probability"
    precision: Literal["float32", "tf32", "bfloat16", "float16"] = "float32"
    validate_every: int = 1
    seed: int = 0
    workers: int = 0
