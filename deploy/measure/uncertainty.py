"""How much chance there is in an accuracy: two networks saw the same images, so only those they differ on count."""

from __future__ import annotations

from math import sqrt

Z = 1.96
"""Standard deviations on either side that hold 95 % of a normal distribution."""


def share_interval(share: float, images: int) -> tuple[float, float]:
    """The 95 % interval of a share of images, in percent (Wilson, 1927).

    >>> [round(bound, 1) for bound in share_interval(95.0, 120)]
    [89.5, 97.7]
    """
    p, n = share / 100, images
    middle, spread = p + Z * Z / (2 * n), Z * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n))
    whole = 1 + Z * Z / n
    return 100 * (middle - spread) / whole, 100 * (middle + spread) / whole


def change_interval(lost: int, won: int, images: int) -> tuple[float, float]:
    """The 95 % interval of a change in accuracy, in points, when both networks saw the same images.

    Half an image is added to each of the four kinds (both right, lost, won, both wrong), so that no difference in a
    few images is not taken for none at all (Agresti and Min, 2005).

    Args:
        lost: images that the first network had right and the second has wrong.
        won: the other way round.
        images: all labelled images.

    >>> [round(bound, 2) for bound in change_interval(lost=12, won=8, images=341)]
    [-3.78, 1.45]
    """
    n = images + 2
    change, differing = (won - lost) / n, (won + lost + 1) / n
    spread = Z * sqrt((differing - change * change) / n)
    return 100 * (change - spread), 100 * (change + spread)


def change_error(lost: int, won: int, images: int) -> float:
    """The standard error of such a change, in points.

    >>> round(change_error(lost=1, won=0, images=120), 2)
    0.83
    """
    change = (won - lost) / images
    return 100 * sqrt(max(0.0, (won + lost) / images - change * change) / images)
