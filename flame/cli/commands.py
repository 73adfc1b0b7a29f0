"""The commands and their options, as typed functions that tyro turns into a command line."""

from pathlib import Path
from typing import Annotated

import tyro
from tyro.extras import SubcommandApp

_app = SubcommandApp()

Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
Run = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


def application(words: list[str]) -> int:
    """Runs the command that ``words`` name; its exit code."""
    code = _app.cli(
        prog="flame",
        description="FLAME trains neural networks.",
        args=words,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    assert isinstance(code, int)
    return code


@_app.command
def train(
    recipe: Name,
    /,
    *,
    epochs: int | None = None,
    lr: float | None = None,
    batch_size: int | None = None,
    seed: int | None = None,
    device: str | None = None,
    data: Path | None = None,
    limit: int | None = None,
    run_dir: Path | None = None,
    resume: Path | None = None,
    debug: bool = False,
) -> int:
    """Train a recipe, or go on with a run that was interrupted.

    Options that are not given are the recipe's own. With --resume, only --device and --data may
    be given: all else is the run's.

    Args:
        recipe: what to train: fashion-cnn
        epochs: how often to go through the training images
        lr: the largest learning rate
        batch_size: images in a step
        seed: of weights, order and augmentation
        device: cpu
        data: an image folder, DATA/train/CLASS/*.png and DATA/test/CLASS/*.png
        limit: use at most so many training images, and so many test images
        run_dir: the folder to write to, instead of runs/RECIPE-TIME
        resume: the folder of an interrupted run to go on with
        debug: show the traceback of an error
    """
    from flame.cli.train import train as run

    options = {
        "epochs": epochs,
        "lr": lr,
        "batch_size": batch_size,
        "seed": seed,
        "device": device,
        "data": None if data is None else str(data),
        "limit": limit,
    }
    return run(recipe, options, run_dir=run_dir, resume=resume)


@_app.command(name="eval")
def evaluate(
    run: Run,
    /,
    *,
    device: str | None = None,
    data: Path | None = None,
    debug: bool = False,
) -> int:
    """Report the accuracy of a run's checkpoint on the test images.

    Args:
        run: the folder of a run
        device: cpu
        data: an image folder, instead of the run's data
        debug: show the traceback of an error
    """
    from flame.cli.train import test

    return test(run, device=device, data=None if data is None else str(data))


@_app.command
def doctor(*, debug: bool = False) -> int:
    """Print what this machine has for FLAME: CPU, threads, cache, versions, extras.

    Args:
        debug: show the traceback of an error
    """
    from flame.cli.doctor import examine

    return examine()
