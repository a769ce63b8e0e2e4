"""Recipes beside plain training, generation by generation, paired by seed; and which differences are beyond noise.

What is tested is fixed before the results are seen: of each recipe the last generation that its plan and the baseline's
have in common, its own top-1 error and that of the ensemble; a paired t-test each, and Holm's procedure over all of
them. Plain networks get better with the generation too, as an ensemble, and by luck: so generation g is compared with
generation g.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastgen.probe import told_apart
from fastgen.report.groups import Group, differing
from fastgen.report.runs import Seed
from fastgen.report.stats import Difference, difference_of

TESTED = ("top1_error", "ensemble_top1_error")


@dataclass(frozen=True)
class Contrast:
    """A recipe beside another, or beside its own patriarch.

    Attributes:
        group, baseline: of both; the same where it is its own patriarch.
        generation, baseline_generation: of both.
        measure: of results.json.
        difference: group minus baseline, in points of a percentage; None: no seed has both.
        same_networks: whether both are the same nodes.
        tested: whether it is one of those that are tested.
        apart: whether it is told apart from noise.
    """

    group: Group
    baseline: Group
    generation: int
    baseline_generation: int
    measure: str
    difference: Difference | None
    same_networks: bool
    tested: bool = False
    apart: bool = False

    @property
    def paired(self) -> tuple[list[float], list[float]]:
        """Values of both under the seeds that both have, which the difference is of."""
        own, other = self._values()
        seeds = [seed for seed in own if seed in other]
        return [own[seed] for seed in seeds], [other[seed] for seed in seeds]

    @property
    def leaves_out(self) -> bool:
        """Whether one of both has a seed that the other has not."""
        own, other = self._values()
        return own.keys() != other.keys()

    def _values(self) -> tuple[dict[Seed, float], dict[Seed, float]]:
        own = self.group.values(self.measure, self.generation)
        return own, self.baseline.values(self.measure, self.baseline_generation)


@dataclass(frozen=True)
class Comparison:
    """All contrasts of a report.

    Attributes:
        baseline_of: name of each recipe that is compared -> what it is compared with.
        contrasts: of recipes beside their baselines; where no recipe has one, of students beside their patriarchs.
        within: whether it is the latter.
    """

    baseline_of: dict[str, Group]
    contrasts: tuple[Contrast, ...]
    within: bool

    def find(self, group: Group, generation: int, measure: str) -> Contrast | None:
        """The contrast of one cell of a table."""
        wanted = group.name, generation, measure
        return next((c for c in self.contrasts if (c.group.name, c.generation, c.measure) == wanted), None)

    @property
    def tested(self) -> list[Contrast]:
        """Those that the headline may speak of."""
        return [contrast for contrast in self.contrasts if contrast.tested]


def compare(groups: Sequence[Group], measures: Sequence[str], chosen: Group | None = None) -> Comparison:
    """Compares all recipes with plain ones, where there are none with born-again ones, else with their patriarchs.

    Args:
        groups: all of them.
        measures: of results.json, that are compared.
        chosen: the baseline of all others, where the person has named it.
    """
    plain = [group for group in groups if group.kind == "plain"]
    baselines = [chosen] if chosen else plain or [group for group in groups if group.kind == "born-again"]
    names = {baseline.name for baseline in baselines}
    compared = [group for group in groups if group.name not in names]
    if not baselines or not compared:
        contrasts = [contrast for group in groups for contrast in _beside_patriarch(group)]
        return Comparison({}, tuple(_tested(contrasts)), within=True)
    baseline_of = {group.name: _nearest(group, baselines) for group in compared}
    contrasts = [
        contrast
        for group in compared
        for measure in measures
        for contrast in _beside(group, baseline_of[group.name], measure)
    ]
    return Comparison(baseline_of, tuple(_tested(contrasts)), within=False)


def _nearest(group: Group, baselines: Sequence[Group]) -> Group:
    """The one that differs in the fewest settings other than the method; among these, that has the most beside it."""

    def distance(baseline: Group) -> tuple[int, int, int]:
        common = _common(group.generations, baseline.generations)
        pairs = [seed for g in common for seed in group.nodes(g) if seed in baseline.nodes(g)]
        return len(other_settings(group, baseline)), -len(_common(group.planned, baseline.planned)), -len(pairs)

    return min(baselines, key=distance)


def other_settings(group: Group, baseline: Group) -> list[str]:
    """Settings beside the method, which is all of gen and teacher, in which two recipes differ."""
    return [
        key for key in differing([group.settings, baseline.settings]) if key.partition(".")[0] not in ("gen", "teacher")
    ]


def tested_generation(group: Group, baseline: Group) -> int | None:
    """The last one that both are to train, measured or not; None: there is none of students."""
    common = _common(group.planned, baseline.planned)
    # Patriarchs are beside each other in the table; they are no result of students where there are to be some.
    return common[-1] if common and (common[-1] > 0 or group.planned[-1] == 0) else None


def _common(one: Sequence[int], other: Sequence[int]) -> list[int]:
    return [generation for generation in one if generation in other]


def _beside(group: Group, baseline: Group, measure: str) -> list[Contrast]:
    tested = tested_generation(group, baseline)
    common = _common(group.generations, baseline.generations)
    return [_contrast(group, g, baseline, g, measure, tested=g == tested) for g in common]


def _beside_patriarch(group: Group) -> list[Contrast]:
    first, last = group.generations[0], group.last
    if first > 0 or last == 0 or group.kind == "plain":
        return []
    tested = last == group.planned[-1]
    return [_contrast(group, last, group, first, measure, tested=tested) for measure in TESTED]


def _contrast(
    group: Group, generation: int, baseline: Group, baseline_generation: int, measure: str, *, tested: bool
) -> Contrast:
    difference = difference_of(group.values(measure, generation), baseline.values(measure, baseline_generation))
    ensemble = measure.startswith("ensemble")
    same = group is not baseline and _same_nodes(group, baseline, 0 if ensemble else generation, generation)
    # The ensemble of generation 0 is the network itself.
    tested = tested and measure in TESTED and difference is not None and not (ensemble and generation == 0)
    return Contrast(group, baseline, generation, baseline_generation, measure, difference, same, tested)


def _same_nodes(group: Group, baseline: Group, first: int, last: int) -> bool:
    """Whether the networks of the generations first..last are the same ones, under every seed that both have."""
    seeds = [seed for seed in group.nodes(last) if seed in baseline.nodes(last)]
    pairs = [(group.nodes(g).get(seed), baseline.nodes(g).get(seed)) for g in range(first, last + 1) for seed in seeds]
    return bool(pairs) and all(own is not None and own == other for own, other in pairs)


def _tested(contrasts: Sequence[Contrast]) -> list[Contrast]:
    """Marks those that are beyond noise. What has no p, as of a single pair, counts as a test that was not passed."""
    tested = [contrast for contrast in contrasts if contrast.tested]
    p_values = [1.0 if (d := c.difference) is None or d.p is None else d.p for c in tested]
    apart = {id(contrast): found for contrast, found in zip(tested, told_apart(p_values), strict=True)}
    return [replace(contrast, apart=apart.get(id(contrast), False)) for contrast in contrasts]
