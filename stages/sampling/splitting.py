"""Splitting bins into train, validation and test, in whole sibling groups."""

from collections import Counter, defaultdict
from collections.abc import Iterable

import pandas as pd

from stages.runtime import paths
from stages.runtime.errors import UserError
from stages.runtime.params import Split
from stages.sampling.lists import read_list, refuse_unknown, some
from stages.sampling.order import shuffled

SETS = ("train", "validation", "test")
#: For each group, the number of bins with each quantity.
Contents = dict[str, dict[int, int]]


def split(bins: pd.DataFrame, unusable: set[str], params: Split) -> pd.DataFrame:
    """A row per chosen bin: id, set ("train", "validation" or "test") and group, sorted by id.

    `bins` has id, quantity and group. `unusable` bins are skipped.
    """
    usable = bins[~bins["id"].isin(unusable)].sort_values("id")
    if params.file is None:
        sets = split_by_seed(usable, len(bins), params)
    else:
        sets = listed_sets(usable, bins["id"], params.file, params)
    return usable.assign(set=sets).loc[sets.notna(), ["id", "set", "group"]]


def split_by_seed(bins: pd.DataFrame, sampled: int, params: Split) -> "pd.Series[str]":
    """The set of each bin, chosen by seed; missing for bins in no set.

    Each set has the number of bins in `params`, or as many below it as whole groups allow, and the
    quantities in the proportions of all. If so many of the `sampled` bins are unusable that too few
    remain, train has the rest.
    """
    sizes = f"split.train {params.train}, validation {params.validation} and test {params.test}"
    if params.train + params.validation + params.test > sampled:
        raise UserError(
            f"{sizes} are more than the {sampled} bins of data/subset.parquet: lower them, or"
            " choose more bins with subset.bins or subset.ids"
        )
    if params.validation + params.test >= len(bins):
        raise UserError(f"{sizes} leave nothing to train: only {len(bins)} bins are usable")
    labels = bins["group"] if params.by == "group" else bins["id"]
    contents = contents_of(labels, bins["quantity"])
    counts = Counter(bins["quantity"])
    order = shuffled(contents, "split", params.seed)
    test = choose_groups(order, contents, counts, params.test, "split.test")
    others = {label: contents[label] for label in order if label not in test}
    validation = choose_validation(others, counts, params)
    rest = [label for label in others if label not in validation]
    size = min(params.train, count_bins(rest, contents))
    train = choose_groups(rest, contents, counts, size, "split.train")
    names = dict.fromkeys(train, "train") | dict.fromkeys(test, "test")
    names |= dict.fromkeys(validation, "validation")
    return labels.map(names)


def listed_sets(
    bins: pd.DataFrame, ids: Iterable[str], name: str, params: Split
) -> "pd.Series[str]":
    """The set of each bin in the file lists/`name`; missing for bins that it does not list.

    If the file has no validation set, `params.validation` bins of train become one, in whole
    sibling groups. `ids` includes unusable bins, which the file may list.
    """
    columns = read_list(name, "split.file", ["id", "set"])
    listed = dict(zip(columns["id"], columns["set"], strict=True))
    if unknown := sorted(set(listed.values()) - set(SETS)):
        raise UserError(f"{paths.LISTS / name} has the sets {some(unknown)}: use {', '.join(SETS)}")
    refuse_unknown(name, listed, ids, f"{paths.SUBSET} (take this file's bins by subset.ids)")
    sets = bins["id"].map(listed)
    shared = "validation" not in listed.values()
    for needed in ("train", "test") if shared else SETS:
        if not (sets == needed).any():
            raise UserError(f"{paths.LISTS / name} has no usable bin in the set {needed}")
    if shared:
        train = bins[sets == "train"]
        contents = contents_of(train["group"], train["quantity"])
        validation = choose_validation(contents, Counter(train["quantity"]), params)
        chosen = (sets == "train") & bins["group"].isin(validation)
        sets = sets.mask(chosen, "validation")
    return sets


def contents_of(labels: "pd.Series[str]", quantities: "pd.Series[int]") -> Contents:
    # Plain dicts, because hundreds of thousands of Counters take seconds.
    contents: Contents = defaultdict(dict)
    for label, quantity in zip(labels.tolist(), quantities.tolist(), strict=True):
        held = contents[label]
        held[quantity] = held.get(quantity, 0) + 1
    return contents


def choose_validation(others: Contents, counts: Counter[int], params: Split) -> set[str]:
    """The validation groups, chosen from all groups that are not in test."""
    # In an order of its own, so that it is not a neighbour of test in theirs.
    order = shuffled(others, "validation", params.seed)
    validation = choose_groups(order, others, counts, params.validation, "split.validation")
    if validation == others.keys():
        raise UserError(f"split.validation {params.validation} leaves no sibling group to train")
    return validation


def choose_groups(
    order: list[str],
    contents: Contents,
    counts: Counter[int],
    size: int,
    key: str,
) -> set[str]:
    """Choose groups, in `order`, for a set of `size` bins. Raises UserError if none fits."""
    chosen = take(order, contents, apportion(size, counts))
    if not chosen:
        raise UserError(f"{key}: no remaining sibling group fits into {size} bins")
    return chosen


def count_bins(labels: Iterable[str], contents: Contents) -> int:
    return sum(sum(contents[label].values()) for label in labels)


def count_leaks(sets: pd.DataFrame) -> dict[str, int]:
    """How many test bins there are, and how many have a sibling in train or validation."""
    tested = sets["set"] == "test"
    seen = set(sets.loc[~tested, "group"])
    leaking = sum(group in seen for group in sets.loc[tested, "group"])
    return {"test_bins": int(tested.sum()), "with_sibling_seen": leaking}


def apportion(size: int, counts: Counter[int]) -> Counter[int]:
    """Divide `size` in the proportions of `counts`, by largest remainder."""
    total = counts.total()
    parts = Counter({quantity: size * count // total for quantity, count in counts.items()})
    by_remainder = sorted(
        counts, key=lambda quantity: (-(size * counts[quantity] % total), quantity)
    )
    parts.update(by_remainder[: size - parts.total()])
    return parts


def take(order: list[str], contents: Contents, wanted: Counter[int]) -> set[str]:
    """Groups, in order, with `wanted` bins of each quantity, or as near as whole groups allow.

    First, every group that fits into what is still wanted of its quantities; then, if gaps remain,
    any group that fits into their sum.
    """
    missing = dict(wanted)
    taken = set()
    for label in order:
        held = contents[label]
        if all(count <= missing.get(quantity, 0) for quantity, count in held.items()):
            for quantity, count in held.items():
                missing[quantity] -= count
            taken.add(label)
    gap = sum(missing.values())
    for label in order:
        if not gap:
            break
        size = sum(contents[label].values())
        if label not in taken and size <= gap:
            gap -= size
            taken.add(label)
    return taken
