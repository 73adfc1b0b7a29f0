"""The UNet of the GPU benchmarks, written once over a library: ``flame`` or ``torch``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gpu_parts import join_heads, sinusoids, split_heads


@dataclass(frozen=True)
class Form:
    """The sizes of a UNet. Where a level is ``attended``, each of its residual blocks is followed
    by a transformer block."""

    widths: tuple[int, ...]  # channels of the levels, each at half the side of the one before
    attended: tuple[bool, ...]
    depth: int  # residual blocks a level on the way down; one more on the way up
    head: int  # width of a head
    groups: int  # of the group norms
    context: int  # width of a word of the context


def residual(lib: Any, form: Form, inside: int, outside: int) -> Any:
    """Two convolutions with the timestep's embedding added between them."""
    nn, functional = lib.nn, lib.nn.functional

    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1 = nn.GroupNorm(form.groups, inside)
            self.norm2 = nn.GroupNorm(form.groups, outside)
            self.conv1 = nn.Conv2d(inside, outside, 3, padding=1)
            self.conv2 = nn.Conv2d(outside, outside, 3, padding=1)
            self.time = nn.Linear(4 * form.widths[0], outside)
            self.skip = nn.Conv2d(inside, outside, 1) if inside != outside else nn.Identity()

        def forward(self, x: Any, time: Any) -> Any:  # (N, inside, H, W), (N, D)
            h = self.conv1(functional.silu(self.norm1(x)))
            h = h + self.time(time)[:, :, None, None]
            return self.conv2(functional.silu(self.norm2(h))) + self.skip(x)

    return Residual()


def attention(lib: Any, width: int, source: int, heads: int) -> Any:
    """Attention of (N, T, width) to (N, S, source)."""
    nn, functional = lib.nn, lib.nn.functional

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Linear(width, width, bias=False)
            self.k = nn.Linear(source, width, bias=False)
            self.v = nn.Linear(source, width, bias=False)
            self.out = nn.Linear(width, width)

        def forward(self, x: Any, y: Any) -> Any:
            (q,) = split_heads(self.q(x), 1, heads)
            (k,) = split_heads(self.k(y), 1, heads)
            (v,) = split_heads(self.v(y), 1, heads)
            return self.out(join_heads(functional.scaled_dot_product_attention(q, k, v)))

    return Attention()


def transformer(lib: Any, form: Form, width: int) -> Any:
    """Over the pixels: attention to one another, to the context, and a gated MLP (GEGLU)."""
    nn, functional = lib.nn, lib.nn.functional

    class Transformer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.GroupNorm(form.groups, width, eps=1e-6)
            self.enter, self.leave = nn.Linear(width, width), nn.Linear(width, width)
            self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.norm3 = nn.LayerNorm(width)
            self.inner = attention(lib, width, width, width // form.head)
            self.cross = attention(lib, width, form.context, width // form.head)
            self.up, self.down = nn.Linear(width, 8 * width), nn.Linear(4 * width, width)

        def forward(self, x: Any, context: Any) -> Any:  # (N, C, H, W), (N, S, D)
            h = self.enter(self.norm(x).flatten(2).transpose(1, 2))  # (N, H * W, C)
            y = self.norm1(h)
            h = h + self.inner(y, y)
            h = h + self.cross(self.norm2(h), context)
            hidden, gate = self.up(self.norm3(h)).chunk(2, -1)
            h = self.leave(h + self.down(hidden * functional.gelu(gate)))
            return x + h.transpose(1, 2).reshape(x.shape)

    return Transformer()


def level(lib: Any, form: Form, channels: list[tuple[int, int]], attended: bool) -> Any:
    """Residual blocks of these channels, each with its transformer."""
    nn = lib.nn

    class Level(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.residuals = nn.ModuleList([residual(lib, form, *pair) for pair in channels])
            self.transformers = nn.ModuleList(
                [transformer(lib, form, width) for _, width in channels if attended]
            )

        def block(self, index: int, x: Any, time: Any, context: Any) -> Any:
            x = self.residuals[index](x, time)
            return self.transformers[index](x, context) if attended else x

    return Level()


def unet(lib: Any, form: Form) -> Any:
    """The UNet of Stable Diffusion (Rombach et al., 2022) in this form, on latents of 4 channels:
    (N, 4, S, S), (N,), (N, words, context) -> (N, 4, S, S)."""
    nn, functional = lib.nn, lib.nn.functional
    widths, attended, depth = form.widths, form.attended, form.depth

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            first, last = widths[0], widths[-1]
            self.embed1, self.embed2 = nn.Linear(first, 4 * first), nn.Linear(4 * first, 4 * first)
            self.stem = nn.Conv2d(4, first, 3, padding=1)
            self.down, self.shrink = nn.ModuleList(), nn.ModuleList()
            self.up, self.grow = nn.ModuleList(), nn.ModuleList()
            skips, inside = [first], first
            for width, attends in zip(widths, attended, strict=True):
                channels = [(inside, width)] + [(width, width)] * (depth - 1)
                self.down.append(level(lib, form, channels, attends))
                skips += [width] * (depth + 1)
                inside = width
            skips.pop()  # the last level is not shrunk
            self.shrink.extend([nn.Conv2d(width, width, 3, 2, 1) for width in widths[:-1]])
            self.middle1 = level(lib, form, [(last, last)], attended[-1])
            self.middle2 = level(lib, form, [(last, last)], False)
            for width, attends in zip(reversed(widths), reversed(attended), strict=True):
                before = [inside] + [width] * depth
                channels = [(b + skips.pop(), width) for b in before]
                self.up.append(level(lib, form, channels, attends))
                inside = width
            self.grow.extend([nn.Conv2d(width, width, 3, padding=1) for width in widths[:0:-1]])
            self.norm = nn.GroupNorm(form.groups, first)
            self.out = nn.Conv2d(first, 4, 3, padding=1)

        def forward(self, x: Any, time: Any, context: Any) -> Any:
            t = self.embed1(sinusoids(lib, time, widths[0]))
            t = functional.silu(self.embed2(functional.silu(t)))
            h = self.stem(x)
            skips = [h]
            for index, down in enumerate(self.down):
                for block in range(depth):
                    h = down.block(block, h, t, context)
                    skips.append(h)
                if index < len(self.shrink):
                    h = self.shrink[index](h)
                    skips.append(h)
            h = self.middle2.block(0, self.middle1.block(0, h, t, context), t, context)
            for index, up in enumerate(self.up):
                for block in range(depth + 1):
                    h = up.block(block, lib.cat([h, skips.pop()], 1), t, context)
                if index < len(self.grow):
                    h = functional.interpolate(h, scale_factor=2, mode="nearest")
                    h = self.grow[index](h)
            return self.out(functional.silu(self.norm(h)))

    return UNet()
