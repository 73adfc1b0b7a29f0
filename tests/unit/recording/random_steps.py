"""Random steps: programs over the op table, views, writes in place, state, and gradients.

A step is made of instructions, each a number from which its choices follow. The choices look at
shapes and dtypes alone, so that a recorded run takes the same ones as an eager run.
"""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Sequence
from typing import Any

import numpy as np

import flame
import flame.ops
from flame.ops.op import OPS, Arg, Op, Sample
from flame.testing.sampling import FIXED, LAYOUTS, lay_out

for module in pkgutil.walk_packages(flame.ops.__path__, "flame.ops."):
    importlib.import_module(module.name)

# What jumps: on computed tensors, rounding would decide. These get leaves.
SHARP = frozenset({
    "eq", "ne", "lt", "le", "gt", "ge", "any", "all", "argmax", "argmin", "sign", "floor", "ceil",
    "trunc", "round", "frac", "signbit", "isclose", "logical_and", "logical_or", "logical_xor",
    "logical_not", "floor_divide", "trunc_divide", "remainder", "fmod", "argsort", "topk",
    "median_place", "mode_place", "searchsorted", "bernoulli", "max_with_index", "min_with_index",
    "running_extreme", "count_norm", "hardshrink", "threshold", "isin", "max_pool", "copysign",
})  # fmt: skip
# view_bits shows rounding as such; these backward passes divide by what their samples keep away
# from zero together with other operands, which random operands do not.
LEFT_OUT = frozenset({
    "view_bits", "attention_backward", "attention_packed_backward", "cross_entropy_backward",
    "nll_loss_backward",
})  # fmt: skip
TABLE = [op for op in OPS.values() if op.name not in LEFT_OUT and op.samples]
SHAPES = ((), (1,), (3,), (5,), (2, 3), (3, 1), (1, 3), (0, 3), (4, 5), (2, 3, 4), (3, 2, 1), (17,))
MAXIMUM = 400  # elements of a tensor in the pool


class Step:
    """A random step. ``numbers``: one for each instruction."""

    def __init__(self, start: int, numbers: Sequence[int]) -> None:
        self.numbers = list(numbers)
        self.start = start
        random = np.random.default_rng(start)
        half = random.random() < 0.15
        floats = [flame.float32] * 6 + [flame.float64] * 2 + [flame.bfloat16] * (4 * half)
        self.half = half
        self.kinds: list[tuple[Any, tuple[int, ...], str]] = []
        for _ in range(int(random.integers(2, 5))):
            dtype = floats[int(random.integers(len(floats)))]
            self.kinds.append((dtype, self._shape(random), LAYOUTS[int(random.integers(5))]))
        self.kinds.append((flame.int64, self._shape(random), "contiguous"))
        if random.random() < 0.3:
            self.kinds.append((flame.bool, self._shape(random), "contiguous"))
        self.parameters = [self._shape(random) for _ in range(int(random.integers(1, 3)))]
        self.way = ("grad", "backward", "outside", "argument")[int(random.integers(4))]
        self.line: list[str] = []

    @staticmethod
    def _shape(random: Any) -> tuple[int, ...]:
        return SHAPES[int(random.integers(len(SHAPES)))]

    def arguments(self, turn: int) -> list[Any]:
        """New data of the same signature."""
        random = np.random.default_rng([self.start, 1, turn])
        made = []
        for dtype, shape, layout in self.kinds:
            values = random.uniform(-2, 2, shape)
            if dtype is flame.bool:
                array = np.asarray(values > 0)
            elif dtype is flame.int64:
                array = np.asarray(random.integers(0, 50, shape))
            else:
                array = np.asarray(values, dtype.numpy)
            if layout == "expanded":
                array = np.array(np.broadcast_to(array[:1], shape)) if shape else array
            tensor = lay_out(array, layout)
            if self.way == "argument" and dtype.kind == "f" and layout != "expanded":
                tensor.requires_grad_()
            made.append(tensor)
        return made

    def world(self) -> World:
        """Tensors that the step reaches from outside."""
        return World(self)


class World:
    """The state of one run of a step: parameters, buffers, a buffer that is a part of another."""

    def __init__(self, step: Step) -> None:
        self.step = step
        random = np.random.default_rng([step.start, 2])
        self.parameters = [
            flame.from_numpy(np.asarray(random.uniform(-1, 1, s), np.float32)).requires_grad_()
            for s in step.parameters
        ]
        big = flame.from_numpy(random.uniform(-1, 1, (4, 6)).astype(np.float32))
        # the part comes first, so that its memory may be met through it
        self.buffers = [big[1:3, ::2], big, flame.zeros(3), big.t()]

    def tensors(self) -> list[Any]:
        return [*self.parameters, *self.buffers]

    def run(self, *arguments: Any) -> Any:
        """The step itself: every tensor that it made, and gradients."""
        run = _Run(self, arguments)
        for number in self.step.numbers:
            run.instruction(np.random.default_rng(number))
        return run.finish()


class _Run:
    """One run of the instructions, over a pool of tensors."""

    def __init__(self, world: World, arguments: Sequence[Any]) -> None:
        self.world = world
        self.way = world.step.way
        self.leaves = [*arguments, *world.parameters]
        self.pool: list[Any] = list(self.leaves)
        self.made: list[Any] = []

    def instruction(self, random: Any) -> None:
        kinds = (
            (self.table, 40), (self.simple, 14), (self.view, 16), (self.reduction, 8),
            (self.write, 12), (self.state, 6), (self.write_argument, 2), (self.born, 2),
        )  # fmt: skip
        weights = np.array([w for _, w in kinds], float)
        chosen = kinds[int(random.choice(len(kinds), p=weights / weights.sum()))][0]
        made = chosen(random)
        for tensor in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(tensor, flame.Tensor) and tensor.numel() <= MAXIMUM:
                self.pool.append(tensor)
                self.made.append(tensor)

    # --- operands ---------------------------------------------------------------------------------

    def pick(self, random: Any, *, floating: bool = True, leaf: bool = False) -> Any:
        pool = self.leaves if leaf else self.pool
        choices = [t for t in pool if t.is_floating_point() or not floating]
        if random.random() < 0.6:
            choices = choices[-4:]
        return choices[int(random.integers(len(choices)))]

    def fit(self, x: Any, shape: tuple[int, ...]) -> Any:
        """Elements of ``x`` as a tensor of another shape."""
        count = math.prod(shape)
        if x.shape == shape:
            return x
        if not x.numel():
            return flame.zeros(shape, dtype=x.dtype)
        flat = x.reshape(-1)
        if x.numel() < count:
            flat = flame.cat([flat] * -(-count // x.numel()))
        return flat[:count].reshape(shape)

    def operand(self, random: Any, op: Op, arg: Arg, dtype: Any) -> Any:
        """A tensor of the pool, brought into the shape and the range of an Arg."""
        if arg.values:
            return flame.tensor(arg.values, dtype=FIXED[arg.kind]).reshape(arg.shape)
        if arg.kind == "bool":
            return self.fit(self.pick(random, leaf=True), arg.shape) > 0
        if arg.kind in ("index", "int"):
            ints = next(t for t in self.leaves if t.dtype is flame.int64)
            span = max(int(arg.high) - int(arg.low), 1)
            return self.fit(ints, arg.shape).remainder(span) + int(arg.low)
        x = self.pick(random, leaf=op.name in SHARP).to(FIXED.get(arg.kind, dtype))
        x = self.fit(x, arg.shape).sigmoid() * (arg.high - arg.low) + arg.low
        return x.contiguous() if arg.contiguous else x

    # --- instructions -----------------------------------------------------------------------------

    def table(self, random: Any) -> Any:
        """An op of the table."""
        op = TABLE[int(random.integers(len(TABLE)))]
        sample: Sample = op.samples[int(random.integers(len(op.samples)))]
        dtype = self.pick(random).dtype
        if op.name in SHARP and dtype is flame.bfloat16:
            dtype = flame.float32
        if any(isinstance(x, Arg) and x.kind == "double" for x in sample.inputs):
            dtype = flame.float64
        inputs = [
            self.operand(random, op, x, dtype) if isinstance(x, Arg) else x for x in sample.inputs
        ]
        made = op(*inputs, **sample.attributes)
        return made[: len(made) - op.extras] if isinstance(made, tuple) else made

    def simple(self, random: Any) -> Any:
        """Arithmetic with broadcasting, and of mixed dtypes."""
        x, y = self.pick(random), self.pick(random, floating=False)
        try:
            np.broadcast_shapes(x.shape, y.shape)
        except ValueError:
            y = self.fit(y, x.shape)
        if y.dtype is flame.bool:
            return flame.where(y, x.tanh(), 0.5)
        which = int(random.integers(6))
        if which == 0:
            return x.tanh() + y * 0.5
        if which == 1:
            return x.sigmoid() * y.to(x.dtype).sigmoid()
        if which == 2:
            return (x - y) / 3
        if which == 3:
            return flame.maximum(x, y.to(x.dtype)) * 0.5
        if which == 4:
            return x.detach().cos() * y.sin()
        with flame.no_grad():
            return x.exp().clamp(max=5.0) - 1

    def view(self, random: Any) -> Any:
        x = self.pick(random, floating=False)
        which = int(random.integers(7))
        if which == 0 and x.ndim:
            return x.permute(tuple(int(i) for i in random.permutation(x.ndim)))
        if which == 1 and x.ndim and x.shape[0] > 1:
            return x[1:]
        if which == 2 and x.ndim and x.shape[-1] > 1:
            return x[..., ::2]
        if which == 3 and x.ndim and x.shape[0]:
            return x[int(random.integers(x.shape[0]))]
        if which == 4:
            return x.unsqueeze(0).expand(3, *x.shape)
        if which == 5:
            return x.reshape(-1)
        return x.unsqueeze(-1)

    def reduction(self, random: Any) -> Any:
        x = self.pick(random)
        if not x.ndim or not x.numel():
            return x.sum()
        dim = int(random.integers(x.ndim))
        which = int(random.integers(6))
        if which == 0:
            return x.sum(dim)
        if which == 1:
            return x.mean(dim, keepdim=True)
        if which == 2:
            return x.softmax(dim)
        if which == 3:
            return x.logsumexp(dim)
        if which == 4:
            return x.cumsum(dim)
        return x.amax() * 0.5

    def write(self, random: Any) -> Any:
        """Into a copy, the whole or a part of it, with views of it in the pool too."""
        x = self.pick(random)
        made = x.clone() if random.random() < 0.8 else x.contiguous() * 1
        target = made
        which = int(random.integers(5))
        if which == 1 and made.ndim:
            target = made[1:]
        elif which == 2 and made.ndim:
            target = made.transpose(0, -1)
        elif which == 3 and made.ndim:
            target = made[..., ::2]
        value = self.fit(self.pick(random), target.shape).to(target.dtype)
        how = int(random.integers(5))
        if how == 0:
            target.mul_(value.sigmoid())
        elif how == 1:
            target.add_(value, alpha=0.5)
        elif how == 2:
            target.copy_(value.tanh())
        elif how == 3 and target.ndim:
            target[:1] = 0.25
        else:
            target.tanh_()
        return made, target

    def state(self, random: Any) -> Any:
        """Reads and writes of a buffer."""
        buffer = self.world.buffers[int(random.integers(len(self.world.buffers)))]
        before = buffer * 0.5
        with flame.no_grad():
            value = self.fit(self.pick(random).detach().float(), buffer.shape).tanh()
            which = int(random.integers(4))
            if which == 0:
                buffer.lerp_(value, 0.25)
            elif which == 1:
                buffer.copy_(value)
            elif which == 2:
                buffer[:1] += value[:1]
            else:
                buffer.mul_(0.5).add_(value)
        return before, buffer.clone() + 1

    def write_argument(self, random: Any) -> Any:
        """Into an argument, or a part of one."""
        places = [
            t
            for t in self.leaves[: len(self.world.step.kinds)]
            if t.is_floating_point() and 0 not in t.stride() and not t.requires_grad
        ]
        if not places:
            return None
        target = places[int(random.integers(len(places)))]
        before = target.exp()
        part = target[:1] if target.ndim and random.random() < 0.5 else target
        part.mul_(0.5)
        return before

    def born(self, random: Any) -> Any:
        """Numbers that come from Python."""
        values = random.uniform(-1, 1, (2, 3))
        x = self.fit(self.pick(random), (2, 3))
        which = int(random.integers(3))
        if which == 0:
            return x * flame.tensor(values.tolist())
        if which == 1:
            made = flame.from_numpy(values.astype(np.float32))
            made[:1] = 2.0
            return x + made
        return x + flame.arange(6).reshape(2, 3) * flame.full((3,), 0.5)

    # --- results ----------------------------------------------------------------------------------

    def finish(self) -> Any:
        """(values, loss, gradients) of the run."""
        loss = flame.zeros(())
        for i, tensor in enumerate(self.made):
            if tensor.is_floating_point():
                loss = loss + (tensor.float().tanh() * (0.3 + 0.1 * (i % 7))).sum()
        for parameter in self.world.parameters:
            loss = loss + parameter.square().sum() * 0.1
        leaves = [t for t in self.leaves if t.requires_grad]
        gradients: Sequence[Any] = ()
        values = [t.detach() for t in self.made]
        if self.way == "grad":
            gradients = flame.autograd.grad(loss, leaves, allow_unused=True)
            loss = loss.detach()
        elif self.way == "backward":
            for leaf in leaves:
                leaf.grad = None
            loss.backward()
            loss = loss.detach()
        return values, loss, list(gradients)
