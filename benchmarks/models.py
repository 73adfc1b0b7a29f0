"""The benchmark models, each written once over a library: ``lib`` is ``flame`` or ``torch``.

Sizes are those that the README's tables name.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Arrays = tuple[np.ndarray, ...]


@dataclass(frozen=True)
class Benchmark:
    """A model, its data, and its loss."""

    build: Callable[[Any], Any]  # library -> model
    batch: Callable[[np.random.Generator], Arrays]  # inputs, then the target
    loss: Callable[[Any, Any, Any], Any]  # library, output, target -> scalar
    steps: int  # timed in one turn


def tiny(lib: Any) -> Any:
    """MLP 16-32-32-1 with tanh."""
    nn = lib.nn
    return nn.Sequential(
        nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )


def mlp(lib: Any) -> Any:
    """MLP 784-512-512-10 with relu."""
    nn = lib.nn
    return nn.Sequential(
        nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def gpt(lib: Any, layers: int = 6, width: int = 256, heads: int = 8, vocabulary: int = 256) -> Any:
    """A decoder-only transformer over 256 tokens."""
    nn = lib.nn
    functional = nn.functional

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

        def forward(self, x: Any) -> Any:  # (B, T, C)
            b, t, c = x.shape
            qkv = self.qkv(self.norm1(x)).reshape(b, t, 3, heads, c // heads)
            q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
            y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).reshape(b, t, c))
            hidden = functional.gelu(self.up(self.norm2(x)), approximate="tanh")
            return x + self.down(hidden)

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.places = nn.Embedding(vocabulary, width), nn.Embedding(256, width)
            self.blocks = nn.Sequential(*[Block() for _ in range(layers)])
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

        def forward(self, tokens: Any) -> Any:  # (B, T)
            x = self.tokens(tokens) + self.places(lib.arange(tokens.shape[1]))
            return self.head(self.norm(self.blocks(x)))

    return GPT()


def resnet(lib: Any) -> Any:
    """ResNet-18 in its CIFAR form: a 3x3 stem, stages of 64, 128, 256 and 512 channels."""
    nn = lib.nn

    class Block(nn.Module):
        def __init__(self, inside: int, outside: int, stride: int) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
            self.bn1 = nn.BatchNorm2d(outside)
            self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
            self.bn2 = nn.BatchNorm2d(outside)
            self.relu = nn.ReLU()
            self.short = nn.Identity()
            if stride != 1 or inside != outside:
                self.short = nn.Sequential(
                    nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside)
                )

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
            return self.relu(y + self.short(x))

    stages, inside = [], 64
    for outside, stride in ((64, 1), (128, 2), (256, 2), (512, 2)):
        stages += [Block(inside, outside, stride), Block(outside, outside, 1)]
        inside = outside
    return nn.Sequential(
        nn.Conv2d(3, 64, 3, 1, 1, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        *stages,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, 10),
    )


def unet(lib: Any) -> Any:
    """A DDPM UNet: widths 64, 128, 128, GroupNorm 8, attention at 16x16 and 8x8."""
    nn, functional = lib.nn, lib.nn.functional

    class Residual(nn.Module):
        def __init__(self, inside: int, outside: int) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.GroupNorm(8, inside), nn.GroupNorm(8, outside)
            self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
            self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
            self.time = nn.Linear(256, outside)
            self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

        def forward(self, x: Any, time: Any) -> Any:
            h = self.conv1(functional.silu(self.norm1(x)))
            h = h + self.time(functional.silu(time))[:, :, None, None]
            return self.conv2(functional.silu(self.norm2(h))) + self.skip(x)

    class Attention(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(8, width)
            self.qkv, self.out = nn.Conv2d(width, 3 * width, 1), nn.Conv2d(width, width, 1)

        def forward(self, x: Any) -> Any:
            n, c, h, w = x.shape
            qkv = self.qkv(self.norm(x)).reshape(n, 3, 1, c, h * w).transpose(3, 4)
            q, k, v = qkv.unbind(1)
            y = functional.scaled_dot_product_attention(q, k, v)
            return x + self.out(y.transpose(2, 3).reshape(n, c, h, w))

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed1, self.embed2 = nn.Linear(64, 256), nn.Linear(256, 256)
            self.stem = nn.Conv2d(3, 64, 3, padding=1)
            self.down1, self.half1 = Residual(64, 64), nn.Conv2d(64, 64, 3, 2, 1)
            self.down2, self.attend2 = Residual(64, 128), Attention(128)
            self.half2 = nn.Conv2d(128, 128, 3, 2, 1)
            self.down3, self.attend3 = Residual(128, 128), Attention(128)
            self.middle = Residual(128, 128)
            self.up3, self.attend_up3 = Residual(256, 128), Attention(128)
            self.up2, self.attend_up2 = Residual(256, 128), Attention(128)
            self.up1 = Residual(192, 64)
            self.norm, self.out = nn.GroupNorm(8, 64), nn.Conv2d(64, 3, 3, padding=1)

        def forward(self, x: Any, time: Any) -> Any:
            rates = lib.exp(lib.arange(32) * (-math.log(10000.0) / 32))
            angles = time[:, None] * rates
            t = lib.cat([lib.sin(angles), lib.cos(angles)], 1)
            t = self.embed2(functional.silu(self.embed1(t)))
            a = self.down1(self.stem(x), t)  # (N, 64, 32, 32)
            b = self.attend2(self.down2(self.half1(a), t))  # (N, 128, 16, 16)
            c = self.attend3(self.down3(self.half2(b), t))  # (N, 128, 8, 8)
            h = self.middle(c, t)
            h = self.attend_up3(self.up3(lib.cat([h, c], 1), t))
            h = functional.interpolate(h, scale_factor=2, mode="nearest")
            h = self.attend_up2(self.up2(lib.cat([h, b], 1), t))
            h = functional.interpolate(h, scale_factor=2, mode="nearest")
            h = self.up1(lib.cat([h, a], 1), t)
            return self.out(functional.silu(self.norm(h)))

    return UNet()


def _normal(random: np.random.Generator, *shape: int) -> np.ndarray:
    return random.standard_normal(shape, dtype=np.float32)


def _mse(lib: Any, output: Any, target: Any) -> Any:
    return lib.nn.functional.mse_loss(output, target)


def _cross_entropy(lib: Any, output: Any, target: Any) -> Any:
    return lib.nn.functional.cross_entropy(output.reshape(-1, output.shape[-1]), target.reshape(-1))


BENCHMARKS = {
    "tiny": Benchmark(tiny, lambda r: (_normal(r, 32, 16), _normal(r, 32, 1)), _mse, 200),
    "mlp": Benchmark(
        mlp, lambda r: (_normal(r, 128, 784), r.integers(0, 10, 128)), _cross_entropy, 20
    ),
    "gpt": Benchmark(
        gpt,
        lambda r: (r.integers(0, 256, (8, 256)), r.integers(0, 256, (8, 256))),
        _cross_entropy,
        1,
    ),
    "resnet": Benchmark(
        resnet, lambda r: (_normal(r, 32, 3, 32, 32), r.integers(0, 10, 32)), _cross_entropy, 1
    ),
    "unet": Benchmark(
        unet,
        lambda r: (
            _normal(r, 8, 3, 32, 32),
            r.random(8, np.float32) * 1000,
            _normal(r, 8, 3, 32, 32),
        ),
        _mse,
        1,
    ),
}
