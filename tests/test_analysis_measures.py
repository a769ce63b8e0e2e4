"""analysis_columns.py and analysis_measures.py against plain Python and numpy in fp64, written from the definitions."""

import math
from dataclasses import astuple, fields

import numpy as np
import pytest
import torch

from fastgen.analysis_columns import evaluation_columns, first_class, joined, training_columns
from fastgen.analysis_measures import (
    PERCENTILES,
    agreement,
    error_percent,
    in_blocks,
    others_in_group,
    others_in_group_by_chance,
    reliability,
    second_best_counts,
    secondary_mass,
    shares_of_rows,
    sorted_scores,
    top5_in_group,
)
from fastgen.measuring import Tally, measure_ensemble

# 303 steps between the samples: no percentile falls on one of them.
CLASSES, SAMPLES = 20, 304
# A softmax of C fp32 logits: C + 8 roundings of 2^-24 each, relative, and |z| 2^-24 of the logits' differences (< 20).
UNIT = (CLASSES + 8 + 20) * 2.0**-24


def drawn(seed=0, classes=CLASSES, samples=SAMPLES, scale=2.0, ties=False):
    """Logits and labels; half of the labels rank first."""
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(samples, classes, generator=generator, dtype=torch.float64) * scale).float()
    if ties:
        logits = logits.round().clamp(-1, 1)
    labels = torch.randint(0, classes, (samples,), generator=generator)
    return logits, torch.where(torch.arange(samples) % 2 == 0, first_class(logits), labels)


def softmax_f64(logits):
    z = logits.double().numpy()
    exponentials = np.exp(z - z.max(1, keepdims=True))
    return exponentials / exponentials.sum(1, keepdims=True)


def ranking(row):
    """Classes of one row, the highest-scored first; among equal scores the lowest class first."""
    return sorted(range(len(row)), key=lambda c: (-row[c], c))


@pytest.fixture
def groups():
    # Of unequal sizes: 4, 4, 4, 4, 4 would hide a mistake in the chance value.
    return torch.tensor([0] * 7 + [1] * 1 + [2] * 4 + [3] * 4 + [4] * 4)


@pytest.mark.parametrize("ties", [False, True])
def test_training_columns_equal_the_definitions(groups, ties):
    logits, labels = drawn(ties=ties)
    columns, p = training_columns(logits, labels, groups), softmax_f64(logits)
    for n, (row, y) in enumerate(zip(logits.tolist(), labels.tolist(), strict=True)):
        order = ranking(row)
        assert columns.rank_N[n] == order.index(y)
        assert columns.others_NJ[n].tolist() == [c for c in order if c != y][:5]
        np.testing.assert_allclose(columns.top_NR[n].numpy(), np.sort(p[n])[::-1][:10], rtol=UNIT)
        assert columns.label_p_N[n].item() == pytest.approx(p[n, y], rel=UNIT)
        kin = sum(p[n, c] for c in range(CLASSES) if c != y and groups[c] == groups[y])
        assert columns.kin_p_N[n].item() == pytest.approx(kin, rel=UNIT + 7 * 2.0**-24, abs=1e-12)


def test_few_classes_have_few_columns():
    logits, labels = drawn(classes=3)
    columns = training_columns(logits, labels, None)
    assert columns.top_NR.shape == (SAMPLES, 3)
    assert columns.others_NJ.shape == (SAMPLES, 2)
    assert (columns.others_NJ != labels[:, None]).all()
    assert (columns.kin_p_N == 0).all()


@pytest.mark.parametrize("size", [1, 7, 64, 300, 1000])
def test_columns_do_not_depend_on_how_a_set_is_cut(groups, size):
    members = [drawn(seed)[0] for seed in range(3)]
    labels = drawn(0)[1]
    whole = [training_columns(members[0], labels, groups), evaluation_columns(members, labels)]
    cuts = [slice(begin, begin + size) for begin in range(0, SAMPLES, size)]
    parts = [
        joined([training_columns(members[0][cut], labels[cut], groups) for cut in cuts]),
        joined([evaluation_columns([z[cut] for z in members], labels[cut]) for cut in cuts]),
    ]
    for one, other in zip(whole, parts, strict=True):
        for name, a, b in zip([f.name for f in fields(one)], astuple(one), astuple(other), strict=True):
            assert torch.equal(a, b), name


def test_first_class_is_the_lowest_among_equals():
    scores = torch.tensor([[0.0, 2.0, 2.0], [1.0, 1.0, 1.0], [-1.0, -2.0, 0.0]])
    assert first_class(scores).tolist() == [1, 0, 2]


def test_evaluation_columns_equal_the_definitions():
    members = [drawn(seed, scale=scale)[0] for seed, scale in ((0, 1.0), (1, 2.0), (2, 3.0))]
    labels = drawn(0)[1]
    columns, p = evaluation_columns(members, labels), [softmax_f64(z) for z in members]
    predictors = [*p, sum(p) / 3]
    for n, y in enumerate(labels.tolist()):
        assert columns.first_NM[n].tolist() == [int(row[n].argmax()) for row in p]
        for a in range(3):
            for b in range(3):
                expected = sum(p[a][n, c] * math.log(p[a][n, c] / p[b][n, c]) for c in range(CLASSES))
                assert columns.kl_NMM[n, a, b].item() == pytest.approx(expected, rel=1e-9, abs=1e-14)
        assert columns.hit_NE[n].tolist() == [row[n].argmax() == y for row in predictors]
        np.testing.assert_allclose(columns.confidence_NE[n], [row[n].max() for row in predictors], rtol=UNIT)
        np.testing.assert_allclose(columns.nll_NE[n], [-math.log(row[n, y]) for row in predictors], atol=20 * UNIT)
        first = [sum(p[:count])[n].argmax() == y for count in (1, 2, 3)]
        last = [sum(p[-count:])[n].argmax() == y for count in (1, 2, 3)]
        assert columns.first_members_hit_NM[n].tolist() == first
        assert columns.last_members_hit_NM[n].tolist() == last
    assert (columns.kl_NMM.diagonal(dim1=1, dim2=2) == 0).all()
    # The test could not tell the first members from the last ones otherwise.
    assert not torch.equal(columns.first_members_hit_NM, columns.last_members_hit_NM)


def test_a_single_network_has_no_ensemble_beside_it():
    logits, labels = drawn()
    columns = evaluation_columns([logits], labels)
    assert columns.hit_NE.shape == (SAMPLES, 1)
    assert torch.equal(columns.first_members_hit_NM, columns.hit_NE)


def test_kl_of_near_equals_is_not_lost_in_rounding():
    """KL of p and p + d is near sum d^2 / (2 p), here about 5e-11: five hundred times less than fp32 tells of ln p."""
    logits, labels = drawn(scale=1.0)
    moved = logits.clone()
    moved[:, 0] += 2.0**-14
    p0 = torch.from_numpy(softmax_f64(logits))[:, 0]
    moved_by = (moved[:, 0].double() - logits[:, 0].double()).square()
    columns = evaluation_columns([logits, moved], labels)
    np.testing.assert_allclose(columns.kl_NMM[:, 0, 1], moved_by * p0 * (1 - p0) / 2, rtol=1e-3)


def test_errors_of_ensembles_are_those_of_a_run_s_results():
    members = [drawn(seed, samples=200)[0] for seed in range(3)]
    labels = drawn(0, samples=200)[1]
    columns = evaluation_columns(members, labels)
    p = [z.log_softmax(1).exp() for z in members]
    for count in (1, 2, 3):
        error = error_percent(columns.first_members_hit_NM[:, count - 1])
        assert error == pytest.approx(measure_ensemble(p[:count], labels, 5).top1_error, rel=1e-12)


def test_sorted_scores_equal_numpy_s():
    logits, labels = drawn()
    means, percentiles = sorted_scores(training_columns(logits, labels, None).top_NR)
    ordered = -np.sort(-softmax_f64(logits), axis=1)[:, :10]
    np.testing.assert_allclose(means, ordered.mean(0), rtol=UNIT)
    np.testing.assert_allclose(percentiles, np.percentile(ordered, PERCENTILES, axis=0).T, rtol=UNIT)
    assert secondary_mass(torch.from_numpy(ordered)) == pytest.approx(ordered[:, 1:5].sum(1).mean(), rel=1e-12)


def test_percentiles_of_one_image_are_its_scores():
    means, percentiles = sorted_scores(torch.tensor([[0.75, 0.25]]))
    assert means == [0.75, 0.25]
    assert percentiles == [[0.75] * 5, [0.25] * 5]


def test_second_best_counts_the_highest_scored_class_other_than_the_label():
    logits, labels = drawn()
    expected = np.zeros((CLASSES, CLASSES), int)
    for row, y in zip(logits.tolist(), labels.tolist(), strict=True):
        expected[y, next(c for c in ranking(row) if c != y)] += 1
    counts = second_best_counts(labels, training_columns(logits, labels, None).others_NJ, CLASSES)
    assert counts.tolist() == expected.tolist()
    assert (counts.diagonal() == 0).all()
    assert counts.sum(1).tolist() == torch.bincount(labels, minlength=CLASSES).tolist()


def test_an_image_that_the_network_gets_wrong_counts_its_first_class():
    logits, labels = torch.tensor([[1.0, 3.0, 2.0]]), torch.tensor([2])
    counts = second_best_counts(labels, training_columns(logits, labels, None).others_NJ, 3)
    assert counts.tolist() == [[0, 0, 0], [0, 0, 0], [0, 1, 0]]


def test_shares_of_an_absent_class_are_zeros():
    assert shares_of_rows(torch.tensor([[0, 3], [0, 0]])).tolist() == [[0, 1], [0, 0]]


@pytest.mark.parametrize(("classes", "per_cell"), [(6, 1), (6, 2), (7, 3), (5, 8)])
def test_blocks_are_sums_of_neighbouring_classes(classes, per_cell):
    counts = torch.arange(classes * classes).reshape(classes, classes)
    cells = math.ceil(classes / per_cell)
    expected = np.zeros((cells, cells), int)
    for y in range(classes):
        for j in range(classes):
            expected[y // per_cell, j // per_cell] += int(counts[y, j])
    assert in_blocks(counts, per_cell).tolist() == expected.tolist()


def test_classes_in_the_label_s_group_equal_the_definitions(groups):
    logits, labels = drawn(scale=1.0)
    columns = training_columns(logits, labels, groups)
    others, top5 = [], []
    for row, y in zip(logits.tolist(), labels.tolist(), strict=True):
        order = ranking(row)
        others.append(sum(bool(groups[c] == groups[y]) for c in [c for c in order if c != y][:4]))
        top5.append(sum(bool(groups[c] == groups[y]) for c in order[:5]))
    assert others_in_group(labels, columns.others_NJ, groups) == pytest.approx(np.mean(others), rel=1e-12)
    found = top5_in_group(labels, columns.rank_N, columns.others_NJ, groups)
    assert found == pytest.approx(np.mean(top5), rel=1e-12)
    # Labels that rank sixth or later are among them: there the five are all others.
    assert (columns.rank_N >= 5).any()


def test_chance_is_4_times_4_of_99_for_cifar100():
    labels, groups = torch.arange(100), torch.arange(100) // 5
    assert others_in_group_by_chance(labels, groups) == pytest.approx(16 / 99, rel=1e-12)


def test_chance_is_what_random_rankings_give(groups):
    """20,000 images: the mean of numbers up to 4 with deviation below 1 is known within 5 / sqrt(20,000) = 0.035."""
    logits, labels = drawn(samples=20_000)
    labels = torch.randint(0, CLASSES, labels.shape, generator=torch.Generator().manual_seed(5))
    columns = training_columns(logits, labels, groups)
    chance = others_in_group_by_chance(labels, groups)
    assert others_in_group(labels, columns.others_NJ, groups) == pytest.approx(chance, abs=0.035)


def test_reliability_equals_the_definition():
    logits, labels = drawn(samples=1000)
    p = softmax_f64(logits)
    confidence, hit = torch.from_numpy(p.max(1)), torch.from_numpy(p.argmax(1)) == labels
    found = reliability(confidence, hit)
    gaps = 0.0
    for b in range(15):
        # No drawn confidence lies on an edge of a bin.
        within = (p.max(1) >= b / 15) & (p.max(1) < (b + 1) / 15)
        assert found.images[b] == within.sum()
        if not within.any():
            assert (found.confidence[b], found.accuracy[b]) == (None, None)
            continue
        assert found.confidence[b] == pytest.approx(p.max(1)[within].mean(), rel=1e-12)
        assert found.accuracy[b] == pytest.approx(hit.numpy()[within].mean(), rel=1e-12)
        gaps += abs(found.accuracy[b] - found.confidence[b]) * within.mean()
    assert found.ece == pytest.approx(gaps, rel=1e-12)
    assert sum(found.images) == 1000


def test_calibration_is_that_of_the_evaluation():
    logits, labels = drawn(samples=1000)
    tally = Tally(5)
    tally.add(logits, logits.log_softmax(1), labels)
    told, columns = tally.read(), evaluation_columns([logits], labels)
    found = reliability(columns.confidence_NE[:, 0], columns.hit_NE[:, 0])
    assert found.ece == pytest.approx(told.ece, rel=1e-12)
    assert columns.nll_NE.mean().item() == pytest.approx(told.nll, rel=1e-12)
    assert error_percent(columns.hit_NE[:, 0]) == pytest.approx(told.top1_error, rel=1e-12)


def test_a_certain_network_falls_in_the_last_bin():
    found = reliability(torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([True, False]))
    assert found.images == (0,) * 14 + (2,)
    assert found.ece == 0.5


def test_agreement_counts_equal_first_classes():
    first = torch.tensor([[0, 0, 1], [1, 1, 1], [2, 0, 1], [3, 3, 0]])
    assert agreement(first).tolist() == [[1, 0.75, 0.25], [0.75, 1, 0.25], [0.25, 0.25, 1]]
