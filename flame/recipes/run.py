"""Starting, resuming and testing the run of a recipe, from Python or from the command line."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flame
from flame.core.errors import ArgumentError, CheckpointError, StateError
from flame.recipes import find
from flame.recipes.recipe import Recipe, Settings
from flame.train.folder import RunFolder
from flame.train.task import Task
from flame.train.totals import Totals
from flame.train.trainer import Observer, Trainer, evaluate

# What may change on --resume: where the run is computed and where its data lie, not what it learns.
MAY_CHANGE = ("device", "data")


@dataclass(frozen=True)
class Run:
    """A run that is ready to go on: `Trainer.fit` does the rest."""

    recipe: Recipe
    settings: Settings
    task: Task
    folder: RunFolder
    trainer: Trainer


def start(
    name: str,
    options: Mapping[str, Any],
    run_dir: Path | None = None,
    observers: Sequence[Observer] = (),
) -> Run:
    """A new run of the recipe ``name``, its settings replaced by the ``options`` that are not None.

    Raises ArgumentError for an unknown recipe or a bad option, DeviceError for a device that is not
    there, DataError for data that cannot be read, CheckpointError where the run folder cannot be
    written.
    """
    recipe = find(name)
    settings = recipe.defaults.with_options(options)
    task = recipe.build(settings)  # before the folder, so that bad data leaves nothing behind
    config = {
        "recipe": recipe.name,
        "flame": flame.__version__,
        "threads": flame.get_num_threads(),
        "device": device_name(task.device),
        "classes": list(task.classes),
        "settings": settings.to_config(),
    }
    folder = RunFolder.create(run_dir, recipe.name, config)
    return _run(recipe, settings, task, folder, observers)


def resume(
    name: str,
    path: Path,
    options: Mapping[str, Any],
    observers: Sequence[Observer] = (),
) -> Run:
    """The run in the folder ``path``, where its checkpoint left it.

    Its settings are those of its ``config.json``; ``options`` may give it another device, or
    another place of the same data. Raises ArgumentError for any other option, CheckpointError where
    the checkpoint is missing or damaged.
    """
    given = {key: value for key, value in options.items() if value is not None}
    folder = RunFolder.open(path)
    recipe, settings = _read(folder)
    if name != recipe.name:
        raise ArgumentError(f"{path} is a run of {recipe.name}, not of {name}")
    for key, value in given.items():
        if key not in MAY_CHANGE and value != getattr(settings, key):
            raise ArgumentError(
                f"--{key.replace('_', '-')} cannot change on --resume: the run goes on with "
                f"{getattr(settings, key)}. Only {' and '.join('--' + k for k in MAY_CHANGE)} can; "
                "for other settings start a new run"
            )
    settings = replace(settings, **given)
    state = folder.load()
    run = _run(recipe, settings, _rebuild(recipe, settings, folder), folder, observers)
    run.trainer.load_state_dict(state)
    folder.rewind(run.trainer.step)
    return run


def device_name(device: str) -> str:
    """What computes: ``cpu``, or the GPU's name. Bits may differ between two of them."""
    return device if device == "cpu" else flame.cuda.get_device_name(device)


def evaluate_checkpoint(
    path: Path,
    device: str | None = None,
    data: str | None = None,
    precision: str | None = None,
) -> tuple[Task, RunFolder, Totals]:
    """Loss and accuracy of the checkpoint in the run folder ``path`` on the test images."""
    folder = RunFolder.open(path)
    recipe, settings = _read(folder)
    settings = settings.with_options({"device": device, "data": data, "precision": precision})
    state = folder.load()
    task = _rebuild(recipe, settings, folder)
    try:
        task.model.load_state_dict(state["model"])
    except (KeyError, TypeError, StateError) as error:
        raise CheckpointError(
            f"{folder.checkpoint_file} does not fit the recipe: {error}"
        ) from error
    return task, folder, evaluate(task)


def _run(
    recipe: Recipe, settings: Settings, task: Task, folder: RunFolder, observers: Sequence[Observer]
) -> Run:
    trainer = Trainer(
        task, folder, epochs=settings.epochs, observers=observers, eager=settings.eager
    )
    return Run(recipe, settings, task, folder, trainer)


def _read(folder: RunFolder) -> tuple[Recipe, Settings]:
    config = folder.config()
    if not {"recipe", "settings", "classes"} <= config.keys():
        raise CheckpointError(f"{folder.config_file} is not the config of a run; start a new run")
    recipe = find(config["recipe"])
    return recipe, type(recipe.defaults).from_config(config["settings"])


def _rebuild(recipe: Recipe, settings: Settings, folder: RunFolder) -> Task:
    """The task of a run that was started before, on data with the same classes."""
    task = recipe.build(settings)
    classes = tuple(folder.config()["classes"])
    if task.classes != classes:
        raise ArgumentError(
            f"the run in {folder.path} learned the classes {', '.join(classes)}, and the data have "
            f"{', '.join(task.classes)}; give it the same data with --data"
        )
    return task
