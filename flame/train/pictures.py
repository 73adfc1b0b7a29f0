"""The pictures of a finished run. They need the ``plot`` extra, which is imported only here."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

import flame
from flame.checkpoint.atomic import written_beside
from flame.train.folder import RunFolder
from flame.train.task import Task

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS, ROWS = 8, 5


def draw(task: Task, folder: RunFolder) -> list[Path]:
    """Draws ``curves.png`` and ``predictions.png`` and returns their paths.

    Raises ImportError where matplotlib is missing, CheckpointError where they cannot be written.
    """
    return [
        _save(_curves(folder), folder.curves_file),
        _save(_predictions(task), folder.predictions_file),
    ]


def _figure(width: float, height: float) -> "Figure":
    # The figure class itself, without pyplot: no window system, no global state.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: "Figure", path: Path) -> Path:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    with written_beside(path) as file:
        file.write(buffer.getvalue())
    return path


def _curves(folder: RunFolder) -> "Figure":
    steps, epochs = folder.records("step"), folder.records("epoch")

    def column(records: Sequence[dict[str, Any]], key: str) -> list[float]:
        return [record[key] for record in records]

    figure = _figure(13, 4)
    losses, accuracies, rates = figure.subplots(1, 3)
    losses.plot(column(steps, "step"), column(steps, "loss"), color="0.8", label="step")
    for axis, name in ((losses, "loss"), (accuracies, "accuracy")):
        for part in ("train", "test"):
            values = column(epochs, f"{part}_{name}")
            axis.plot(column(epochs, "step"), values, marker=".", label=part)
        axis.set_title(name)
        axis.legend()
    rates.plot(column(steps, "step"), column(steps, "lr"))
    rates.set_title("learning rate")
    for axis in (losses, accuracies, rates):
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    return figure


def _predictions(task: Task) -> "Figure":
    """The first test images with what the model takes them for: green where right, else red."""
    task.model.eval()
    images, labels = next(iter(task.test_batches))  # (N, 1, H, W), (N,)
    with flame.no_grad(), task.autocast():
        logits = task.model(images.to(task.device))
        scores = flame.nn.functional.softmax(logits, dim=1).float().cpu().numpy()
    pixels = task.pictures(images).numpy()
    figure = _figure(COLUMNS * 1.35, ROWS * 1.6)
    grid = figure.subplots(ROWS, COLUMNS, squeeze=False)
    for index, axis in enumerate(grid.flat):
        axis.set_axis_off()
        if index >= len(pixels):
            continue
        guess, truth = int(np.argmax(scores[index])), int(labels[index].item())
        axis.imshow(pixels[index], cmap="gray", vmin=0, vmax=1)
        told = f"{task.classes[guess]} {scores[index, guess]:.0%}"
        if guess != truth:
            told += f"\nis {task.classes[truth]}"
        axis.set_title(told, fontsize=7, color="green" if guess == truth else "red")
    return figure
