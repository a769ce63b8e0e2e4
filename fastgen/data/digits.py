"""scikit-learn's 1,797 scanned digits of 8x8 pixels: real images that need no download.

Source: Alpaydin and Kaynak, "Optical recognition of handwritten digits", UCI, 1998 (its test set).
"""

from __future__ import annotations

import numpy as np

from fastgen.data.split import Split
from fastgen.errors import UserError
from fastgen.extras import install_line

# scikit-learn ships no split: of each class, every fifth image in file order is for testing.
TEST_EVERY = 5
FULL_INK = 16


def read_digits() -> tuple[Split, Split, tuple[str, ...]]:
    """Reads the digits.

    Returns:
        training split, test split, names of the classes.

    Raises:
        UserError: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(f"data.dataset = digits needs scikit-learn: {install_line('scikit-learn')}") from None
    digits = load_digits()
    images_NHWC = np.round(digits.images * (255 / FULL_INK)).astype(np.uint8)[..., None]
    labels = digits.target.astype(np.int64)
    test = np.zeros(len(labels), bool)
    for label in range(10):
        test[np.flatnonzero(labels == label)[TEST_EVERY - 1 :: TEST_EVERY]] = True
    whole = Split(images_NHWC, labels, np.arange(len(labels), dtype=np.int64))
    return whole.at(np.flatnonzero(~test)), whole.at(np.flatnonzero(test)), tuple("0123456789")
