"""Inspection of a trained student on test data, written so that a report needs neither network nor data."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from spikingjelly.activation_based import functional
from torch import Tensor, nn

from ..data import events
from ..distillation import (
    Attention,
    Look,
    Signals,
    StudentTaps,
    TapError,
    TeacherForward,
    choose_layers,
)
from ..distillation.objective import members
from ..distillation.pairs import LEVELS
from ..models.readout import BatchError, class_scores, resolve_readout
from ..runtime import distributed, files, random_state
from ..training.callbacks import going_on
from ..training.evaluation import device_of, evaluate, evaluating
from ..training.trainer import Trainer
from .energy import COST, count_operations
from .environment import environment
from .spikes import first_samples, record_traces, spike_statistics, threshold_of

log = logging.getLogger(__name__)

FORMAT = 1  # of the files; to be raised when their meaning changes
EXITS = (0.0, 0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0)  # confidences at which a sample stops
MOST_STEPS = 256  # time steps of the traces that are kept


def inspect(
    trainer: Trainer,
    loader: Iterable,
    *,
    examples: int = 8,
    samples: int = 2000,
    classes: Sequence[str] | None = None,
) -> Path:
    """Inspect a trained student and write the results into its run folder, for reports and TensorBoard.

    Calls :func:`inspect_student` with the trainer's networks, encoder and settings. The pictures, and the
    settings beside the results (HParams), are added to the run's TensorBoard folder.

    Args:
        trainer: trainer with a ``run_dir``.
        loader: test batches ``(images, labels)``.
        examples: number of samples whose maps are kept.
        samples: number of samples in which spikes are counted and examples are sought.
        classes: names of the classes; those of the loader's data set, if it has some, if not given.

    Returns:
        Path of ``inspection.json``.

    Raises:
        ValueError: the trainer has no run folder.
    """
    if trainer.run_dir is None:
        raise ValueError("inspect writes into the run folder; give the trainer a run_dir")
    path = inspect_student(
        trainer.student, trainer.teacher, loader, trainer.encoder, trainer.run_dir,
        attention=next((one for one in members(trainer.objective) if isinstance(one, Attention)), None),
        readout=trainer.readout, examples=examples, samples=samples, classes=classes, device=trainer.device,
        seed=trainer.seed,
    )  # fmt: skip
    if distributed.is_main():
        _show(trainer.run_dir / "tensorboard", trainer.settings(), path)
    return path


def inspect_student(
    student: nn.Module,
    teacher: nn.Module | None,
    loader: Iterable,
    encoder: nn.Module | None,
    run_dir: str | Path,
    *,
    attention: Attention | None = None,
    readout: Literal["auto", "last", "mean"] = "auto",
    examples: int = 8,
    samples: int = 2000,
    classes: Sequence[str] | None = None,
    device: torch.device | str | None = None,
    seed: int | None = None,
) -> Path:
    """Inspect a trained student and write ``inspection.json`` and ``inspection.npz`` into a folder.

    The first file holds accuracy after each time step, operations and energy by then beside those of the
    same network as ANN, accuracy and steps used with early exit, firing rate, spikes and threshold of each
    layer, and versions, hardware and command line. The second holds the confusion matrix; for some
    samples that the student gets right and some that it gets wrong, the input as a picture and the
    attention maps of both networks at each level as training compares them: L2-normalized, the teacher's
    at the student's size (Eq. 5-6, 10-11); and for the first of them spikes and potentials of a few
    neurons of each layer.

    Networks and random-number generators are left as they were. With several processes all must call it;
    the first writes.

    Args:
        student: spiking network in multi-step mode.
        teacher: network from images to logits; without one there are only the student's maps.
        loader: test batches ``(images, labels)``, iterated about four times.
        encoder: encodes images ``[N, ...]`` as ``[T, N, ...]``; ``None`` for event frames.
        run_dir: folder of the files, created if missing.
        attention: objective whose maps and pairs are shown; activation attention if not given.
        readout: as for :class:`~lasnn_sj.LaSNNTrainer`.
        examples: number of samples whose maps are kept; half of them wrong ones, as far as there are.
        samples: number of samples in which spikes are counted and examples are sought.
        classes: names of the classes; those of the loader's data set, if it has some, if not given.
        device: device to run on; the student's if not given.
        seed: seed of the run, to be written down.

    Returns:
        Path of ``inspection.json``.

    Raises:
        BatchError: an empty loader or a batch that cannot be used.
        ValueError: an input without time axis and no encoder, a student without neurons, no examples, or
            fewer names than classes.
        TapError: pairs that were given and cannot be tapped.
    """
    if examples < 1:
        raise ValueError(f"examples must be at least 1, got {examples}")
    folder = Path(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    device = torch.device(device) if device is not None else device_of(student)
    readout = resolve_readout(student, readout)
    with _preserved(student, teacher, encoder):
        images, _, axis = next(first_samples(loader, encoder, 2), (None, None, 0))
        if images is None:
            raise BatchError("the loader for the inspection gave no batch")
        small = images.to(device)
        # so that what follows draws the codes that an evaluation by itself draws
        with _preserved(student, teacher, encoder), torch.no_grad():
            encoded = small if encoder is None else encoder(small)
            outputs = student(encoded)
        every_step = outputs.dim() == 3
        names = _class_names(classes, loader, outputs.shape[-1])
        with _preserved(student, teacher, encoder):
            operations = count_operations(student, loader, encoder, device=device)
        result = evaluate(student, loader, encoder, readout=readout, device=device, over_time=every_step,
                          confusion=True, early_exit=EXITS if every_step else None)  # fmt: skip
        seen = spike_statistics(student, loader, encoder, samples=samples, device=device)
        given = attention is not None and attention.pairs is not None
        # A copy of its own: the trainer's may not have chosen its pairs yet.
        shown = replace(attention or Attention(), levels=LEVELS)
        maps = _Maps(student, teacher, shown)
        try:
            levels, missing = maps.prepare(encoded, small, axis, outputs, given)
            chosen, inputs, arrays = _examples(
                maps, levels, loader, encoder, readout, examples, samples, device
            )
        finally:
            maps.close()
        traces, traced = _traces(student, inputs.narrow(axis, 0, 1), encoder, device)
    arrays |= traced | {"confusion": result["confusion"].numpy().astype(np.int32)}
    modules = dict(student.named_modules())
    found = {
        "format": FORMAT,
        "student": type(student).__name__,
        "parameters": sum(p.numel() for p in student.parameters()),
        "teacher": None if teacher is None else type(teacher).__name__,
        "encoder": repr(encoder),
        "T": seen.T,
        "readout": readout,
        "seed": seed,
        "top1": result["top1"],
        "loss": result["loss"],
        "samples": result["samples"],
        "classes": names,
        "top1_over_time": result.get("top1_over_time"),
        "early_exit": {
            "confidence": EXITS,
            "steps": result.get("early_exit_steps", []),
            "top1": result.get("early_exit_top1", []),
        },
        "spikes_per_neuron": seen.mean,
        "spike_samples": seen.samples,
        "layers": [
            {
                "name": name,
                "neurons": seen.neurons[name],
                "spikes_per_neuron": spikes,
                "firing_rate": spikes / seen.T,
                "v_threshold": threshold_of(modules[name]),
            }
            for name, spikes in seen.spikes_per_neuron.items()
        ],
        "operations": asdict(operations)
        | {
            "energy_pj": operations.energy_pj,
            "ann_energy_pj": operations.ann_energy_pj,
            "pj_per_synop": COST.e_ac_pj,
            "pj_per_mac": COST.e_mac_pj,
        },
        "attention": shown.kind,
        "levels": levels,
        "examples": chosen,
        "traces": traces,
        "missing": missing,
        "environment": environment(device),
    }
    path = folder / "inspection.json"
    if distributed.is_main():
        packed = io.BytesIO()
        np.savez_compressed(packed, **arrays)
        files.write(folder / "inspection.npz", packed.getvalue())
        files.write_json(path, found)
    log.info("inspection of %s: top-1 %.2f %%, %s", folder, result["top1"], path)
    return path


def results(path: Path) -> dict[str, object]:
    """Read from ``inspection.json`` the results that a stage keeps; ``spikes`` is by layer."""
    found = json.loads(path.read_text())
    names = ("loss", "top1", "samples", "top1_over_time", "spikes_per_neuron")
    spikes = {layer["name"]: layer["spikes_per_neuron"] for layer in found["layers"]}
    return {name: found[name] for name in names} | {"spikes": spikes}


def _show(folder: Path, settings: Mapping[str, object], inspection: Path) -> None:
    """Add an inspection to TensorBoard: its pictures, and settings beside results (HParams).

    Args:
        folder: folder of the event files.
        settings: settings of the run; nested ones are flattened, others than numbers become text.
        inspection: ``inspection.json`` of :func:`inspect`, its arrays beside it.
    """
    from torch.utils.tensorboard import SummaryWriter  # a second to import, needed only here

    found = json.loads(inspection.read_text())
    flat = {key: value for key, value in settings.items() if not isinstance(value, dict)}
    for nested in (value for value in settings.values() if isinstance(value, dict)):
        flat |= nested
    flat = {k: v if isinstance(v, (bool, int, float, str)) else str(v) for k, v in flat.items()}
    stored = inspection.with_suffix(".npz")
    with going_on(folder), SummaryWriter(str(folder)) as writer, np.load(stored) as arrays:
        writer.add_images("inspection/input", arrays["inputs"], dataformats="NHWC")
        for name in arrays.files:
            who, _, level = name.partition("_")
            if who in ("teacher", "student"):
                maps = arrays[name]
                bright = maps / np.maximum(maps.max(axis=(1, 2), keepdims=True), 1e-12)
                writer.add_images(f"inspection/level {level}, {who}", bright[..., None], dataformats="NHWC")
        results = {f"result/{name}": found[name] for name in ("top1", "loss", "spikes_per_neuron")}
        writer.add_hparams(flat, results, run_name=".")


def _class_names(classes: Sequence[str] | None, loader: Iterable, K: int) -> list[str] | None:
    """Return the names of the ``K`` classes: those given, or ``classes`` of the loader's data set."""
    if classes is None:
        dataset = getattr(loader, "dataset", None)
        while dataset is not None and not hasattr(dataset, "classes"):
            dataset = getattr(dataset, "dataset", None)  # of a Subset
        found = getattr(dataset, "classes", None)
        return [str(name) for name in found][:K] if found and len(found) >= K else None
    if len(classes) < K:
        raise ValueError(f"classes must be {K} names, one for each of the student's, got {len(classes)}")
    return [str(name) for name in classes][:K]


def _traces(
    student: nn.Module, sample: Tensor, encoder: nn.Module | None, device: torch.device
) -> tuple[list[dict[str, object]], dict[str, np.ndarray]]:
    """Record a few neurons; return them by layer, and their spikes and potentials ``[T, M]``."""
    try:
        found = record_traces(student, sample, encoder, device=device)
    except (RuntimeError, ValueError, IndexError) as error:  # it needs the whole sequence
        log.info("no spikes and potentials of single neurons: %s", error)
        return [], {}
    layers = [
        {"layer": name, "neurons": neurons, "v_threshold": found.v_threshold.get(name)}
        for name, neurons in found.neurons.items()
    ]
    spikes, potentials = (torch.cat(list(values.values()), 1)[:MOST_STEPS].numpy()
                          for values in (found.spikes, found.potentials))  # fmt: skip
    return layers, {"trace_spikes": spikes.astype(np.uint8), "trace_potentials": potentials}


@contextmanager
def _preserved(student: nn.Module, teacher: nn.Module | None, encoder: nn.Module | None) -> Iterator[None]:
    """Enter evaluation mode; afterwards restore modes, neurons' states and random-number generators."""
    generators = random_state.generators_of({"student": student, "encoder": encoder})
    before = random_state.random_state(generators)
    networks = [student] if teacher is None else [student, teacher]
    try:
        with evaluating(*networks):
            yield
    finally:
        random_state.set_random_state(before, generators)


class _Maps:
    """Attention maps of student and teacher at each level."""

    def __init__(self, student: nn.Module, teacher: nn.Module | None, attention: Attention) -> None:
        self.student, self.teacher, self.attention = student, teacher, attention
        self.taps: StudentTaps | None = None
        self.of_teacher: TeacherForward | None = None

    def prepare(
        self, encoded: Tensor, images: Tensor, axis: int, outputs: Tensor, given: bool
    ) -> tuple[list[dict[str, str | None]], str | None]:
        """Set the taps; return the layers whose maps are shown, and why some maps are missing."""
        encoded, images = encoded[:, :2], images.narrow(axis, 0, min(2, images.shape[axis]))
        missing = None
        if self.teacher is not None:
            look = Look(self.student, self.teacher, encoded, images, outputs, outputs.shape[-1])
            try:
                needs = self.attention.prepare(look)
                self.taps = StudentTaps(self.student, needs.student)
                self.of_teacher = TeacherForward(self.teacher, needs)
                pairs = self.attention.chosen
                return [{"student": pair.student, "teacher": pair.teacher} for pair in pairs], None
            except (ValueError, RuntimeError) as error:
                if given:
                    raise
                # a teacher of scores alone may take other input than images, or have no feature maps
                missing = f"no attention maps of the teacher: {error}"
        try:
            self.attention.chosen = choose_layers(self.student, encoded)
        except TapError as error:
            return [], f"no attention maps: {error}"
        names = [pair.student for pair in self.attention.chosen]
        self.taps = StudentTaps(self.student, [(name, self.attention.reading) for name in names])
        return [{"student": name, "teacher": None} for name in names], missing

    def of_student(self, inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Return the student's output and its maps ``[N, H, W]``."""
        with self.taps or nullcontext():
            outputs = self.student(inputs)
            read = self.taps.collect() if self.taps else []
        functional.reset_net(self.student)
        if not self.taps:
            return outputs, []
        signals = Signals(outputs, outputs, student=dict(zip(self.taps.wanted, read)))
        maps = self.attention.student_maps(signals)
        return outputs, [m.view(len(m), *p.size).cpu() for m, p in zip(maps, self.attention.chosen)]

    def close(self) -> None:
        """Remove the taps."""
        for tap in (self.taps, self.of_teacher):
            if tap is not None:
                tap.close()


@torch.no_grad()
def _examples(
    maps_of: _Maps,
    levels: Sequence[dict[str, str | None]],
    loader: Iterable,
    encoder: nn.Module | None,
    readout: str,
    examples: int,
    samples: int,
    device: torch.device,
) -> tuple[list[dict[str, int | None]], Tensor, dict[str, np.ndarray]]:
    """Collect the first correct and the first wrong samples: labels, inputs, and arrays to keep."""
    kinds: dict[bool, list[tuple[dict, Tensor, list[Tensor]]]] = {True: [], False: []}
    half, seen = examples // 2, 0
    for images, labels, axis in first_samples(loader, encoder, samples):
        images = images.to(device)
        outputs, maps = maps_of.of_student(images if encoder is None else encoder(images))
        guesses = class_scores(outputs, len(labels), readout).argmax(1).tolist()
        for n, (label, guess) in enumerate(zip(labels.tolist(), guesses)):
            kind = kinds[label == guess]
            if len(kind) < examples:
                about = {"index": seen + n, "label": label, "prediction": guess, "teacher": None}
                kind.append((about, images.select(axis, n), [m[n] for m in maps]))
        seen += len(labels)
        if len(kinds[False]) >= half and len(kinds[True]) >= examples - half:
            break
    wrong = min(len(kinds[False]), max(half, examples - len(kinds[True])))
    chosen = kinds[True][: examples - wrong] + kinds[False][:wrong]
    abouts, inputs = [about for about, _, _ in chosen], torch.stack([x for _, x, _ in chosen], dim=axis)
    arrays = {"inputs": _pictures(inputs, axis)}
    for number in range(len(levels)):
        arrays[f"student_{number}"] = torch.stack([maps[number] for _, _, maps in chosen]).float().numpy()
    if maps_of.of_teacher:
        labels = torch.tensor([about["label"] for about in abouts], device=device)
        signals = Signals(labels, labels)
        maps_of.of_teacher(inputs, labels, signals)
        for about, guess in zip(abouts, signals.teacher_logits.argmax(1).tolist()):
            about["teacher"] = guess
        pairs = maps_of.attention.chosen
        for number, (found, pair) in enumerate(zip(maps_of.attention.teacher_maps(signals), pairs)):
            arrays[f"teacher_{number}"] = found.view(-1, *pair.size).float().cpu().numpy()
    return abouts, inputs, arrays


def _pictures(images: Tensor, axis: int) -> np.ndarray:
    """Convert images ``[N, C, H, W]``, or event frames ``[T, N, C, H, W]`` summed over time, to colours.

    Inputs of other dimensions become one line of pixels. The result is uint8.
    """
    x = (images.sum(0) if axis == 1 else images).float().cpu().numpy()
    if x.ndim != 4:
        x = x.reshape(len(x), 1, 1, -1)
    if x.shape[1] == 2:
        return events.picture(np.maximum(x, 0))
    if x.shape[1] != 3:
        x = x.mean(1, keepdims=True).repeat(3, axis=1)
    low, high = (-1.0, 1.0) if np.abs(x).max(initial=0) <= 1 else (x.min(), x.max())
    return (255 * (x - low) / max(high - low, 1e-12)).round().astype(np.uint8).transpose(0, 2, 3, 1)
