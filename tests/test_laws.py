"""laws.py: known values of the paper, and properties of the formulas."""

import pytest

from fastgen.laws import confidence_for_eta, eta_for_confidence, ideal_confidence

# A dozen roundings of fp64 at most.
EXACT = 1e-14


def test_the_papers_confidence_asks_for_eta_four_sevenths():
    assert eta_for_confidence(0.6, 5) == pytest.approx(4 / 7, abs=EXACT)


@pytest.mark.parametrize(
    ("eta", "confidence"), [(0.5, 0.8), (4 / 7, 0.6), (0.65, 0.35 * 4 / (0.65 * 5)), (0.75, 4 / 15), (0.8, 0.2)]
)
def test_known_confidences_of_k_5(eta, confidence):
    assert confidence_for_eta(eta, 5) == pytest.approx(confidence, abs=EXACT)


def test_there_is_no_tolerance_up_to_eta_four_ninths():
    assert confidence_for_eta(0.0, 5) == 1
    assert confidence_for_eta(0.3, 5) == 1
    assert confidence_for_eta(4 / 9, 5) == pytest.approx(1, abs=EXACT)
    # u falls with slope -(K-1)/(K eta^2) = -4.05 behind the boundary.
    assert confidence_for_eta(4 / 9 + 1e-4, 5) == pytest.approx(1 - 4.05e-4, abs=1e-6)


@pytest.mark.parametrize("k", [2, 3, 5, 10, 100])
@pytest.mark.parametrize("position", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_eta_and_confidence_are_inverse(k, position):
    confidence = 1 / k + position * (1 - 1 / k)
    eta = eta_for_confidence(confidence, k)
    assert confidence_for_eta(eta, k) == pytest.approx(confidence, abs=EXACT)
    assert (k - 1) / (2 * k - 1) < eta <= (k - 1) / k + EXACT


def test_confidence_one_is_plain_cross_entropy():
    assert eta_for_confidence(1.0, 5) == 0
    assert eta_for_confidence(1, 2) == 0


@pytest.mark.parametrize(("share", "confidence"), [(1.0, 0.60), (0.0, 0.75), (0.72, 0.75 / 1.18)])
def test_confidence_at_a_share_of_the_papers_setting(share, confidence):
    assert confidence_for_eta(4 / 7, 5, share) == pytest.approx(confidence, abs=EXACT)


def test_confidence_at_a_share_is_at_most_one():
    assert confidence_for_eta(0.45, 5, 0.0) == 1


def test_patriarch_of_d_06_06_and_its_students():
    ideals = [round(ideal_confidence(0.6, 0.6, generation), 3) for generation in range(7)]
    assert ideals == [0.600, 0.760, 0.856, 0.914, 0.948, 0.969, 0.981]


@pytest.mark.parametrize(("confidence", "teacher_weight"), [(0.6, 0.7), (0.4, 0.5), (1.0, 0.5), (0.6, 0.0), (0.6, 1.0)])
def test_ideal_confidence_is_the_closed_form(confidence, teacher_weight):
    for generation in range(6):
        closed = 1 - teacher_weight**generation * (1 - confidence)
        assert ideal_confidence(confidence, teacher_weight, generation) == pytest.approx(closed, abs=EXACT)


def test_ideal_confidence_of_a_weight_for_each_student():
    weights = (0.5, 0.0, 0.25)
    expected = [0.6, 1 - 0.5 * 0.4, 1.0, 1.0]
    assert [ideal_confidence(0.6, weights, g) for g in range(4)] == pytest.approx(expected, abs=EXACT)
    assert ideal_confidence(0.6, [0.5, 0.25], 2) == pytest.approx(1 - 0.125 * 0.4, abs=EXACT)


@pytest.mark.parametrize(
    ("confidence", "k", "named"),
    [(0.6, 1, "k = 1"), (0.19, 5, "confidence = 0.19"), (1.01, 5, "confidence = 1.01"), (float("nan"), 5, "nan")],
)
def test_values_out_of_range_are_refused(confidence, k, named):
    with pytest.raises(ValueError, match=named):
        eta_for_confidence(confidence, k)


@pytest.mark.parametrize("k", [2, 3, 5, 7, 10, 49])
def test_the_lowest_confidence_is_allowed(k):
    assert eta_for_confidence(1 / k, k) == pytest.approx((k - 1) / k, abs=EXACT)
