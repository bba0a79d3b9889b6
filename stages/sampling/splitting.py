"""Dividing bins into train, validation and test, whole sibling groups at a time."""

from collections import Counter, defaultdict
from collections.abc import Iterable

import pandas as pd

from stages.runtime import paths
from stages.runtime.errors import UserError
from stages.runtime.params import Split
from stages.sampling.lists import read_list, refuse_unknown, some
from stages.sampling.order import shuffled

SETS = ("train", "validation", "test")
#: Of each group the number of bins with each quantity.
Contents = dict[str, dict[int, int]]


def split(bins: pd.DataFrame, unusable: set[str], params: Split) -> pd.DataFrame:
    """A row per chosen bin: id, set ("train", "validation" or "test") and group, sorted by id.

    `bins` has id, quantity and group. Bins that are `unusable` are passed over.
    """
    usable = bins[~bins["id"].isin(unusable)].sort_values("id")
    if params.file is None:
        sets = split_by_seed(usable, len(bins), params)
    else:
        sets = listed_sets(usable, bins["id"], params.file, params)
    return usable.assign(set=sets).loc[sets.notna(), ["id", "set", "group"]]


def split_by_seed(bins: pd.DataFrame, sampled: int, params: Split) -> "pd.Series[str]":
    """The set of each bin, sampled by seed; missing for those in none.

    Test has `params.test` bins (as near below it as whole groups allow). Train and validation have
    `params.train` together, of which `params.validation` is validation's share. Each set has the
    quantities in the proportions of all. Where so many of the `sampled` bins are unusable that too
    few remain for that, train has all the rest.
    """
    if params.train + params.test > sampled:
        raise UserError(
            f"split.train {params.train} and split.test {params.test} are more than the"
            f" {sampled} bins of data/subset.parquet: lower them, or have more bins there by"
            " subset.bins or subset.ids"
        )
    if params.test >= len(bins):
        raise UserError(
            f"split.test {params.test} leaves nothing to train: {len(bins)} bins remain"
        )
    labels = bins["group"] if params.by == "group" else bins["id"]
    contents = contents_of(labels, bins["quantity"])
    counts = Counter(bins["quantity"])
    order = shuffled(contents, "split", params.seed)
    test = choose_groups(order, contents, counts, params.test, "split.test")
    rest = [label for label in order if label not in test]
    left = count_bins(rest, contents)
    train = choose_groups(rest, contents, counts, min(params.train, left), "split.train")
    validation = choose_validation({label: contents[label] for label in train}, counts, params)
    names = dict.fromkeys(test, "test") | dict.fromkeys(train, "train")
    names |= dict.fromkeys(validation, "validation")
    return labels.map(names)


def listed_sets(
    bins: pd.DataFrame, ids: Iterable[str], name: str, params: Split
) -> "pd.Series[str]":
    """The set of each bin as the file lists/`name` has it; missing for those that it doesn't list.

    Without validation in the file, `params.validation` takes its share of train, whole sibling
    groups at a time. `ids` are those of the unusable bins too, which the file may list.
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
    # Dicts, as hundreds of thousands of Counters take seconds.
    contents: Contents = defaultdict(dict)
    for label, quantity in zip(labels.tolist(), quantities.tolist(), strict=True):
        held = contents[label]
        held[quantity] = held.get(quantity, 0) + 1
    return contents


def choose_validation(train: Contents, counts: Counter[int], params: Split) -> set[str]:
    """The groups of train that validate."""
    # In an order of its own: another share moves bins between train and validation only.
    order = shuffled(train, "validation", params.seed)
    size = round(params.validation * count_bins(train, train))
    validation = choose_groups(order, train, counts, size, "split.validation")
    if validation == train.keys():
        raise UserError(f"split.validation {params.validation:g} leaves no sibling group to train")
    return validation


def choose_groups(
    order: list[str],
    contents: Contents,
    counts: Counter[int],
    size: int,
    key: str,
) -> set[str]:
    """The groups, of those in `order`, for a set of `size` bins. Raises UserError without any."""
    sampled = take(order, contents, apportion(size, counts))
    if not sampled:
        raise UserError(f"{key}: no sibling group that is left fits into {size} bins")
    return sampled


def count_bins(labels: Iterable[str], contents: Contents) -> int:
    return sum(sum(contents[label].values()) for label in labels)


def count_leaks(sets: pd.DataFrame) -> dict[str, int]:
    """How many bins of test have a sibling among those that are trained or chosen with."""
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
    """Groups, in order, that hold `wanted` bins of each quantity, as near as whole groups allow.

    First every group that fits into what is still wanted of its quantities; then, where that
    left gaps, whatever fits into their sum.
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
