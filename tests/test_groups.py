"""data/groups.py: CIFAR-100's 20 groups, by themselves and beside the official files."""

import numpy as np
import pytest

from fastgen.data.facts import DATASETS
from fastgen.data.groups import CIFAR100, groups_of


def test_twenty_groups_of_five_classes_hold_each_class_once():
    classes = [name for members in CIFAR100.values() for name in members]
    assert len(CIFAR100) == 20
    assert {len(members) for members in CIFAR100.values()} == {5}
    assert len(set(classes)) == len(classes) == DATASETS["cifar100"].classes
    # As the official files number them; of a class, the label is its place in the alphabet.
    assert list(CIFAR100) == sorted(CIFAR100)
    assert all(list(members) == sorted(members) for members in CIFAR100.values())


def test_a_class_s_group_is_found_by_its_place_in_the_alphabet():
    found = groups_of("cifar100")
    # Known from the official files: apple, aquarium_fish and baby are the classes 0, 1, 2; worm is 99.
    names = [found.names[found.of_class[label]] for label in (0, 1, 2, 99)]
    assert names == ["fruit_and_vegetables", "fish", "people", "non-insect_invertebrates"]
    assert np.bincount(found.of_class).tolist() == [5] * 20


def test_classes_in_order_of_their_groups():
    found = groups_of("cifar100")
    assert sorted(found.order.tolist()) == list(range(100))
    assert found.of_class[found.order].tolist() == [number for number in range(20) for _ in range(5)]
    # aquatic_mammals: beaver, dolphin, otter, seal, whale.
    assert found.order[:5].tolist() == [4, 30, 55, 72, 95]


@pytest.mark.parametrize("dataset", sorted({*DATASETS} - {"cifar100"}))
def test_other_data_sets_have_no_groups(dataset):
    assert groups_of(dataset) is None


@pytest.mark.cifar100
def test_groups_are_the_coarse_labels_of_the_official_files(cifar100_root):
    found = groups_of("cifar100")
    folder = cifar100_root / "cifar-100-binary"
    if not folder.is_dir():
        pytest.skip("the binary layout is not there: it alone holds both labels beside each other")
    for name in ("train.bin", "test.bin"):
        records = np.fromfile(folder / name, np.uint8).reshape(-1, 2 + 3072)
        assert (found.of_class[records[:, 1]] == records[:, 0]).all()
    assert (folder / "coarse_label_names.txt").read_text().split() == list(found.names)
    fine = (folder / "fine_label_names.txt").read_text().split()
    assert [fine[label] for label in found.order] == [name for members in CIFAR100.values() for name in members]
