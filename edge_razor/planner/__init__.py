"""The planner: training graph + memory cap → plan, every byte placed before the first step runs (docs/planner.md).

graph → storage → lower → schedule → place → serialize; search chooses sparsity and micro-batch around them. Importing
the package does not import onnx: `plan` does when it is called, `plan_in_child` leaves it to a child process.
"""

from .child import plan_in_child
from .plan_file import Plan
from .planning import plan

__all__ = ["Plan", "plan", "plan_in_child"]
