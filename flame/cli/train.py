"""``flame train`` and ``flame eval``: runs of recipes, told on the console."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from flame.cli.program import program
from flame.core.errors import ArgumentError
from flame.recipes import run as runs
from flame.recipes.run import Run
from flame.train.folder import RunFolder
from flame.train.progress import ProgressReport
from flame.train.task import Task

INTERRUPTED = 130  # the shell's code for a program that SIGINT ended


def train(
    name: str, options: Mapping[str, Any], *, run_dir: Path | None, resume: Path | None
) -> int:
    """Trains, draws the pictures, and says where all is; the exit code."""
    console = Console(highlight=False, soft_wrap=True)
    observers = (ProgressReport(console),)
    if resume is None:
        run = runs.start(name, options, run_dir, observers)
    elif run_dir is not None:
        raise ArgumentError("--run-dir and --resume exclude each other: a run stays in its folder")
    else:
        run = runs.resume(name, resume, options, observers)
        if run.trainer.finished:
            console.print(
                f"{resume} is finished: {run.trainer.epochs} of {run.trainer.epochs} epochs. "
                f"Its accuracy: {program()} eval {resume}"
            )
            return 0
        console.print(
            f"Going on with {resume} after step {run.trainer.step}, with its own settings"
        )
        _compare(console, run)
    _introduce(console, run)
    if not run.trainer.fit():
        console.print(
            f"\nInterrupted after step {run.trainer.step}; all is saved. Go on with\n"
            f"  {program()} train {name} --resume {run.folder.path}"
        )
        return INTERRUPTED
    _conclude(console, run)
    return 0


def _compare(console: Console, run: Run) -> None:
    """Says where a resumed run need not end bitwise as if it had never been interrupted."""
    import flame

    config = run.folder.config()
    here: list[tuple[str, Any]] = [
        ("flame", flame.__version__),
        ("device", runs.device_name(run.task.device)),
    ]
    if run.task.device == "cpu":  # those of a GPU do not count on the threads
        here.append(("threads", flame.get_num_threads()))
    for name, now in here:
        before = config.get(name)
        if before != now:
            console.print(
                f"note: the run began with {name} {before} and goes on with {name} {now}, "
                "so its numbers may differ in their last bits"
            )


def _introduce(console: Console, run: Run) -> None:
    import flame

    task, settings = run.task, run.settings
    where = runs.device_name(task.device)
    if task.device == "cpu":
        where += f" with {flame.get_num_threads()} threads"
    parameters = sum(parameter.numel() for parameter in task.model.parameters())
    console.print(
        f"{run.recipe.name}: {parameters:,} parameters, {settings.epochs} epochs of "
        f"{run.trainer.steps_per_epoch} steps of {settings.batch_size} images, on "
        f"{where}, {settings.precision}"
    )
    console.print(f"run folder: {run.folder.path}")


def _conclude(console: Console, run: Run) -> None:
    folder = run.folder
    last = folder.records("epoch")[-1]
    console.print(f"\ntest accuracy {last['test_accuracy']:.2%} after {last['epoch']} epochs")
    files = [folder.config_file, folder.metrics_file, folder.checkpoint_file]
    files += _pictures(console, run.task, folder)
    console.print(f"{folder.path} holds {', '.join(file.name for file in files)}")
    console.print(f"Test it again: {program()} eval {folder.path}")


def _pictures(console: Console, task: Task, folder: RunFolder) -> list[Path]:
    try:
        from flame.train.pictures import draw

        return draw(task, folder)
    except ImportError as error:
        console.print(
            f"No pictures were drawn, as the plot extra is not installed ({error}). "
            "pip install 'flame-engine[plot]', then "
            f"{program()} eval {folder.path} draws them",
            markup=False,
        )
        return []


def test(path: Path, *, device: str | None, data: str | None, precision: str | None) -> int:
    """Prints the accuracy of a run's checkpoint, and draws its pictures if they are missing."""
    console = Console(highlight=False, soft_wrap=True)
    task, folder, totals = runs.evaluate_checkpoint(path, device, data, precision)
    console.print(
        f"test accuracy {totals.accuracy:.2%} ({totals.correct} of {totals.items} images), "
        f"loss {totals.loss:.4f}"
    )
    if not folder.predictions_file.exists():
        for file in _pictures(console, task, folder):
            console.print(f"drew {file}")
    return 0
