"""The commands and their options, as typed functions that tyro turns into a command line."""

from pathlib import Path
from typing import Annotated

import tyro
from tyro.extras import SubcommandApp

_app = SubcommandApp()


def _own(kind: str) -> object:
    """How --help shows an option that leaves the recipe's own value where it is not given."""
    return tyro.conf.arg(metavar=kind, help_behavior_hint="")


Name = Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")]
RunPath = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
Whole = Annotated[int | None, _own("INT")]
Real = Annotated[float | None, _own("FLOAT")]
Device = Annotated[str | None, _own("DEVICE")]
Precision = Annotated[str | None, _own("PRECISION")]
Folder = Annotated[Path | None, _own("DIR")]
Flag = Annotated[bool, tyro.conf.arg(help_behavior_hint="")]


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
    epochs: Whole = None,
    lr: Real = None,
    batch_size: Whole = None,
    seed: Whole = None,
    device: Device = None,
    precision: Precision = None,
    data: Folder = None,
    limit: Whole = None,
    eager: Flag = False,
    run_dir: Folder = None,
    resume: Folder = None,
    debug: Flag = False,
) -> int:
    """Train a recipe, or go on with a run that was interrupted.

    Options that are not given are the recipe's own. With --resume, only --device and --data may
    be given: all else is the run's.

    Args:
        recipe: what to train, such as fashion-cnn
        epochs: how often to go through the training images
        lr: the largest learning rate
        batch_size: images in a step
        seed: of weights, order and augmentation
        device: cpu, cuda, or cuda:N
        precision: float32, bf16 (autocast), or fp16 (autocast and a scaled loss)
        data: an image folder, DIR/CLASS/*.png, or DIR/train/CLASS/*.png and DIR/test/CLASS/*.png
        limit: use at most so many training images, and so many test images
        eager: run operation by operation instead of as one compiled program
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
        "precision": precision,
        "data": None if data is None else str(data.absolute()),
        "limit": limit,
        "eager": eager or None,
    }
    return run(recipe, options, run_dir=run_dir, resume=resume)


@_app.command(name="eval")
def evaluate(
    run: RunPath,
    /,
    *,
    device: Device = None,
    precision: Precision = None,
    data: Folder = None,
    debug: Flag = False,
) -> int:
    """Report the accuracy of a run's checkpoint on the test images.

    Args:
        run: the folder of a run
        device: cpu, cuda, or cuda:N
        precision: float32, bf16 (autocast), or fp16 (autocast and a scaled loss)
        data: an image folder, instead of the run's data
        debug: show the traceback of an error
    """
    from flame.cli.train import test

    place = None if data is None else str(data.absolute())
    return test(run, device=device, data=place, precision=precision)


@_app.command
def doctor(*, debug: Flag = False) -> int:
    """Print what this machine has for FLAME: CPU, GPUs, threads, caches, versions, extras.

    Args:
        debug: show the traceback of an error
    """
    from flame.cli.doctor import examine

    return examine()
