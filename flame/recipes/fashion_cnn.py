"""A small convolutional network on the bundled 10,000 images of Fashion-MNIST.

Three stages of convolution, batch norm, 2 by 2 max pooling and ReLU, then one linear layer: 28 by
28 pixels become 14, 7 and at last 3 by 3. Pooling stands before the ReLU, which gives the same
numbers (both are monotonic) with a quarter of the work.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import flame
from flame import nn
from flame.nn.functional import cross_entropy
from flame.optim import AdamW
from flame.optim.lr_scheduler import LambdaLR
from flame.recipes._images import image_loaders, to_pictures
from flame.recipes.recipe import Recipe, Settings, check_device
from flame.tensor import Tensor
from flame.train.task import Task


@dataclass(frozen=True, kw_only=True)
class FashionSettings(Settings):
    """The defaults reach 91% in about two minutes on two CPU cores."""

    epochs: int = 12
    lr: float = 3e-3
    batch_size: int = 128
    weight_decay: float = 0.05
    dropout: float = 0.3
    label_smoothing: float = 0.05
    crop_padding: int = 1
    warm_up: float = 0.1


def model(classes: int, *, dropout: float) -> nn.Module:
    """Grey images (N, 1, 28, 28) to logits (N, classes)."""

    def stage(inputs: int, outputs: int) -> list[nn.Module]:
        # The batch norm's shift takes the place of the convolution's bias.
        convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        return [convolution, nn.BatchNorm2d(outputs), nn.MaxPool2d(2), nn.ReLU()]

    return nn.Sequential(
        *stage(1, 32),
        *stage(32, 64),
        *stage(64, 128),
        nn.Flatten(),
        nn.Dropout(dropout),
        nn.Linear(128 * 3 * 3, classes),
    )


def warm_cosine(steps: int, *, warm_up: float) -> Callable[[int], float]:
    """The factor of the learning rate at each step: half a cosine wave from 1 to 0.

    The first ``warm_up`` of all steps are held below a line that rises from 0 to 1.
    """

    def factor(step: int) -> float:
        return min((step + 1) / (warm_up * steps), 0.5 + 0.5 * math.cos(math.pi * step / steps))

    return factor


def build(settings: FashionSettings) -> Task:
    """The model, AdamW and a cosine schedule, on the bundled or the given images."""
    device = check_device(settings.device)
    flame.manual_seed(settings.seed)
    loaders = image_loaders(settings, crop_padding=settings.crop_padding)
    # The first weights are drawn on the CPU, so that they are the same whatever the device.
    network = model(len(loaders.classes), dropout=settings.dropout).to(device)
    optimizer = AdamW(network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay)
    steps = settings.epochs * len(loaders.train)
    scheduler = LambdaLR(optimizer, warm_cosine(steps, warm_up=settings.warm_up))

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(logits, labels, label_smoothing=settings.label_smoothing)

    return Task(
        model=network,
        loss=loss,
        optimizer=optimizer,
        scheduler=scheduler,
        train_batches=loaders.train,
        test_batches=loaders.test,
        classes=loaders.classes,
        pictures=to_pictures,
        device=device,
        precision=settings.precision,
    )


RECIPE = Recipe(
    name="fashion-cnn",
    summary="a convolutional network on Fashion-MNIST",
    defaults=FashionSettings(),
    build=build,
)
