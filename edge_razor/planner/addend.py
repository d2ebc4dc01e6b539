"""Residual additions in the convolution or matrix product that makes one of their terms: Y = act(conv(X, W) + addend).

Without this, the product's result is written, read and written again (binary), and once more by the activation behind
the sum (affine), as at the end of each block of a ResNet.
"""

from __future__ import annotations

from .program import ADDEND, Buffer, Program, Region, Step, is_sum, touches

__all__ = ["fuse_addends"]

_SHAPE = 16  # ints of ConvShape; act and keep follow
_Y, _KEPT = 4, 5  # operands of conv


def fuse_addends(program: Program) -> list[Step]:
    """The steps, with every sum and the activation behind it in the convolution that makes its later term.

    Only where nothing else sees what the convolution made: a value that the backward pass reads, that others are to be
    made again from, or that is a result of the program stays.
    """
    return _Addends(program).run()


class _Addends:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.order = {step: index for index, step in enumerate(program.steps)}
        self.users = {b: [program.steps[i] for i in at] for b, at in touches(program.steps).items()}
        self.removed: set[Step] = set()

    def run(self) -> list[Step]:
        for step in self.program.steps:
            if step.backward:
                continue
            if is_sum(step):
                self._take_sum(step)
            elif step.kernel == "affine":
                self._take_activation(step)
        return [step for step in self.program.steps if step not in self.removed]

    def _take_sum(self, add: Step) -> None:
        """made = conv(…); total = made + other, of one shape: legal if `other` is complete before the convolution."""
        a, b, total = add.operands
        assert a is not None and b is not None and total is not None
        for made, other in ((a, b), (b, a)):
            maker = self._only_maker(made, add)
            if maker is None or maker.operands[ADDEND] is not None or not made.bytes == other.bytes == total.bytes:
                continue
            if made in self.program.places.checkpoints or other.region != Region.ARENA:
                continue
            if any(other in s.writes and self.order[s] >= self.order[maker] for s in self.users[other]):
                continue
            maker.operands[_Y], maker.operands[ADDEND] = total, other
            self._replace(add, maker)
            return

    def _take_activation(self, act: Step) -> None:
        """total = conv(…) + addend; Y = act(total), nothing but the activation."""
        total, scale, shift, y, kept = act.operands
        assert total is not None and y is not None
        maker = self._only_maker(total, act)
        if maker is None or maker.operands[ADDEND] is None or scale is not None or shift is not None:
            return
        n, _, _, _, oh, ow, oc = maker.ints[:7]
        if act.ints[:2] != [n * oh * ow, oc]:
            return
        places = self.program.places
        if total in places.checkpoints and not places.again.isdisjoint([y, kept]):
            return  # made again from the sum, without the product
        maker.ints[_SHAPE : _SHAPE + 2] = act.ints[2:4]
        maker.floats[:] = act.floats
        maker.operands[_Y], maker.operands[_KEPT] = y, kept
        self._replace(act, maker)

    def _only_maker(self, made: Buffer, reader: Step) -> Step | None:
        """The convolution without activation that makes `made`, if nothing but `reader` sees it."""
        maker, *readers = self.users[made]
        if readers != [reader] or made in self.program.outputs:
            return None
        plain = maker.kernel == "conv" and maker.operands[_Y] is made and maker.ints[_SHAPE] == 0
        return maker if plain else None

    def _replace(self, taken: Step, maker: Step) -> None:
        """`maker` does what `taken` did."""
        self.removed.add(taken)
        for buffer in {b for b in taken.operands if b is not None}:
            users = {*self.users[buffer], maker} - {taken}
            self.users[buffer] = sorted(users, key=self.order.__getitem__)
