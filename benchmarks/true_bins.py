"""The bins of a bucket as large as the real one, each made from its id when it is requested.

Ids, quantities and sibling groups are distributed as in s3://aft-vbi-pds. Photographs and the
items' details are repeated from a few real or synthetic bins. An id has the same bytes in every
process, even if a bucket has only the first bins.
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
#: How many padded ids have 0, 1, ... 5 items, and 6 or more, according to the labels of
#: https://github.com/silverbottlep/abid_challenge
QUANTITY_COUNTS = [9_701, 41_147, 76_863, 90_058, 80_550, 62_448, 174_467]
#: Shares of the real bucket: consecutive padded ids that share an ASIN, and bins in such a group.
LINKED = 0.39
IN_GROUPS = 0.75
#: A piece of the real data set, which may lie beside the repository.
ABID = Path(__file__).parents[2] / "shared" / "abid"

# The mean of quantities from 6 on, as in the real records 00001 to 09999. These have 2.6 kinds of
# items on average.
_MEAN_OF_MANY = 9.2
_MOST_KINDS = 6
# Each group has its own range of this many numbers for ASINs.
_ASINS_OF_GROUP = 8
_SYNTHETIC = 100
_PHOTOGRAPH_SIZE = (501, 427)
# The standard deviation of noise that makes synthetic photographs as large as real ones, 57 kB.
_GRAIN = 6.6
_SEED = 0


@dataclass(frozen=True)
class TrueBins:
    """The bins of a bucket. Rows count the whole bucket: padded ids, then un-padded ones.

    `own_records` are of the real or synthetic bins at hand; all other records are made from
    `templates`. Siblings have the same number in `groups`.
    """

    rows: Mapping[str, int]  # by id, only for the bins in this bucket
    quantities: NDArray[np.int64]
    groups: NDArray[np.int64]
    kinds: NDArray[np.int64]  # the most ASINs that a bin may have
    own_records: Mapping[int, bytes]
    templates: Sequence[bytes]
    photographs: Sequence[bytes]
    photograph_of: NDArray[np.int64]  # positions in `photographs`

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
        """One item of each kind, except that the first kind makes up the quantity."""
        kinds = min(quantity, int(self.kinds[row]))
        counts = [quantity - kinds + 1, *[1] * (kinds - 1)] if kinds else []
        return [
            self.templates[asin % len(self.templates)] % (asin, asin, count)
            for asin, count in enumerate(counts, start=_ASINS_OF_GROUP * int(self.groups[row]))
        ]


def make_bins(padded: int = PADDED, abid: Path = ABID) -> TrueBins:
    """The first `padded` bins, from 1 to PADDED, and un-padded ones in proportion.

    If there is no folder `abid`, quantities, photographs and the items' details are synthetic.
    """
    # Always the whole bucket, so that an id is the same bin in smaller ones.
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
    """The quantity of every bin in the whole bucket; for padded ids as published."""
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
    """The first row of each row's group, which has one to three rows.

    In a group no bin is empty, and neighbours differ in quantity.
    """
    usable = quantities > 0
    linkable = usable[:-1] & usable[1:] & (quantities[:-1] != quantities[1:])
    # Per bin there are b groups of two and c of three, with b + 2c = LINKED and
    # 2b + 3c = IN_GROUPS; a group begins where the one before has ended.
    twos_and_threes = IN_GROUPS - LINKED
    second = twos_and_threes / (1 - LINKED)
    third = (LINKED - twos_and_threes) / twos_and_threes
    draws = chance.random((2, len(linkable)))
    has_second = has_third = linkable
    # Rows that cannot be linked to the next are more frequent at the ends of groups than elsewhere.
    for _ in range(2):
        groups = _joined(has_second, has_third)
        begins = groups[:-1] == np.arange(len(linkable))
        is_second = np.r_[False, (begins & has_second)[:-1]]
        has_second = linkable & (draws[0] < second / linkable[begins].mean())
        has_third = linkable & (draws[1] < third / linkable[is_second].mean())
    return _joined(has_second, has_third)


def _joined(has_second: NDArray[np.bool_], has_third: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The groups, if a first row is joined by the next, and a second row by a third, as given."""
    seconds, thirds = [*has_second.tolist(), False], [*has_third.tolist(), False]
    groups = list(range(len(seconds)))
    row = 0
    while row < len(groups):
        size = 1 if not seconds[row] else 3 if thirds[row + 1] else 2
        groups[row : row + size] = [row] * size
        row += size
    return np.array(groups)


def item_templates(records: Iterable[bytes]) -> list[bytes]:
    """Every item as a format string for the number of its ASIN (twice) and its quantity."""
    templates = []
    for record in records:
        for item in json.loads(record)["BIN_FCSKU_DATA"].values():
            contents = {"@asin": item | {"asin": "@asin", "quantity": "@quantity"}}
            text = json.dumps({"": contents}, indent=4, sort_keys=True)
            # Without the lines of the enclosing objects.
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
    for one in synthetic_bins(_SYNTHETIC, _SEED):
        yield one._replace(photograph=_enlarged(one.photograph, chance))


def _enlarged(photograph: bytes, chance: np.random.Generator) -> bytes:
    """The photograph with as many pixels and bytes as a real one."""
    pixels = np.array(Image.open(io.BytesIO(photograph)).resize(_PHOTOGRAPH_SIZE))
    grainy = (pixels + chance.normal(0, _GRAIN, pixels.shape)).clip(0, 255).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(grainy).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
