"""A training under way: all that its steps change, and what a checkpoint therefore holds."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fastgen.buffers import Rule, own_statistics, put_statistics, together
from fastgen.consistency import Means
from fastgen.distributed import Group
from fastgen.learner import Learner
from fastgen.meters import Meter, Stopwatch, Tally
from fastgen.random_state import put_random_state, random_state

# What saving at the ends of epochs may cost: where epochs are shorter, some are passed over.
SAVE_SHARE = 0.01
# In a checkpoint: mean predictions of all images.
MEANS = "means"


@dataclass
class Training:
    """Learner, counters and clocks of one generation, in one process.

    Attributes:
        learner: takes the steps.
        meter: counts the epoch.
        stopwatch: of the generation.
        group: of the run.
        rule: how running statistics are brought together.
        means: of earlier predictions, which steps add to; None: there are none.
        step: steps taken.
        history: a row an epoch.
        saved_at, save_seconds: when the last checkpoint was written, and how long that took.
    """

    learner: Learner
    meter: Meter
    stopwatch: Stopwatch
    group: Group
    rule: Rule
    means: Means | None = None
    step: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    saved_at: float = field(default_factory=time.monotonic)
    save_seconds: float = 0.0

    def take(self, tally: Tally) -> None:
        """Counts steps that were taken."""
        self.meter.add(self.step, tally)
        self.step += tally.count

    def save_is_due(self, save_minutes: float, *, epoch_ends: bool = False) -> bool:
        """Whether this process's clock asks for a checkpoint."""
        since_seconds = time.monotonic() - self.saved_at
        cheap = epoch_ends and self.save_seconds <= SAVE_SHARE * since_seconds
        return cheap or since_seconds >= 60 * save_minutes

    def state(self) -> dict[str, Any]:
        """Everything, in every process: to be asked for in all of them at once.

        What each process has of its own stands under `processes`, by rank: the same number of processes goes on with
        the very same bits.
        """
        own = {
            "meter": self.meter.state(),
            "statistics": own_statistics(self.learner.model),
            "random": random_state(self.learner.device),
        }
        means = None if self.means is None else self.means.state()
        return {
            **({} if means is None else {MEANS: means}),
            "step": self.step,
            **self.learner.state(),
            "seconds": self.stopwatch.seconds(),
            "history": self.history,
            "processes": self.group.gather(own),
        }

    def load_state(self, state: Mapping[str, Any], means_NC: Tensor | None = None) -> None:
        """Goes on from what `state` gave, here or in another number of processes.

        Args:
            state: without its means, which may be too large to be in all processes.
            means_NC: in the main process, if there are some.
        """
        self.learner.load_state(state)
        rows = state["processes"]
        if self.means is not None:
            self.means.restore(means_NC)
        if len(rows) == self.group.world:
            own = rows[self.group.rank]
            put_statistics(self.learner.model, own["statistics"])
            put_random_state(own["random"])
            self.meter.restore(own["meter"])
        else:
            put_statistics(self.learner.model, together([row["statistics"] for row in rows], self.rule))
            if self.group.main:
                self.meter.restore_sum([row["meter"] for row in rows])
        self.stopwatch.add(state["seconds"])
        self.step, self.history = state["step"], state["history"]
