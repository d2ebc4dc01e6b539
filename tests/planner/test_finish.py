"""Which activation_grad and channel_sum steps become part of the step that makes their dY, and which must not."""

from __future__ import annotations

import pytest

from edge_razor.planner.finish import fuse_finish
from edge_razor.planner.program import Buffer, Step
from edge_razor.planner.search import Search
from edge_razor.runtime import kernel_scratch

from .conftest import graph_of, settings
from .networks import Network

# One image of 4 × 4 pixels, 1×1 kernel: dX [16 rows, 6 columns] from dY [16, 3].
SHAPE = [1, 4, 4, 6, 4, 4, 3, 1, 1, 1, 1, 0, 0, 1, 1, 1]
DX_BYTES = 16 * 6 * 4
RELU_BITS = [1, 1]
THREADS = 2


class Backward:
    """The steps of a layer's backward, by hand: dX = conv_grad_input, dZ = activation_grad(dX), channel_sum(dZ)."""

    def __init__(self, keep: int = 1) -> None:
        self.dx, self.dz = Buffer("dX", DX_BYTES), Buffer("dZ", DX_BYTES)
        self.kept, self.sums = Buffer("kept", 16), Buffer("sums", 24)
        act = [1, 1] if keep == 1 else [8, keep]
        self.forward = Step("conv", "a:Conv", [*SHAPE, *act], [0, 0], [*self.some(2), None, None, *self.some(1)])
        self.forward.operands += [self.kept, None]
        self.grad_input = self.input_gradient("b", self.dx)
        self.act = Step(
            "activation_grad", "a:Act", [16, 6, *act, 0], [0.5, 0], [self.dx, self.kept, self.dz, None, None]
        )
        self.sum = Step("channel_sum", "a:Sum", [16, 6], [], [self.dz, self.sums, None])
        self.weight = Step("conv_grad_weight", "a:Weight", [*SHAPE, 0, 0], [], [*self.some(1), self.dz, *self.some(2)])

    @staticmethod
    def some(count: int) -> list[Buffer]:
        return [Buffer("other", 64) for _ in range(count)]

    def input_gradient(self, layer: str, dx: Buffer, accumulate: int = 0) -> Step:
        operands = [*self.some(2), None, dx, None, None, *self.some(1)]
        return Step("conv_grad_input", f"{layer}:Input", [*SHAPE, 0, 0, 0, accumulate], [0.0, 0.0], operands)

    @property
    def steps(self) -> list[Step]:
        return [self.forward, self.grad_input, self.act, self.sum, self.weight]


def kernels(steps: list[Step]) -> list[str]:
    return [s.kernel for s in steps]


@pytest.mark.parametrize("keep", [1, 2])
def test_slope_and_sums_move_into_the_input_gradient(keep: int) -> None:
    b = Backward(keep)
    steps = fuse_finish(b.steps, set(), THREADS)
    assert steps == [b.forward, b.grad_input, b.weight]
    assert b.grad_input.ints == [*SHAPE, *([1, 1] if keep == 1 else [8, 2]), 1, 0]
    assert b.grad_input.floats == [0.5, 0]
    assert b.grad_input.operands[3:6] == [b.dx, b.kept, b.sums]
    assert b.weight.operands[1] is b.dx  # what read dZ reads dX now
    scratch = b.grad_input.scratch
    assert scratch is not None
    assert scratch.bytes == kernel_scratch("conv_grad_input", b.grad_input.ints, b.grad_input.floats, THREADS)


def test_a_gradient_that_adds_to_another_finishes_as_the_last_writer() -> None:
    b = Backward()
    first = b.input_gradient("c", b.dx)
    b.grad_input.ints[-1] = 1
    steps = fuse_finish([b.forward, first, b.grad_input, b.act, b.sum, b.weight], set(), THREADS)
    assert steps == [b.forward, first, b.grad_input, b.weight]
    assert b.grad_input.ints[16:] == [1, 1, 1, 1] and first.ints[16:] == [0, 0, 0, 0]


def test_a_second_reader_of_the_gradient_before_the_activation_keeps_the_activation_apart() -> None:
    for late in (False, True):
        b = Backward()
        reader = Step("neg", "r", [96], [], [b.dx, Buffer("negative", DX_BYTES)])
        steps = [*b.steps, reader] if late else [b.forward, b.grad_input, reader, b.act, b.sum, b.weight]
        fused = fuse_finish(steps, set(), THREADS)
        assert b.act in fused and b.sum not in fused
        assert b.grad_input.ints[16:] == [0, 0, 0, 0] and b.grad_input.operands[4] is None
        assert b.act.ints[-1] == 1 and b.act.operands[3] is b.sums  # read once instead of twice


def test_a_later_writer_keeps_the_activation_apart() -> None:
    b = Backward()
    later = b.input_gradient("c", b.dx, accumulate=1)
    fuse_finish([b.forward, b.grad_input, b.act, later, b.sum, b.weight], set(), THREADS)
    assert b.grad_input.ints[16:] == [0, 0, 0, 0]


def test_a_gradient_that_an_update_reads_stays_as_it_is() -> None:
    for outcome in ("dx", "dz"):
        b = Backward()
        assert b.act in fuse_finish(b.steps, {getattr(b, outcome)}, THREADS)


def test_dense_activations_take_the_sums_alone() -> None:
    b = Backward(3)
    assert fuse_finish(b.steps, set(), THREADS) == [b.forward, b.grad_input, b.act, b.weight]
    assert b.act.ints == [16, 6, 8, 3, 1]


def test_shapes_that_differ_stay_apart() -> None:
    b = Backward()
    b.act.ints[:2] = [8, 12]
    b.sum.ints[:2] = [4, 24]
    assert fuse_finish(b.steps, set(), THREADS) == b.steps


def test_kept_slopes_must_be_there_before_the_gradient() -> None:
    b = Backward()
    steps = [b.grad_input, b.forward, b.act, b.sum, b.weight]
    assert b.act in fuse_finish(steps, set(), THREADS)


def test_a_sum_from_another_kernel_stays() -> None:
    b = Backward()
    pool = Step("broadcast", "p", [2, 16, 6, 0, 1], [1.0], [*b.some(1), b.dz])
    assert fuse_finish([b.forward, pool, b.sum, b.weight], set(), THREADS) == [b.forward, pool, b.sum, b.weight]


def test_a_sum_is_taken_between_two_additions() -> None:
    """A residual's gradient is summed for one layer, then another branch adds to it."""
    b = Backward()
    sum_between = Step("channel_sum", "a:Sum", [16, 6], [], [b.dx, b.sums, None])
    later = b.input_gradient("c", b.dx, accumulate=1)
    after = Step("channel_sum", "d:Sum", [16, 6], [], [b.dx, Buffer("sums2", 24), None])
    again = Step("channel_sum", "e:Sum", [16, 6], [], [b.dx, Buffer("sums3", 24), None])
    steps = fuse_finish([b.grad_input, sum_between, later, after, again], set(), THREADS)
    assert steps == [b.grad_input, later, again]  # one sum a step
    assert b.grad_input.operands[5] is b.sums and later.operands[5] is after.operands[1]


def test_a_network_of_convolutions_reads_each_gradient_once() -> None:
    net = Network((9, 9, 3))
    x = net.conv(net.input, 8, 3, pad=1, norm=True, act="clip")
    y = net.conv(x, 16, norm=True, act="hardswish")
    y = net.conv(y, 16, 3, pad=1, group=16, norm=True, act="relu")
    x = net.binary("Add", x, net.conv(y, 8, norm=True))
    x = net.conv(x, 12, bias=True, act="relu")
    built = net.build(net.linear(net.mean(x, (1, 2)), 5))
    candidate = Search(graph_of(built), settings()).candidate(0.9, 8)
    train = candidate.train.steps
    # The mean's gradient and the loss's are made by no convolution.
    apart = [s for s in train if s.kernel in ("activation_grad", "channel_sum")]
    assert [(s.kernel, s.layer) for s in apart] == [("channel_sum", "layer9"), ("activation_grad", "layer6")]
    assert apart[1].ints[-1] == 1  # one pass for slope and sums
    finished = [s.ints[16:] for s in train if s.kernel == "conv_grad_input"]
    assert [2, 1, 1, 1] in finished  # the first layer's clip, at the end of the residual
