"""Train, validation and test: stratified by class, a pure function of the labels and a seed (design, section 5)."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from bench.config import UserError
from bench.datasets.draws import SUBSET, VALIDATION, Indices, permutation
from bench.datasets.raw import Request, Split


def shares(counts: Indices, total: int) -> Indices:
    """``total`` seats for classes of these sizes: proportional, exact in sum, by largest remainder.

    Whole numbers throughout, ties to the lower class: no rounding depends on the machine.
    """
    seats, remainders = np.divmod(counts * total, counts.sum())
    left = total - int(seats.sum())
    seats[np.argsort(-remainders, kind="stable")[:left]] += 1
    return seats


def take(labels: Indices, total: int, *words: int) -> Indices:
    """Ascending positions of ``total`` examples, drawn so that the shares of the classes are kept."""
    order = permutation(len(labels), *words)
    seats = shares(np.bincount(labels), total)
    chosen = [order[labels[order] == c][:seat] for c, seat in enumerate(seats)]
    return np.sort(np.concatenate(chosen))


def cut(labels: Mapping[str, Indices], request: Request) -> dict[Split, tuple[str, Indices]]:
    """For each split: the part of the raw data that it comes from, and the positions in that part.

    ``labels`` has the parts train, test and perhaps val. Without val, validation is cut from train by
    ``split_seed``; ``train_examples`` then limits what is left of train. Test is the part test, whole.

    Errors: UserError where a split would be empty, or train is smaller than ``train_examples``.
    """
    train = np.arange(len(labels["train"]))
    if "val" in labels:
        val = ("val", np.arange(len(labels["val"])))
    else:
        positions = _validation(labels["train"], request)
        val = ("train", positions)
        train = np.setdiff1d(train, positions, assume_unique=True)
    train = _limit(train, labels["train"], request)
    return {"train": ("train", train), "val": val, "test": ("test", np.arange(len(labels["test"])))}


def _validation(labels: Indices, request: Request) -> Indices:
    size = round(request.val_fraction * len(labels))
    if not 0 < size < len(labels):
        raise UserError(
            f"{request.name}: val_fraction = {request.val_fraction} of {len(labels)} training images leaves one of "
            "training and validation empty; change val_fraction."
        )
    return take(labels, size, request.split_seed, VALIDATION)


def _limit(train: Indices, labels: Indices, request: Request) -> Indices:
    wanted = request.train_examples
    if wanted is None:
        return train
    if wanted > len(train):
        raise UserError(
            f"{request.name}: train_examples = {wanted}, but training has {len(train)} images; lower train_examples."
        )
    return train[take(labels[train], wanted, request.split_seed, SUBSET)]
