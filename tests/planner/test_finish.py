"""Which additions, activation_grad and channel_sum steps become part of the step that makes their dY, and which must
not."""

from __future__ import annotations

import pytest

from edge_razor.planner.finish import fuse_finish
from edge_razor.planner.program import Buffer, Program, Region, Step
from edge_razor.planner.schedule import share_buffers
from edge_razor.planner.search import Search
from edge_razor.runtime import kernel_scratch

from .conftest import graph_of, settings
from .networks import Built, Network
from .verifier import verify

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


class Residual:
    """A pre-norm residual's gradient, by hand: total = other + dX, dX = layer_norm_grad(dN), channel_sum(total)."""

    def __init__(self) -> None:
        self.other, self.dn, self.dx, self.total = (Buffer(n, DX_BYTES) for n in ("other", "dN", "dX", "total"))
        self.sums = Buffer("sums", 24)
        self.before = self.fill(self.other)
        self.make_dn = self.fill(self.dn)
        self.norm = self.norm_gradient(self.dn, self.dx)
        self.add = self.addition(self.other, self.dx, self.total)
        self.sum = Step("channel_sum", "a:Sum", [16, 6], [], [self.total, self.sums, None])
        self.reader = Step("neg", "r", [96], [], [self.total, Buffer("negative", DX_BYTES)])

    @staticmethod
    def fill(buffer: Buffer) -> Step:
        return Step("fill", "f", [96], [1.0], [buffer])

    @staticmethod
    def norm_gradient(dn: Buffer, dx: Buffer) -> Step:
        xhat, rstd, gamma = Buffer("xhat", DX_BYTES), Buffer("rstd", 64), Buffer("gamma", 24, Region.PARAMS)
        operands = [xhat, dn, rstd, gamma, dx, Buffer("dgamma", 24), None, None, None, Buffer("scratch", 4096)]
        return Step("layer_norm_grad", "n:Norm", [0, 2, 8, 6, 0, 0], [], operands)

    @staticmethod
    def addition(a: Buffer, b: Buffer, total: Buffer) -> Step:
        return Step("binary", "n:Add", [0, 1, 96, 1, 1], [], [a, b, total])

    @property
    def steps(self) -> list[Step]:
        return [self.before, self.make_dn, self.norm, self.add, self.sum, self.reader]

    def stays_apart(self, steps: list[Step], gradients: set[Buffer | None] | None = None) -> bool:
        fused = fuse_finish(steps, gradients or set(), THREADS)
        assert (self.add in fused) == (self.norm.operands[7] is None)
        return self.add in fused and self.norm.operands[4] is self.dx


@pytest.mark.parametrize("swapped", [False, True])
def test_a_residual_and_its_sums_move_into_the_gradient_of_the_norm(swapped: bool) -> None:
    r = Residual()
    if swapped:
        r.add.operands[:2] = [r.dx, r.other]
    scratch = r.norm.scratch
    assert fuse_finish(r.steps, set(), THREADS) == [r.before, r.make_dn, r.norm, r.reader]
    assert r.norm.operands[4] is r.total and r.norm.operands[7:] == [r.other, r.sums, scratch]
    assert r.norm.ints == [0, 2, 8, 6, 0, 0]


@pytest.mark.parametrize(("early", "place"), [(False, "dN"), (True, "other")])
def test_the_sum_takes_the_place_of_what_dies(early: bool, place: str) -> None:
    """Of dN, or, where that is read later, of the residual's gradient."""
    r = Residual()
    late = [Step("neg", "late", [96], [], [r.dn, Buffer("negative dN", DX_BYTES)])] if early else []
    program = share_buffers(Program([*fuse_finish(r.steps, set(), THREADS), *late]))
    written = program.steps[2].operands[4]
    assert written is not None and written.name == place
    assert program.steps[3].operands[0] is written


def test_sums_alone_move_into_the_gradient_of_the_norm() -> None:
    r = Residual()
    r.sum.operands[0] = r.reader.operands[0] = r.dx
    assert fuse_finish([r.make_dn, r.norm, r.sum, r.reader], set(), THREADS) == [r.make_dn, r.norm, r.reader]
    assert r.norm.operands[7] is None and r.norm.operands[8] is r.sums


def test_one_gradient_of_a_norm_takes_one_addend() -> None:
    """The next one goes to the next norm of the chain."""
    r = Residual()
    dn, dx, last = (Buffer(n, DX_BYTES) for n in ("dN2", "dX2", "last"))
    more = [r.fill(dn), second := r.norm_gradient(dn, dx), again := r.addition(r.total, dx, last)]
    fused = fuse_finish([*r.steps, *more], set(), THREADS)
    assert fused == [r.before, r.make_dn, r.norm, r.reader, more[0], second]
    assert second.operands[4] is last and second.operands[7] is r.total
    r = Residual()
    again = r.addition(r.total, r.before.operands[0], last)
    assert again in fuse_finish([*r.steps, again], set(), THREADS)  # total is no norm's own gradient any more


@pytest.mark.parametrize("late", [False, True])
def test_a_second_reader_of_the_gradient_of_the_norm_keeps_the_addition_apart(late: bool) -> None:
    r = Residual()
    other = Step("neg", "o", [96], [], [r.dx, Buffer("negative dX", DX_BYTES)])
    steps = r.steps
    steps.insert(5 if late else 3, other)
    assert r.stays_apart(steps)


def test_a_gradient_of_the_norm_that_an_update_reads_stays_as_it_is() -> None:
    r = Residual()
    assert r.stays_apart(r.steps, {r.dx})
    r = Residual()
    assert not r.stays_apart(r.steps, {r.total, r.other})  # these are what they were, when an update reads them


def test_a_residual_that_is_complete_later_keeps_the_addition_apart() -> None:
    r = Residual()
    assert r.stays_apart([r.make_dn, r.norm, r.before, r.add, r.sum, r.reader])
    r = Residual()
    again = Backward().input_gradient("c", r.other, accumulate=1)
    assert r.stays_apart([r.before, r.make_dn, r.norm, again, r.add, r.sum, r.reader])


def test_a_residual_that_is_read_later_is_added_and_not_written_over() -> None:
    r = Residual()
    r.norm.operands[4:7] = [r.dx, None, None]
    late = [Step("neg", "late", [96], [], [b, Buffer("negative", DX_BYTES)]) for b in (r.other, r.dn)]
    program = share_buffers(Program(fuse_finish([*r.steps, *late], set(), THREADS)))
    assert r.add not in program.steps
    assert r.norm.operands[4] is r.total and r.norm.operands[7] is late[0].operands[0] is r.other


def test_a_residual_that_is_written_after_the_addition_is_added() -> None:
    r = Residual()
    later = Backward().input_gradient("c", r.other, accumulate=1)
    assert not r.stays_apart([*r.steps, later])


def test_other_operations_and_shapes_stay_apart() -> None:
    r = Residual()
    r.add.ints[0] = 2  # a product
    assert r.stays_apart(r.steps)
    r = Residual()
    r.add.ints[:] = [0, 2, 16, 6, 0, 1, 6, 1]  # one row for all
    assert r.stays_apart(r.steps)
    r = Residual()
    r.add.ints[:] = [0, 1, 96, 0, 1]  # one number for all
    assert r.stays_apart(r.steps)
    r = Residual()
    r.other.bytes = 4 * DX_BYTES
    assert r.stays_apart(r.steps)
    r = Residual()
    r.sum.ints[:] = [8, 12]
    assert r.sum in fuse_finish(r.steps, set(), THREADS) and r.norm.operands[8] is None


class AttentionBackward:
    """dQ, dK and dV [2, 3, 4] of a sequence, dK and dV with half the heads, apart or as columns of one matrix."""

    def __init__(self, row: int = 0) -> None:
        ints = [2, 3, 3, 4, 2, 1, 0, 0, 0, *[0] * 7]
        if row:
            ints += [4, 0, 2, 0, 2, 0, row, 0, row, 4, row, 6]
            self.gradients = [Buffer("dQKV", 4 * 6 * row)] * 3
        else:
            self.gradients = [Buffer(name, 4 * 6 * width) for name, width in (("dQ", 4), ("dK", 2), ("dV", 2))]
        read = [*Backward.some(3), None, None, *Backward.some(1), None]
        operands = [*read, *self.gradients, None, None, None, Buffer("scratch", 64)]
        self.step = Step("attention_grad", "a:Attention", ints, [0.5, 0.0], operands)

    def channel_sum(self, index: int, rows: int, cols: int) -> Step:
        return Step("channel_sum", "p:Sum", [rows, cols], [], [self.gradients[index], Buffer("sums", 4 * cols), None])


def test_sums_of_separate_projections_move_into_the_gradient_of_attention() -> None:
    a = AttentionBackward()
    sums = [a.channel_sum(2, 6, 2), a.channel_sum(0, 6, 4)]
    scratch = a.step.scratch
    assert fuse_finish([a.step, *sums], set(), THREADS) == [a.step]
    assert a.step.operands[10:] == [sums[1].operands[1], None, sums[0].operands[1], scratch]


def test_sums_of_one_projection_move_into_the_gradient_of_attention() -> None:
    a = AttentionBackward(row=8)
    sums = a.channel_sum(0, 6, 8)
    assert fuse_finish([a.step, sums], set(), THREADS) == [a.step]
    assert a.step.operands[10:13] == [sums.operands[1]] * 3


def test_sums_that_are_not_of_attention_alone_stay() -> None:
    a = AttentionBackward(row=9)  # a column of something else
    sums = a.channel_sum(0, 6, 9)
    assert fuse_finish([a.step, sums], set(), THREADS) == [a.step, sums]
    a = AttentionBackward(row=8)
    for rows, cols in ((3, 16), (12, 4)):
        sums = a.channel_sum(0, rows, cols)
        assert fuse_finish([a.step, sums], set(), THREADS) == [a.step, sums]
    later = Step("copy", "c", [1, 8, 1, 1, 0, 0], [], [*Backward.some(1), a.gradients[0]])
    sums = a.channel_sum(0, 6, 8)
    assert fuse_finish([a.step, later, sums], set(), THREADS) == [a.step, later, sums]
    a = AttentionBackward()
    first, second = a.channel_sum(1, 6, 2), a.channel_sum(1, 6, 2)
    assert fuse_finish([a.step, first, second], set(), THREADS) == [a.step, second]
    assert a.step.operands[10:13] == [None, first.operands[1], None]


def vision_transformer(net: Network) -> Built:
    """Pre-norm, one projection for Q, K and V."""
    x = net.linear(net.reshape(net.input, (16, 8)), 12)
    for _ in range(2):
        q, k, v = net.split(net.linear(net.layer_norm(x), 36), 2, (12, 12, 12))
        x = net.binary("Add", x, net.linear(net.attention(q, k, v, 3, 4), 12))
        x = net.binary("Add", x, net.linear(net.linear(net.layer_norm(x), 24, act="gelu"), 12))
    return net.build(net.linear(net.mean(net.layer_norm(x), (1,)), 5))


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_a_transformer_adds_and_sums_in_the_gradients_of_norms_and_attention(sparsity: float, again: bool) -> None:
    """Also where the values that these read are made again right before."""
    search = Search(graph_of(vision_transformer(Network((4, 4, 8)))), settings(sparsity=sparsity))
    candidate = search.candidate(sparsity, 8, len(search.levels) - 1 if again else 0)
    assert any(step.label.endswith(" again") for step in candidate.train.steps) == again
    verify(candidate.train, candidate.accounting.arena)
    steps = [step for step in candidate.train.steps if step.backward]
    assert not any(step.kernel == "binary" for step in steps)
    assert [step.layer for step in steps if step.kernel == "channel_sum"] == [steps[0].layer]  # of the loss's gradient
    norms = [step for step in steps if step.kernel == "layer_norm_grad"]
    assert [step.operands[7] is not None for step in norms] == [False, *[True] * 4]
    assert all(step.operands[8] is not None for step in norms)
    assert [step.operands[10] is step.operands[11] is step.operands[12] is not None for step in steps
            if step.kernel == "attention_grad"] == [True, True]  # fmt: skip
