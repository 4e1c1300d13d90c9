"""Edits of the shipped paired set with the shipped UNet, shared by slow orderings of inverters."""

from functools import cache

import numpy as np

import retour
from retour.core.progress import quiet
from retour.evaluate.metrics import mse, pixels
from retour.evaluate.suite import Suite


@cache
def net():
    """The shipped UNet."""
    return retour.load("emoji-unet")


@cache
def items(count):
    """Pairs of all kinds in turn."""
    return tuple(Suite.paired().select(limit=count))


@cache
def inversion(method, count, steps, guidance=3.0, **options):
    """The first pairs' pictures inverted with their captions."""
    pictures, prompts = zip(*[(item.image, item.source) for item in items(count)], strict=True)
    with quiet():
        return retour.invert(
            net(), pictures, prompts, method=method, steps=steps, guidance=guidance, **options
        )


def missed(made, editor="p2p", **options):
    """Background of the edits: mean square error outside of the masks, mean over the pairs."""
    pairs = items(made.images)
    with quiet():
        result = retour.edit(made, [pair.target for pair in pairs], editor=editor, **options)
    return float(
        np.mean(
            [
                mse(pixels(pair.image), pixels(result.original_size(k)), pair.mask())
                for k, pair in enumerate(pairs)
                if not pair.mask().all()
            ]
        )
    )
