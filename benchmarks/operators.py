"""Counts the operators that torch issues.

The rule: every operator counts that torch's dispatcher runs below autograd and autocast, once, whatever it launches,
but for views and other changes of metadata alone (operators whose result is an input's memory that they do not write
to, and _unsafe_view), pure allocations (empty and its like), and marks for the profiler. So an operator of fastgen's
counts once: a loss kernel is one launch, batchnorm_act two launches forward and two backward; some of torch's own are
two launches and more (slice_backward fills and copies).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

ALLOCATIONS = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
RULE = "counted: operators of the dispatcher that are no views, no pure allocations and no marks for the profiler"


class OperatorCounter(TorchDispatchMode):
    """Counts the operators that run inside its `with`, phase by phase.

    Attributes:
        phase: to which the next operators are charged.
        names: how often each operator was seen, by phase and name.
    """

    def __init__(self, phase: str = "forward") -> None:
        super().__init__()
        self.phase = phase
        self.names: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if is_work(func):
            self.names[self.phase, str(func)] += 1
        return func(*args, **(kwargs or {}))

    @property
    def by_phase(self) -> dict[str, int]:
        """Operators of each phase."""
        sums: Counter[str] = Counter()
        for (phase, _), count in self.names.items():
            sums[phase] += count
        return dict(sums)


def is_work(func: OpOverload) -> bool:
    """Whether an operator counts; the module's docstring says the rule."""
    if func.namespace in ("prim", "profiler"):
        return False
    name = func._schema.name.split("::")[1]
    only_metadata = func.is_view or name == "_unsafe_view"
    return not only_metadata and not (func.namespace == "aten" and name in ALLOCATIONS)


@dataclass(frozen=True)
class Count:
    """Operators of one case.

    Attributes:
        part: `loss`, `teacher` or `step`.
        model: the network; for losses none.
        case: what was counted.
        precision: of the arithmetic.
        by_phase: operators of each phase; of a step among several the mean.
        graph_breaks: of the step's forward pass: `0`, or why torch.compile cannot take it whole; None: not asked.
    """

    part: str
    model: str
    case: str
    precision: str
    by_phase: Mapping[str, float]
    graph_breaks: str | None = None

    @property
    def operators(self) -> float:
        """All of them."""
        return sum(self.by_phase.values())
