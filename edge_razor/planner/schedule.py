"""Scheduling: gradients finished where they are made, the order of backward and update steps, forward steps that are
repeated, transfers to and from the spill file, and steps in place.

Every transformation keeps what each step reads and writes; `tests/planner/verifier.py` checks the results
independently.
"""

from __future__ import annotations

from edge_razor.errors import BundleError

from .addend import fuse_addends
from .finish import fuse_finish
from .program import ACCUMULATE, KERNELS, Buffer, Program, Region, Step, is_sum, touches
from .recompute import make_again
from .spill import spill
from .turns import take_turns

__all__ = ["order_training", "schedule_inference", "schedule_training", "share_buffers"]


def schedule_training(program: Program, updates: list[Step], samples: int, threads: int) -> Program:
    """Orders a micro-batch of `samples`: forward, backward, and each parameter's update as soon as nothing else needs
    it."""
    return take_turns(share_buffers(order_training(program, updates, threads)), samples, threads)


def order_training(program: Program, updates: list[Step], threads: int) -> Program:
    """`schedule_training`, before steps work in place and take turns."""
    gradients = {u.operands[1] for u in updates}
    steps = fuse_accumulation(fuse_addends(program), gradients)
    steps = fuse_finish(steps, gradients, threads)
    steps = order_weight_gradients(steps)
    steps = defer_for_reuse(steps, program.inputs)
    steps = make_again(steps, program.inputs, program.places, threads)
    steps = insert_updates(steps, updates)
    steps = spill(steps, program.places.spilled)
    return Program(steps, program.inputs, program.outputs)


def schedule_inference(program: Program, samples: int, threads: int) -> Program:
    """The forward steps in graph order, in place and in turns where possible."""
    ordered = Program(fuse_addends(program), program.inputs, program.outputs)
    return take_turns(share_buffers(ordered), samples, threads)


def fuse_accumulation(steps: list[Step], gradients: set[Buffer | None]) -> list[Step]:
    """Turns dX = conv_grad_input(…); sum = other + dX into conv_grad_input accumulating into `other`.

    Legal where dX has no other reader, `other` is complete before and dead after, and neither is among `gradients`,
    which the updates still read.
    """
    order = {step: i for i, step in enumerate(steps)}
    users: dict[Buffer, list[Step]] = {
        buffer: [steps[i] for i in indices] for buffer, indices in touches(steps).items()
    }
    removed: set[Step] = set()
    for add in steps:
        if not is_sum(add):
            continue
        a, b, total = add.operands
        if a is None or b is None or total is None or a is b or a in gradients or b in gradients:
            continue
        if a.bytes != total.bytes or b.bytes != total.bytes:
            continue
        for made, other in ((b, a), (a, b)):
            if other.region != Region.ARENA or len(users[made]) != 2 or users[other][-1] is not add:
                continue
            producer = users[made][0]
            before = users[other][:-1]
            if producer.kernel != "conv_grad_input" or producer.ints[ACCUMULATE] or not before:
                continue
            if order[before[-1]] >= order[producer]:
                continue
            producer.operands[3] = other
            producer.ints[ACCUMULATE] = 1
            for user in users[total]:
                user.operands[:] = [other if o is total else o for o in user.operands]
            users[other] = [*before, producer, *(u for u in users.pop(total) if u is not add)]
            removed.add(add)
            break
    return [step for step in steps if step not in removed]


def order_weight_gradients(steps: list[Step]) -> list[Step]:
    """Runs a layer's weight gradient before or after its input gradient, whichever peaks lower.

    With k = bytes of the kept input (freed by the weight gradient), g = of the weight gradient (alive until the
    update, which waits for the input gradient since that reads the weight), x = of the input gradient and scratch sw,
    sx: weight first peaks at max(k + g + sw, g + x + sx), input first at k + x + max(sx, g + sw).
    """
    steps = list(steps)
    weight_steps = {(s.operands[1], s.layer): s for s in steps if s.kernel == "conv_grad_weight"}
    for input_step in [s for s in steps if s.kernel == "conv_grad_input"]:
        weight_step = weight_steps.get((input_step.operands[0], input_step.layer))
        if weight_step is None:
            continue
        i, j = steps.index(input_step), steps.index(weight_step)
        kept, gradient, made = weight_step.operands[0], weight_step.operands[2], input_step.operands[3]
        assert kept is not None and gradient is not None and made is not None
        k = 0 if any(kept in s.operands for s in steps[max(i, j) + 1 :]) or kept.region != Region.ARENA else kept.bytes
        g, x = gradient.bytes, 0 if input_step.ints[ACCUMULATE] else made.bytes
        sw, sx = (s.scratch.bytes if s.scratch else 0 for s in (weight_step, input_step))
        if max(k + g + sw, g + x + sx) <= k + x + max(sx, g + sw):
            end = _branch_end(steps, j)
            if i < end and not any(_conflict(input_step, s) for s in steps[i + 1 : end + 1]):
                steps.insert(end, steps.pop(i))
        elif i > j and not any(_conflict(input_step, s) for s in steps[j:i]):
            steps.insert(j, steps.pop(i))
    return steps


def defer_for_reuse(steps: list[Step], inputs: list[Buffer]) -> list[Step]:
    """Moves a step that could work in place behind the last reader of its operand, if that comes soon after.

    Backward of a product by a factor: dY·factor can overwrite dY once the factor's gradient has read dY.
    """
    window = 8  # steps; further away, the late result would keep other buffers alive
    steps = list(steps)
    touched = touches(steps)
    moves: list[tuple[Step, Step]] = []
    for index, step in enumerate(steps):
        for written, read in KERNELS[step.kernel].may_alias:
            out, source = step.operands[written], step.operands[read]
            if out is None or source is None or out.bytes != source.bytes or source in inputs:
                continue
            last = touched[source][-1]
            if source.region == Region.ARENA and touched[out][0] == index < last <= index + window:
                if not any(_conflict(step, s) for s in steps[index + 1 : last + 1]):
                    moves.append((step, steps[last]))
            break
    for step, reader in moves:
        steps.remove(step)
        steps.insert(steps.index(reader) + 1, step)
    return steps


def _branch_end(steps: list[Step], start: int) -> int:
    """Index of the last step after `start` that turns its result into gradients (ColumnDot, ScaleColumns, …)."""
    made = set(steps[start].writes)
    end = start
    for index in range(start + 1, len(steps)):
        step = steps[index]
        if step.kernel in ("column_dot", "batch_norm_grad", "scale_columns") and made.intersection(step.reads):
            made.update(step.writes)
            end = index
        elif step.kernel == "conv_grad_weight":
            break
    return end


def _conflict(a: Step, b: Step) -> bool:
    """Whether swapping the two steps would change what either computes."""
    a_writes, b_writes = set(a.writes), set(b.writes)
    return bool(a_writes.intersection(b.reads) or b_writes.intersection(a.reads) or a_writes & b_writes)


def insert_updates(steps: list[Step], updates: list[Step]) -> list[Step]:
    """Places each update after the last step that touches its gradient or reads its parameter."""
    touched = touches(steps)
    after: dict[int, list[Step]] = {}
    for update in updates:
        parameter, gradient = update.operands[:2]
        assert parameter is not None and gradient is not None
        if gradient not in touched:
            raise BundleError(f"training graph: no step makes the gradient of {parameter.name!r}")
        unread = [-1]  # of a parameter that nothing reads
        after.setdefault(max(touched[gradient][-1], touched.get(parameter, unread)[-1]), []).append(update)
    result: list[Step] = []
    for index, step in enumerate(steps):
        result.append(step)
        result.extend(after.get(index, ()))
    return result


def share_buffers(program: Program) -> Program:
    """Lets a step write its result over an operand that dies there, where the kernel allows it."""
    steps = program.steps
    touched = touches(steps)
    first = {b: t[0] for b, t in touched.items()} | {b: -1 for b in program.inputs}
    last = {b: t[-1] for b, t in touched.items()} | {b: len(steps) for b in program.outputs}
    target: dict[Buffer, Buffer] = {}
    for index, step in enumerate(steps):
        step.operands[:] = [target.get(b, b) if b is not None else None for b in step.operands]
        may_alias = KERNELS[step.kernel].may_alias
        for written, read in may_alias:
            out, source = step.operands[written], step.operands[read]
            if (
                out is None
                or source is None
                or out is source
                or out.region != Region.ARENA
                or source.region != Region.ARENA
                or out.bytes != source.bytes
                or first[out] != index
                or last[source] != index
                or any(o is source and (written, i) not in may_alias for i, o in enumerate(step.operands) if i != read)
            ):
                continue
            target[out] = source
            last[source] = last[out]
            step.operands[written] = source
            break
    outputs = [target.get(b, b) for b in program.outputs]
    return Program(steps, program.inputs, outputs)
