"""Divide the bins into train and test, siblings together: data/split.csv."""

from collections import Counter, defaultdict
from pathlib import Path

import pandas as pd

from stages.core.command import UserError, run_stage
from stages.core.draw import shuffled
from stages.core.files import write_csv
from stages.core.params import Split, load_params
from stages.core.shards import read_rejects, whole_parquet

SUBSET = Path("data/subset.parquet")
QUARANTINE = Path("data/quarantine.csv")
OUT = Path("data/split.csv")


def main() -> str:
    params = load_params().split
    with whole_parquet(SUBSET):
        bins = pd.read_parquet(SUBSET, columns=["id", "quantity", "group"])
    unusable = {reject.id for reject in read_rejects(QUARANTINE)}
    sets = split(bins, unusable, params)
    write_csv(OUT, sets)
    counts = sets["set"].value_counts()
    return f"{counts['train']} train, {counts['test']} test; {len(unusable)} unusable"


def split(bins: pd.DataFrame, unusable: set[str], params: Split) -> pd.DataFrame:
    """A row per chosen bin: id and set ("train" or "test"), sorted by id.

    `bins` has id, quantity and group. Test has `params.test` bins (as near below it as whole
    groups allow), train `params.train`, each with the quantities in the proportions of all. Bins
    that are `unusable` are passed over; where too few remain for that, train has all the rest.
    """
    if params.train + params.test > len(bins):
        raise UserError(
            f"split.train {params.train} and split.test {params.test} are more than the"
            f" {len(bins)} bins of data/subset.parquet: lower them or raise subset.bins"
        )
    bins = bins[~bins["id"].isin(unusable)].sort_values("id")
    if params.test >= len(bins):
        raise UserError(
            f"split.test {params.test} leaves nothing to train: {len(bins)} bins remain"
        )
    labels = bins["group"] if params.by == "group" else bins["id"]
    contents: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for label, quantity in zip(labels, bins["quantity"], strict=True):
        contents[label][quantity] += 1
    order = shuffled(contents, "split", params.seed)
    counts = Counter(bins["quantity"])
    test = take(order, contents, apportion(params.test, counts))
    rest = [label for label in order if label not in test]
    left = len(bins) - sum(contents[label].total() for label in test)
    train = take(rest, contents, apportion(min(params.train, left), counts))
    for name, size, labels_in in (("test", params.test, test), ("train", params.train, train)):
        if not labels_in:
            raise UserError(f"split.{name}: no sibling group that is left fits into {size} bins")
    chosen = bins.assign(label=labels)[labels.isin(test | train)]
    sets = chosen["label"].isin(test).map({True: "test", False: "train"})
    return pd.DataFrame({"id": chosen["id"], "set": sets})


def apportion(size: int, counts: Counter[int]) -> Counter[int]:
    """Divide `size` in the proportions of `counts`, by largest remainder."""
    total = counts.total()
    parts = Counter({quantity: size * count // total for quantity, count in counts.items()})
    by_remainder = sorted(
        counts, key=lambda quantity: (-(size * counts[quantity] % total), quantity)
    )
    parts.update(by_remainder[: size - parts.total()])
    return parts


def take(order: list[str], contents: dict[str, Counter[int]], wanted: Counter[int]) -> set[str]:
    """Groups, in order, that hold `wanted` bins of each quantity, as near as whole groups allow.

    First every group that fits into what is still wanted of its quantities; then, where that
    left gaps, whatever fits into their sum.
    """
    wanted = wanted.copy()
    taken = set()
    for label in order:
        if contents[label] <= wanted:
            wanted.subtract(contents[label])
            taken.add(label)
    gap = wanted.total()
    for label in order:
        if gap and label not in taken and contents[label].total() <= gap:
            gap -= contents[label].total()
            taken.add(label)
    return taken


if __name__ == "__main__":
    run_stage("split", main)
