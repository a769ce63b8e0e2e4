"""What came out, in a sentence that is no more certain than the results are, and the figures behind it."""

from __future__ import annotations

from collections.abc import Sequence

from fastgen.report.compare import Comparison, Contrast, other_settings, tested_generation
from fastgen.report.document import Span, Words, code, strong, words
from fastgen.report.groups import Group
from fastgen.report.stats import difference_text, p_text, spread_text
from fastgen.spread import spread_of

# Of more the tables tell.
MOST_TOLD, MOST_DETAILS = 3, 6


def headline(groups: Sequence[Group], comparison: Comparison) -> Words:
    """The sentence."""
    apart = [contrast for contrast in comparison.tested if contrast.apart]
    if comparison.within:
        return _within(groups, comparison.tested)
    if not comparison.tested:
        return words(_nothing_tested(groups, comparison))
    if not apart:
        return words(_nothing_apart(comparison.tested))
    return words(*_all_told(apart), ".")


def details(groups: Sequence[Group], comparison: Comparison) -> tuple[Words, ...]:
    """A line a comparison, those that the headline tells first, and how to read them."""
    tested = sorted(comparison.tested, key=lambda contrast: not contrast.apart)
    shown = [_detail(contrast) for contrast in tested[:MOST_DETAILS]]
    more = len(tested) - len(shown)
    left = [words(f"The tests of {more} more are in the tables.")] if more else []
    alone = [] if tested else [_alone(group) for group in groups[:MOST_DETAILS]]
    return (*alone, *shown, *left, *_cautions(groups, comparison))


def _nothing_tested(groups: Sequence[Group], comparison: Comparison) -> str:
    compared = [(group, comparison.baseline_of.get(group.name)) for group in groups]
    lasts = [tested_generation(group, baseline) for group, baseline in compared if baseline is not None]
    known = sorted({last for last in lasts if last is not None})
    if not known:
        return "Nothing to compare: no student stands beside a network of the baseline of its generation."
    which = f"generation {known[0]}" if len(known) == 1 else "the last generation"
    return f"Nothing to compare yet: no seed has {which} of both recipes."


def _nothing_apart(tested: Sequence[Contrast]) -> str:
    pairs = max(contrast.difference.pairs for contrast in tested if contrast.difference is not None)
    generations = {contrast.generation for contrast in tested}
    where = f"generation {min(generations)}" if len(generations) == 1 else "the last generations"
    if pairs == 1:
        return f"One seed alone has {where} of both recipes: no difference can be told from noise."
    return f"Nothing is told apart: in {where} no difference stands out from the noise of the seeds."


def _within(groups: Sequence[Group], tested: Sequence[Contrast]) -> Words:
    if not tested and len(groups) > 1:
        return words(f"{len(groups)} recipes beside each other; none is tested against another.")
    if not tested:
        best = groups[0].spread("top1_error", groups[0].last)
        text = f"{groups[0].name}, generation {groups[0].last}: {spread_text(best)} % top-1 error"
        return words(text, "; nothing is given to compare it with.")
    ends = ". No plain runs are given, so nothing is said of plain networks of that generation."
    apart = [contrast for contrast in tested if contrast.apart]
    if apart:
        return words(*_all_told(apart), ends)
    names = list(dict.fromkeys(contrast.group.name for contrast in tested))
    if len(names) == 1:
        last = tested[0].generation
        return words(f"Generation {last} of {names[0]} and its ensemble are not told apart from the patriarch", ends)
    return words(f"In none of {len(names)} recipes is the last generation told apart from its own patriarch", ends)


def _all_told(apart: Sequence[Contrast]) -> list[str | Span]:
    """A few of them, one after the other."""
    parts: list[str | Span] = []
    for contrast in apart[:MOST_TOLD]:
        parts += ["; ", *_told(contrast)] if parts else _told(contrast)
    return [*parts, f"; and {len(apart) - MOST_TOLD} more"] if len(apart) > MOST_TOLD else parts


def _told(contrast: Contrast) -> tuple[str | Span, ...]:
    """Of one that is beyond noise."""
    difference = contrast.difference
    if difference is None:
        raise ValueError("a contrast without a difference is not told apart")
    less = "fewer" if difference.mean < 0 else "more"
    whose = "of 0 to " if contrast.measure.startswith("ensemble") else ""
    what = "The ensemble" if whose else "Generation"
    where = f"{what} {whose}{contrast.generation} of {contrast.group.name} makes "
    return where, strong(f"{less} errors than {_other(contrast)}: {difference_text(difference)} points")


def _other(contrast: Contrast) -> str:
    return "its patriarch" if contrast.group is contrast.baseline else f"that of {contrast.baseline.name}"


def _detail(contrast: Contrast) -> Words:
    ensemble = contrast.measure.startswith("ensemble")
    what = f"ensemble of generations 0 to {contrast.generation}" if ensemble else f"generation {contrast.generation}"
    own, other = (spread_text(spread_of(values)) for values in contrast.paired)
    beside = (
        f"its patriarch {other} %" if contrast.group is contrast.baseline else f"{contrast.baseline.name} {other} %"
    )
    difference = contrast.difference
    pairs = 0 if difference is None else difference.pairs
    text = f"{difference_text(difference)} points"
    told = strong(text) if contrast.apart else text
    p = None if difference is None else difference.p
    means = ", as are the means" if contrast.leaves_out else ""
    ends = f" over {_counted(pairs, 'pair')}{means} ({p_text(p)}, {'' if contrast.apart else 'not '}told apart)."
    return words(f"{contrast.group.name}, {what}: {own} % top-1 error, {beside}: ", told, ends)


def _alone(group: Group) -> Words:
    own = group.spread("top1_error", group.last)
    seeds = 0 if own is None else own.count
    return words(
        f"{group.name}, generation {group.last}: {spread_text(own)} % top-1 error, "
        f"ensemble {spread_text(group.spread('ensemble_top1_error', group.last))} % "
        f"({_counted(seeds, 'seed')})."
    )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _cautions(groups: Sequence[Group], comparison: Comparison) -> list[Words]:
    lines = []
    if comparison.tested:
        count = len(comparison.tested)
        lines.append(
            words(
                "± beside a mean is the standard deviation over seeds (n − 1), beside a difference its standard error "
                f"over pairs of one seed. Told apart: paired t-test, Holm's procedure over {count} comparison"
                f"{'s' if count != 1 else ''} chosen beforehand, 5 %. It speaks of other seeds on these very images, "
                "not of other images."
            )
        )
    if comparison.within and any(contrast.group.kind == "other" for contrast in comparison.contrasts):
        lines.append(
            words(
                "A patriarch that is made to keep other classes in mind may err more for it: its students' gain over "
                "it is no gain over plain training. Give plain runs too: ",
                code("--gen.patriarch=cross_entropy --gen.confidence=1.0 --gen.teacher_weight=0.0"),
                ".",
            )
        )
    return [*lines, *_unlike(groups, comparison)]


def _unlike(groups: Sequence[Group], comparison: Comparison) -> list[Words]:
    """Recipes that differ from their baselines in more than what is compared; those alike in it in one line."""
    found: dict[tuple[str, str], list[str]] = {}
    for group in groups:
        baseline = comparison.baseline_of.get(group.name)
        others = [] if baseline is None else other_settings(group, baseline)
        if baseline is not None and others:
            found.setdefault((baseline.name, ", ".join(others)), []).append(group.name)
    return [
        words(f"{' and '.join([*names, baseline])} differ in more than the method: {others}.")
        for (baseline, others), names in found.items()
    ]
