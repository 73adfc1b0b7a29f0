"""Models for parity tests, each written once over a library: `lib` is `flame` or `torch`.

Every builder gives a fresh model; `batch` gives its inputs and targets as NumPy arrays, and `loss`
the training loss. So both libraries run the very same lines, and whatever a line uses must exist in
both.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Entry:
    """One model of the zoo."""

    build: Callable[[Any], Any]  # library -> model
    batch: Callable[[np.random.Generator], Arrays]  # inputs, then the target
    loss: Callable[[Any, Any, Any], Any]  # library, output, target -> scalar
    sgd_rate: float = 0.01
    adamw_rate: float = 1e-3


def _cross_entropy(lib: Any, logits: Any, labels: Any) -> Any:
    return lib.nn.functional.cross_entropy(logits, labels)


def _token_cross_entropy(lib: Any, logits: Any, tokens: Any) -> Any:
    return lib.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def _squared_error(lib: Any, output: Any, target: Any) -> Any:
    return lib.nn.functional.mse_loss(output, target)


def _images(count: int, channels: int, size: int, classes: int) -> Callable[..., Arrays]:
    def batch(random: np.random.Generator) -> Arrays:
        images = random.standard_normal((count, channels, size, size), dtype=np.float32)
        return images, random.integers(0, classes, count)

    return batch


def mlp(lib: Any) -> Any:
    """(N, 20) -> (N, 5), with layer norm and dropout of nothing."""
    nn = lib.nn
    return nn.Sequential(
        nn.Linear(20, 32),
        nn.LayerNorm(32),
        nn.Tanh(),
        nn.Dropout(0.0),
        nn.Linear(32, 32),
        nn.GELU(),
        nn.Linear(32, 5),
    )


def _mlp_batch(random: np.random.Generator) -> Arrays:
    return random.standard_normal((16, 20), dtype=np.float32), random.integers(0, 5, 16)


def lenet(lib: Any) -> Any:
    """LeNet-5: (N, 1, 28, 28) -> (N, 10). LeCun et al., 1998."""
    nn = lib.nn
    return nn.Sequential(
        nn.Conv2d(1, 6, 5, padding=2),
        nn.Sigmoid(),
        nn.AvgPool2d(2),
        nn.Conv2d(6, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(400, 120),
        nn.Tanh(),
        nn.Linear(120, 84),
        nn.LeakyReLU(0.1),
        nn.Linear(84, 10),
    )


def resnet18(lib: Any) -> Any:
    """ResNet-18 for small images: (N, 3, 32, 32) -> (N, 10). He et al., 2016."""
    nn = lib.nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
            self.bn1 = nn.BatchNorm2d(outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
            self.bn2 = nn.BatchNorm2d(outputs)
            self.relu = nn.ReLU()
            self.downsample = nn.Identity()
            if stride != 1 or inputs != outputs:
                self.downsample = nn.Sequential(
                    nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False),
                    nn.BatchNorm2d(outputs),
                )

        def forward(self, x: Any) -> Any:
            y = self.relu(self.bn1(self.conv1(x)))
            return self.relu(self.bn2(self.conv2(y)) + self.downsample(x))

    layers = [nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    width = 64
    for stage, outputs in enumerate((64, 128, 256, 512)):
        layers += [Block(width, outputs, 1 if stage == 0 else 2), Block(outputs, outputs, 1)]
        width = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def gpt(lib: Any) -> Any:
    """A small GPT with tied embeddings: tokens (N, T) -> logits (N, T, 61). Radford et al.,
    2019.
    """
    nn, functional = lib.nn, lib.nn.functional
    vocabulary, size, heads, context = 61, 32, 4, 16

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.qkv = nn.Linear(size, 3 * size)
            self.out = nn.Linear(size, size)

        def forward(self, x: Any) -> Any:
            count, length, _ = x.shape
            qkv = self.qkv(x).reshape(count, length, 3, heads, size // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each (N, heads, T, size / heads)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.out(y.transpose(1, 2).reshape(count, length, size))

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1 = nn.LayerNorm(size)
            self.attention = Attention()
            self.norm2 = nn.LayerNorm(size)
            self.mlp = nn.Sequential(
                nn.Linear(size, 4 * size), nn.GELU(approximate="tanh"), nn.Linear(4 * size, size)
            )

        def forward(self, x: Any) -> Any:
            x = x + self.attention(self.norm1(x))
            return x + self.mlp(self.norm2(x))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens = nn.Embedding(vocabulary, size)
            self.positions = nn.Embedding(context, size)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.norm = nn.LayerNorm(size)
            self.head = nn.Linear(size, vocabulary, bias=False)
            self.head.weight = self.tokens.weight

        def forward(self, tokens: Any) -> Any:
            places = lib.arange(tokens.shape[1], device=tokens.device)
            x = self.tokens(tokens) * 0.1 + self.positions(places)
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)) * 0.1

    return GPT()


def _gpt_batch(random: np.random.Generator) -> Arrays:
    text = random.integers(0, 61, (4, 17))
    return text[:, :-1], text[:, 1:]


def unet(lib: Any) -> Any:
    """A small DDPM UNet: images (N, 3, 16, 16), times (N,) -> noise (N, 3, 16, 16). Ho et al.,
    2020.
    """
    nn, functional = lib.nn, lib.nn.functional
    embedding = 32

    class ResidualBlock(nn.Module):
        def __init__(self, inputs: int, outputs: int) -> None:
            super().__init__()
            self.norm1 = nn.GroupNorm(8, inputs)
            self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
            self.time = nn.Linear(embedding, outputs)
            self.norm2 = nn.GroupNorm(8, outputs)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
            self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

        def forward(self, x: Any, time: Any) -> Any:
            y = self.conv1(functional.silu(self.norm1(x)))
            y = y + self.time(functional.silu(time))[:, :, None, None]
            return self.skip(x) + self.conv2(functional.silu(self.norm2(y)))

    class Attention(nn.Module):
        def __init__(self, channels: int) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(8, channels)
            self.qkv = nn.Conv2d(channels, 3 * channels, 1)
            self.out = nn.Conv2d(channels, channels, 1)

        def forward(self, x: Any) -> Any:
            count, channels, height, width = x.shape
            qkv = self.qkv(self.norm(x)).reshape(count, 3 * channels, height * width)
            q, k, v = qkv.chunk(3, dim=1)  # each (N, C, H·W)
            scores = q.transpose(1, 2) @ k / math.sqrt(channels)
            y = v @ scores.softmax(dim=-1).transpose(1, 2)
            return x + self.out(y.reshape(count, channels, height, width))

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.time = nn.Sequential(
                nn.Linear(embedding, embedding), nn.SiLU(), nn.Linear(embedding, embedding)
            )
            self.first = nn.Conv2d(3, 16, 3, padding=1)
            self.down1 = ResidualBlock(16, 16)
            self.shrink = nn.Conv2d(16, 16, 3, stride=2, padding=1)
            self.down2 = ResidualBlock(16, 32)
            self.middle = nn.ModuleList(
                [ResidualBlock(32, 32), Attention(32), ResidualBlock(32, 32)]
            )
            self.up2 = ResidualBlock(64, 32)
            self.grow = nn.Sequential(
                nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(32, 16, 3, padding=1)
            )
            self.up1 = ResidualBlock(32, 16)
            self.norm = nn.GroupNorm(8, 16)
            self.last = nn.Conv2d(16, 3, 3, padding=1)

        def forward(self, x: Any, times: Any) -> Any:
            half = embedding // 2
            steps = lib.arange(half, dtype=self.first.weight.dtype, device=times.device)
            rates = lib.exp(steps * (-math.log(10000.0) / half))
            angles = times[:, None] * rates[None, :]
            time = self.time(lib.cat([angles.sin(), angles.cos()], dim=-1))
            one = self.down1(self.first(x), time)
            two = self.down2(self.shrink(one), time)
            y = self.middle[2](self.middle[1](self.middle[0](two, time)), time)
            y = self.up2(lib.cat([y, two], dim=1), time)
            y = self.up1(lib.cat([self.grow(y), one], dim=1), time)
            return self.last(functional.silu(self.norm(y)))

    return UNet()


def _unet_batch(random: np.random.Generator) -> Arrays:
    images = random.standard_normal((4, 3, 16, 16), dtype=np.float32)
    times = random.integers(0, 1000, 4).astype(np.float32)
    return images, times, random.standard_normal((4, 3, 16, 16), dtype=np.float32)


def lstm(lib: Any) -> Any:
    """Tokens (N, T) -> classes (N, 4) through a two-layer LSTM. Hochreiter and Schmidhuber,
    1997.
    """
    nn = lib.nn

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(30, 16)
            self.lstm = nn.LSTM(16, 24, num_layers=2, batch_first=True)
            self.head = nn.Linear(24, 4)

        def forward(self, tokens: Any) -> Any:
            output, (hidden, _) = self.lstm(self.embedding(tokens))
            return self.head(output.mean(dim=1) + hidden[-1])

    return Classifier()


def _lstm_batch(random: np.random.Generator) -> Arrays:
    return random.integers(0, 30, (8, 12)), random.integers(0, 4, 8)


ZOO = {
    "mlp": Entry(mlp, _mlp_batch, _cross_entropy),
    "lenet": Entry(lenet, _images(8, 1, 28, 10), _cross_entropy),
    # Small rates, as five larger steps learn these four images by heart and magnify rounding: where
    # a ReLU's input is zero but for rounding, its slope is 0 in one library and 1 in the other (one
    # or so of 2.5 million inputs each step), and Adam's first steps go by the signs of gradients.
    # At AdamW's 1e-3, PyTorch's own float32 and float64 losses differ by 1e-3.
    "resnet18": Entry(resnet18, _images(4, 3, 32, 10), _cross_entropy, 1e-4, 1e-5),
    "gpt": Entry(gpt, _gpt_batch, _token_cross_entropy),
    "unet": Entry(unet, _unet_batch, _squared_error),
    "lstm": Entry(lstm, _lstm_batch, _cross_entropy),
}
