"""Divide the shards of a store among workers."""

from __future__ import annotations

import itertools

import numpy as np

from pipeline.labelling.stream import Unit


def unfinished_units(finished: np.ndarray, views_per_decode: int, worker: tuple[int, int], first_view: int) -> list[Unit]:
    """This worker's share of the unfinished shards, the views that share its decodes together; early views first, so that they become
    trainable first. Whose share a unit is depends on its place alone, not on what is done already."""
    units: dict[tuple[int, int], Unit] = {}
    for view, shard in places_of_share(~finished, views_per_decode, worker, first_view):
        units.setdefault((view // views_per_decode, shard), Unit([], shard)).views.append(view)
    return list(units.values())


def places_of_share(wanted: np.ndarray, views_per_decode: int, worker: tuple[int, int], first_view: int) -> list[tuple[int, int]]:
    """(view, shard) of those places of ``wanted``, bool [views, shards], that are this worker's, in the order of the work."""
    views, shards = wanted.shape
    blocks = itertools.product(range(0, views, views_per_decode), range(shards))
    return [
        (view, shard)
        for place, (first, shard) in enumerate(blocks)
        if place % worker[1] == worker[0]
        for view in range(first, min(first + views_per_decode, views))
        if wanted[view, shard] and view >= first_view
    ]
