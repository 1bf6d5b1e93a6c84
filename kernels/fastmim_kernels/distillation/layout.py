"""Which student row is compared with which teacher row: what every implementation of the op must agree on."""

from __future__ import annotations


def teachers_of(view: int, teachers: int, own: bool) -> list[int]:
    """Teacher views with which a student view is compared: all or, without ``own``, all but that of its index."""
    return [u for u in range(teachers) if own or u != view]


def mean_weight(views: int, teachers: int, groups: int, own: bool) -> float:
    """1 / number of pairs of rows: the weight of every student row where none is given; 0 without a pair."""
    pairs = groups * sum(len(teachers_of(v, teachers, own)) for v in range(views))
    return 1 / pairs if pairs else 0.0
