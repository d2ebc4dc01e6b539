"""Which additions, and activations behind them, become part of the convolution that makes a term, and which not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import pytest

from edge_razor.planner.addend import fuse_addends
from edge_razor.planner.program import ADDEND, Buffer, Places, Program, Region, Step
from edge_razor.planner.schedule import share_buffers
from edge_razor.planner.search import Candidate, Search

from .conftest import graph_of, settings
from .networks import Network
from .verifier import verify

# One image of 4 × 4 pixels, 1×1 kernel, 6 channels to 6.
SHAPE = [1, 4, 4, 6, 4, 4, 6, 1, 1, 1, 1, 0, 0, 1, 1, 1]
BYTES = 16 * 6 * 4
NOWHERE = Places()


class Block:
    """The steps of a residual block by hand: made = conv(x); total = residual + made; y, kept = relu(total)."""

    def __init__(self) -> None:
        self.x, self.residual, self.made, self.total, self.y = (
            Buffer(name, BYTES) for name in ("x", "residual", "made", "total", "y")
        )
        self.kept, self.weight = Buffer("kept", 16), Buffer("W", 144, Region.PARAMS)
        self.conv = self.convolution("a", self.x, self.made)
        self.add = Step("binary", "b:Add", [0, 1, 96, 1, 1], [], [self.residual, self.made, self.total])
        self.act = Step("affine", "c:Affine", [16, 6, 1, 1], [0.5, 0.0], [self.total, None, None, self.y, self.kept])
        self.reader = self.user(self.y)
        self.backward = Step("neg", "d:Neg", [4], [], [self.kept, Buffer("gradient", 16)], True)

    def convolution(self, layer: str, x: Buffer, y: Buffer) -> Step:
        return Step("conv", f"{layer}:Conv", [*SHAPE, 0, 0], [0, 0], [x, self.weight, None, None, y, None, None, None])

    @staticmethod
    def user(buffer: Buffer, backward: bool = False) -> Step:
        return Step("neg", "reader:Neg", [96], [], [buffer, Buffer("other", buffer.bytes)], backward)

    @property
    def steps(self) -> list[Step]:
        return [self.conv, self.add, self.act, self.reader, self.backward]

    def fuse(
        self, steps: list[Step] | None = None, places: Places = NOWHERE, outputs: tuple[Buffer, ...] = ()
    ) -> set[Step]:
        """The steps that are left."""
        steps = self.steps if steps is None else steps
        return set(fuse_addends(Program(list(steps), [self.x, self.residual], list(outputs), places)))


def test_the_convolution_takes_sum_and_activation() -> None:
    for swap in (False, True):
        b = Block()
        if swap:
            b.add.operands[:2] = [b.made, b.residual]
        assert b.fuse() == {b.conv, b.reader, b.backward}
        assert b.conv.ints == [*SHAPE, 1, 1] and b.conv.floats == [0.5, 0.0]
        assert b.conv.operands[4:7] == [b.y, b.kept, b.residual]


@pytest.mark.parametrize("later", ["shortcut", "block"])
def test_the_later_of_two_convolutions_takes_the_sum(later: str) -> None:
    b = Block()
    shortcut = b.convolution("s", b.x, b.residual)
    first, second = (b.conv, shortcut) if later == "shortcut" else (shortcut, b.conv)
    earlier = first.operands[4]
    assert b.fuse([first, second, b.add, b.act, b.reader, b.backward]) == {first, second, b.reader, b.backward}
    assert second.operands[4:7] == [b.y, b.kept, earlier] and second.ints[16:] == [1, 1]
    assert first.operands[4:7] == [earlier, None, None] and first.ints[16:] == [0, 0]


def test_the_sum_alone_is_taken_where_it_has_another_reader() -> None:
    for backward in (False, True):
        b = Block()
        reader = b.user(b.total, backward)
        assert b.fuse([b.conv, b.add, b.act, b.reader, reader]) == {b.conv, b.act, b.reader, reader}
        assert b.conv.ints[16:] == [0, 0] and b.conv.operands[4:7] == [b.total, None, b.residual]


def test_an_activation_without_a_sum_is_none_of_its_business() -> None:
    b = Block()
    b.act.operands[0] = b.made
    steps = [b.conv, b.act, b.reader]
    assert b.fuse(steps) == set(steps)


CHANGES: dict[str, Callable[[Block], object]] = {
    "another operation": lambda b: b.add.ints.__setitem__(0, 2),
    "broadcast": lambda b: b.add.ints.__setitem__(slice(1, None), [2, 16, 6, 0, 1, 6, 1]),
    "one of broadcast": lambda b: b.add.ints.__setitem__(3, 0),
    "smaller": lambda b: setattr(b.residual, "bytes", BYTES // 2),
    "activation of its own": lambda b: b.conv.ints.__setitem__(16, 1),
    "what is added is a parameter": lambda b: setattr(b.residual, "region", Region.PARAMS),
    "twice itself": lambda b: b.add.operands.__setitem__(0, b.made),
    "already adds": lambda b: b.conv.operands.__setitem__(ADDEND, Buffer("earlier", BYTES)),
    "of the gradient": lambda b: setattr(b.add, "backward", True),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_other_additions_stay(change: Callable[[Block], object]) -> None:
    b = Block()
    change(b)
    before = [list(s.operands) for s in b.steps]
    assert b.fuse() == set(b.steps)
    assert [list(s.operands) for s in b.steps] == before


def test_a_product_that_something_else_sees_stays() -> None:
    for backward in (False, True):
        b = Block()
        reader = b.user(b.made, backward)
        assert b.add in b.fuse([*b.steps[:-1], reader, b.backward])
    b = Block()
    assert b.add in b.fuse(outputs=(b.made,))
    b = Block()
    assert b.add in b.fuse(places=Places(checkpoints=frozenset([b.made])))
    b = Block()  # as the result of the program the sum is still the convolution's to make
    assert b.fuse([b.conv, b.add], outputs=(b.total,)) == {b.conv}


def test_what_is_made_after_the_convolution_cannot_be_added() -> None:
    b = Block()
    late = Step("neg", "late:Neg", [96], [], [b.x, b.residual])
    assert b.add in b.fuse([b.conv, late, b.add, b.act, b.reader, b.backward])
    b = Block()
    part = Step("copy", "late:Copy", [1, 48, 1, 1, 0, 48], [], [b.x, b.residual])  # one of several writers
    early = Step("copy", "early:Copy", [1, 48, 1, 1, 0, 0], [], [b.x, b.residual])
    assert b.add in b.fuse([early, b.conv, part, b.add, b.act, b.reader, b.backward])


@pytest.mark.parametrize("operand", [1, 2])
def test_an_affine_that_scales_stays(operand: int) -> None:
    b = Block()
    b.act.operands[operand] = Buffer("vector", 24)
    assert b.fuse() == {b.conv, b.act, b.reader, b.backward}


def test_an_activation_over_other_rows_stays() -> None:
    b = Block()
    b.act.ints[:2] = [12, 8]  # its bits would lie otherwise
    assert b.act in b.fuse()


def test_an_activation_that_is_made_again_from_the_sum_stays() -> None:
    for again in ("y", "kept"):
        b = Block()
        places = Places(frozenset([getattr(b, again)]), frozenset([b.total]))
        assert b.fuse(places=places) == {b.conv, b.act, b.reader, b.backward}
    for again in ("total", "x"):
        b = Block()
        assert b.act not in b.fuse(places=Places(frozenset([getattr(b, again)]), frozenset([b.y])))
    b = Block()  # the sum starts what is made again, but nothing behind it in the block
    assert b.act not in b.fuse(places=Places(frozenset([b.x]), frozenset([b.total])))


def test_dropout_between_product_and_sum_keeps_them_apart() -> None:
    net = Network((8, 6))
    x = net.linear(net.input, 8)
    y = net.binary("Add", x, net.dropout(net.linear(x, 8), 0.3))
    candidate = Search(graph_of(net.build(net.linear(net.mean(y, (1,)), 3))), settings()).candidate(0.0, 8)
    assert [s.kernel for s in candidate.train.steps if not s.backward][:4] == ["conv", "conv", "dropout", "binary"]
    # In inference there is no dropout.
    assert [s.kernel for s in candidate.evaluate.steps][:2] == ["conv", "conv"]
    assert addends(candidate, evaluate=True) == 1


def addends(candidate: Candidate, evaluate: bool = False) -> int:
    steps = (candidate.evaluate if evaluate else candidate.train).steps
    return sum(s.kernel == "conv" and s.operands[ADDEND] is not None for s in steps)


@pytest.mark.parametrize("act", ["relu", "clip", "hardswish", "gelu"])
@pytest.mark.parametrize("sparsity", [0.0, 0.9])
def test_a_residual_network_has_no_step_for_its_sums(act: str, sparsity: float) -> None:
    net = Network((9, 9, 3))
    x = net.conv(net.input, 16, 3, pad=1, norm=True, act=act)
    y = net.conv(x, 8, norm=True, act=act)
    x = net.act(net.binary("Add", net.conv(y, 24, 3, pad=1, norm=True), net.conv(x, 24, norm=True)), act)
    y = net.conv(x, 8, norm=True, act=act)
    x = net.act(net.binary("Add", net.conv(y, 24, 3, pad=1, norm=True), x), act)
    built = net.build(net.linear(net.mean(x, (1, 2)), 5))
    candidate = Search(graph_of(built), settings()).candidate(sparsity, 8)
    for program in (candidate.train, candidate.evaluate):
        kernels = Counter(s.kernel for s in program.steps if not s.backward)
        assert not kernels["binary"] and not kernels["affine"]
        verify(program, candidate.accounting.arena)
    assert addends(candidate) == addends(candidate, evaluate=True) == 2
    first, second = (s for s in candidate.train.steps if s.kernel == "conv" and s.operands[ADDEND] is not None)
    assert first.operands[4].offset == first.operands[ADDEND].offset  # the other product dies there
    in_place = second.operands[4].offset == second.operands[ADDEND].offset
    assert in_place == (sparsity > 0)  # kept as it is, x lives on


def test_a_result_is_not_written_over_an_addend_that_is_multiplied_too() -> None:
    b = Block()
    b.add.operands[0] = b.x
    program = Program([b.conv, b.add, b.user(b.total)], [b.x], [])
    program = share_buffers(Program(fuse_addends(program), program.inputs, program.outputs))
    assert program.steps[0] is b.conv and b.conv.operands[ADDEND] is b.x
    assert b.conv.operands[4] is b.total
    other = Block()
    program = Program([other.conv, other.add, other.user(other.total)], [other.x, other.residual], [])
    program = share_buffers(Program(fuse_addends(program), program.inputs, program.outputs))
    assert other.conv.operands[4] is other.residual
