"""Which classes of a data set are of one kind: CIFAR-100's 20 coarse groups, stated, as few formats keep them.

Source: Krizhevsky, "Learning multiple layers of features from tiny images", 2009; the coarse label of every record of
the official files says the same (`tests/test_groups.py` compares them where the files are).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fastgen.data.split import Int64

# Groups and their classes in alphabetical order, as the official files number them.
CIFAR100 = {
    "aquatic_mammals": ("beaver", "dolphin", "otter", "seal", "whale"),
    "fish": ("aquarium_fish", "flatfish", "ray", "shark", "trout"),
    "flowers": ("orchid", "poppy", "rose", "sunflower", "tulip"),
    "food_containers": ("bottle", "bowl", "can", "cup", "plate"),
    "fruit_and_vegetables": ("apple", "mushroom", "orange", "pear", "sweet_pepper"),
    "household_electrical_devices": ("clock", "keyboard", "lamp", "telephone", "television"),
    "household_furniture": ("bed", "chair", "couch", "table", "wardrobe"),
    "insects": ("bee", "beetle", "butterfly", "caterpillar", "cockroach"),
    "large_carnivores": ("bear", "leopard", "lion", "tiger", "wolf"),
    "large_man-made_outdoor_things": ("bridge", "castle", "house", "road", "skyscraper"),
    "large_natural_outdoor_scenes": ("cloud", "forest", "mountain", "plain", "sea"),
    "large_omnivores_and_herbivores": ("camel", "cattle", "chimpanzee", "elephant", "kangaroo"),
    "medium_mammals": ("fox", "porcupine", "possum", "raccoon", "skunk"),
    "non-insect_invertebrates": ("crab", "lobster", "snail", "spider", "worm"),
    "people": ("baby", "boy", "girl", "man", "woman"),
    "reptiles": ("crocodile", "dinosaur", "lizard", "snake", "turtle"),
    "small_mammals": ("hamster", "mouse", "rabbit", "shrew", "squirrel"),
    "trees": ("maple_tree", "oak_tree", "palm_tree", "pine_tree", "willow_tree"),
    "vehicles_1": ("bicycle", "bus", "motorcycle", "pickup_truck", "train"),
    "vehicles_2": ("lawn_mower", "rocket", "streetcar", "tank", "tractor"),
}


@dataclass(frozen=True)
class Groups:
    """Kinds of classes.

    Attributes:
        names: of the groups.
        of_class: int64 (C,), number of each class's group.
    """

    names: tuple[str, ...]
    of_class: Int64

    @property
    def order(self) -> Int64:
        """int64 (C,), the classes sorted by group, and by number within a group."""
        return np.argsort(self.of_class, kind="stable")


def groups_of(dataset: str) -> Groups | None:
    """The groups of a data set's classes; None: none are known."""
    if dataset != "cifar100":
        return None
    # A class's label is its place in the alphabet.
    classes = sorted(name for members in CIFAR100.values() for name in members)
    kind = {name: number for number, members in enumerate(CIFAR100.values()) for name in members}
    return Groups(tuple(CIFAR100), np.array([kind[name] for name in classes], np.int64))
