"""Which bin an object belongs to: the ids in the names of files."""

import re

import pyarrow as pa
import pyarrow.compute as pc

from stages.runtime.errors import UserError

# Ids become parts of keys and file names: no separators, dots, spaces or control characters.
_BIN_ID = "[A-Za-z0-9_-]{1,64}"
#: How the names of records and photographs end, in lower or upper case.
RECORD = r"\.json"
PHOTOGRAPH = r"\.jpe?g"


def is_bin_id(text: str) -> bool:
    return re.fullmatch(_BIN_ID, text) is not None


def named_by_id(listing: pa.Table, prefix: str, ending: str) -> tuple[pa.Table, list[str]]:
    """The objects <id><ending> directly below `prefix`, with a column `id`, and the keys left out.

    Keys with this ending whose names are not ids are left out, like the ._00001.jpg that macOS puts
    beside a file. Raises UserError if a bin has two files, such as 1.jpg and 1.JPG.
    """
    pattern = f"^{re.escape(prefix)}(?P<id>[^/]+)(?i:{ending})$"
    names = pc.struct_field(pc.extract_regex(listing["key"], pattern), "id")
    files = listing.append_column("id", names).filter(names.is_valid())
    is_id = pc.match_substring_regex(files["id"], f"^{_BIN_ID}$")
    found = files.filter(is_id)
    _refuse_two_of_a_bin(found)
    return found, files.filter(pc.invert(is_id))["key"].to_pylist()


def _refuse_two_of_a_bin(files: pa.Table) -> None:
    if pc.count_distinct(files["id"]).as_py() == len(files):
        return
    bins = pc.value_counts(files["id"].combine_chunks())
    repeated = bins.filter(pc.greater(bins.field("counts"), 1))[0]["values"]
    first, second, *_ = files.filter(pc.equal(files["id"], repeated))["key"].to_pylist()
    raise UserError(f"the bin {repeated} has two files, {first} and {second}: keep one")
