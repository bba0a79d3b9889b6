"""The bins of a bucket as large as the real one, each made from its id whenever it is asked for.

Ids, quantities and sibling groups are distributed as in s3://aft-vbi-pds; photographs and the
items' details are those of a few real bins, or of synthetic ones, over and over. The same id is the
same bytes in every process, also where a bucket has only the first bins.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tools.synthetic import SyntheticBin, synthetic_bins

#: Bins of the real bucket with a padded id (00001 and up), and with an un-padded one (1 and up).
PADDED = 535_234
UNPADDED = 1_200
#: Of the padded ids, with 0, 1, ... 5 items and with 6 or more, by the labels of
#: https://github.com/silverbottlep/abid_challenge
QUANTITY_COUNTS = [9_701, 41_147, 76_863, 90_058, 80_550, 62_448, 174_467]
#: Shares of the real bucket: consecutive padded ids that share an ASIN, and bins in such a group.
LINKED = 0.39
IN_GROUPS = 0.75
#: The piece of the real data set that a checkout may have beside it.
ABID = Path(__file__).parents[2] / "shared" / "abid"

# Of the quantities from 6 on, as in the real records 00001 to 09999, which have 2.6 kinds of items
# on average.
_MEAN_OF_MANY = 9.2
_MOST_KINDS = 6
# A group's ASINs have so many numbers for themselves.
_ASINS_OF_GROUP = 8
_DRAWN = 100
_DRAWN_SIZE = (501, 427)
# Standard deviation of the noise that makes synthetic photographs 57 kB large, as real ones are.
_GRAIN = 6.6
_SEED = 0


@dataclass(frozen=True)
class TrueBins:
    """The bins of a bucket. Rows are those of the whole one: padded ids, then un-padded ones.

    Real or synthetic bins at hand have `own_records`. Those of the others are made from
    `templates`; siblings among them have the same number in `groups`.
    """

    rows: Mapping[str, int]  # by id, only of the bins in this bucket
    quantities: NDArray[np.int64]
    groups: NDArray[np.int64]
    kinds: NDArray[np.int64]  # how many ASINs a bin has at most
    own_records: Mapping[int, bytes]
    templates: Sequence[bytes]
    photographs: Sequence[bytes]
    photograph_of: NDArray[np.int64]  # its place in `photographs`

    def photograph(self, row: int) -> bytes:
        return self.photographs[int(self.photograph_of[row])]

    def record(self, row: int) -> bytes:
        """The JSON of metadata/<id>.json. Only siblings have an ASIN in common."""
        if row in self.own_records:
            return self.own_records[row]
        quantity = int(self.quantities[row])
        items = self._items(row, quantity)
        contents = b"{\n%b\n    }" % b",\n".join(items) if items else b"{}"
        number = row + 1 - PADDED
        name = b',\n    "image_fname": "%d.jpg"' % number if number > 0 else b""
        return b'{\n    "BIN_FCSKU_DATA": %b,\n    "EXPECTED_QUANTITY": %d%b\n}' % (
            contents,
            quantity,
            name,
        )

    def _items(self, row: int, quantity: int) -> list[bytes]:
        """One of each kind, but of the first as many as the quantity leaves."""
        kinds = min(quantity, int(self.kinds[row]))
        counts = [quantity - kinds + 1, *[1] * (kinds - 1)] if kinds else []
        return [
            self.templates[asin % len(self.templates)] % (asin, asin, count)
            for asin, count in enumerate(counts, start=_ASINS_OF_GROUP * int(self.groups[row]))
        ]


def make_bins(padded: int = PADDED, abid: Path = ABID) -> TrueBins:
    """The first `padded` bins, from 1 to PADDED, and un-padded ones in proportion.

    Where there is no folder `abid`, quantities, photographs and the items' details are synthetic.
    """
    # The whole bucket, so that an id is the same bin in smaller ones.
    rows = {bin_id: row for row, bin_id in enumerate(bin_ids(PADDED, UNPADDED))}
    chance = np.random.default_rng(_SEED)
    originals = list(_real_bins(abid) if abid.is_dir() else _synthetic_bins())
    own = np.array([rows[one.id] for one in originals])
    quantities = all_quantities(abid, chance)
    quantities[own] = [one.quantity for one in originals]
    groups = np.arange(len(rows))
    groups[:PADDED] = sibling_groups(quantities[:PADDED], chance)
    photograph_of = np.arange(len(rows)) % len(originals)
    photograph_of[own] = np.arange(len(originals))
    return TrueBins(
        rows={bin_id: rows[bin_id] for bin_id in bin_ids(padded, padded * UNPADDED // PADDED)},
        quantities=quantities,
        groups=groups,
        kinds=chance.integers(1, _MOST_KINDS, len(rows), endpoint=True),
        own_records={row: one.record for row, one in zip(own.tolist(), originals, strict=True)},
        templates=item_templates(one.record for one in originals),
        photographs=[one.photograph for one in originals],
        photograph_of=photograph_of,
    )


def bin_ids(padded: int, unpadded: int) -> list[str]:
    ids = [f"{number:05d}" for number in range(1, padded + 1)]
    return ids + [str(number) for number in range(1, unpadded + 1)]


def all_quantities(abid: Path, chance: np.random.Generator) -> NDArray[np.int64]:
    """Of every bin of the whole bucket: of padded ids as published, of the others like them."""
    known = np.repeat(np.arange(7), QUANTITY_COUNTS)
    padded = _labels(abid / "labels") if abid.is_dir() else chance.permutation(known)
    quantities = np.concatenate([padded, chance.choice(known, UNPADDED)])
    many = quantities == 6
    quantities[many] += chance.geometric(1 / (_MEAN_OF_MANY - 5), many.sum()) - 1
    return quantities


def _labels(folder: Path) -> NDArray[np.int64]:
    """The published quantities of bins with 0 to 5 items; 6 stands for all above."""
    quantities = np.full(PADDED, 6)
    for part in ("train", "val"):
        labels = np.array(json.loads((folder / f"counting_{part}.json").read_bytes()))
        quantities[labels[:, 0]] = labels[:, 1]
    return quantities


def sibling_groups(quantities: NDArray[np.int64], chance: np.random.Generator) -> NDArray[np.int64]:
    """For each row the first row of its group, of one to three rows.

    In a group no bin is empty, and no two neighbours have the same quantity.
    """
    usable = quantities > 0
    linkable = usable[:-1] & usable[1:] & (quantities[:-1] != quantities[1:])
    # Per bin there are b groups of two and c of three, with b + 2c = LINKED and
    # 2b + 3c = IN_GROUPS; a group begins where none goes on.
    twos_and_threes = IN_GROUPS - LINKED
    second = twos_and_threes / (1 - LINKED)
    third = (LINKED - twos_and_threes) / twos_and_threes
    draws = chance.random((2, len(linkable)))
    goes_on = goes_further = linkable
    # Where a group may not go on is more frequent at its end than elsewhere.
    for _ in range(2):
        groups = _joined(goes_on, goes_further)
        begins = groups[:-1] == np.arange(len(linkable))
        went_on = np.r_[False, (begins & goes_on)[:-1]]
        goes_on = linkable & (draws[0] < second / linkable[begins].mean())
        goes_further = linkable & (draws[1] < third / linkable[went_on].mean())
    return _joined(goes_on, goes_further)


def _joined(goes_on: NDArray[np.bool_], goes_further: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Groups by which row takes the next one for its second, and which second for a third."""
    seconds, thirds = [*goes_on.tolist(), False], [*goes_further.tolist(), False]
    groups = list(range(len(seconds)))
    row = 0
    while row < len(groups):
        size = 1 if not seconds[row] else 3 if thirds[row + 1] else 2
        groups[row : row + size] = [row] * size
        row += size
    return np.array(groups)


def item_templates(records: Iterable[bytes]) -> list[bytes]:
    """Every item as a format of its ASIN's number, that number again and its quantity."""
    templates = []
    for record in records:
        for item in json.loads(record)["BIN_FCSKU_DATA"].values():
            contents = {"@asin": item | {"asin": "@asin", "quantity": "@quantity"}}
            text = json.dumps({"": contents}, indent=4, sort_keys=True)
            # Without the lines of what it is in.
            text = "\n".join(text.split("\n")[2:-2]).replace("%", "%%")
            text = text.replace('"@asin"', '"BT%08d"').replace('"@quantity"', "%d")
            templates.append(text.encode())
    return templates


def _real_bins(abid: Path) -> Iterable[SyntheticBin]:
    for path in sorted((abid / "originals-1k" / "metadata").glob("*.json")):
        record = path.read_bytes()
        photograph = abid / "originals-1k" / "bin-images" / f"{path.stem}.jpg"
        quantity = json.loads(record)["EXPECTED_QUANTITY"]
        yield SyntheticBin(path.stem, quantity, photograph.read_bytes(), record)


def _synthetic_bins() -> Iterable[SyntheticBin]:
    chance = np.random.default_rng(_SEED)
    for one in synthetic_bins(_DRAWN, _SEED):
        yield one._replace(photograph=_enlarged(one.photograph, chance))


def _enlarged(photograph: bytes, chance: np.random.Generator) -> bytes:
    """With as many pixels as a real photograph, and as many bytes."""
    pixels = np.array(Image.open(io.BytesIO(photograph)).resize(_DRAWN_SIZE))
    grainy = (pixels + chance.normal(0, _GRAIN, pixels.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grainy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
