"""Choose the experiment's bins from the index: data/subset.parquet, with their sibling groups."""

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from stages.formats.items import ASINS, asins_by_bin
from stages.formats.shards import whole_parquet, write_table
from stages.runtime import paths
from stages.runtime.command import run_stage
from stages.runtime.counts import open_label
from stages.runtime.errors import UserError
from stages.runtime.params import Subset, load_params
from stages.sampling.lists import read_list, refuse_unknown, some
from stages.sampling.order import shuffled
from stages.sampling.siblings import sibling_groups, unpadded_twins

COLUMNS = ["id", "quantity", "group", "key", "size", "etag"]


def main() -> str:
    params = load_params().subset
    columns = ["id", "quantity", ASINS, "key", "size", "etag"]
    with whole_parquet(paths.INDEX):
        index = pq.ParquetFile(paths.INDEX).read(columns)
    grouped = with_groups(index, params.quantities)
    name = params.ids
    subset = sample(grouped, params) if name is None else take(grouped, name, params.quantities)
    write_table(paths.SUBSET, subset)
    groups = pc.count_distinct(subset["group"]).as_py()
    how = f"in {params.order} order" if name is None else f"of {paths.LISTS / name}"
    return f"{len(subset)} bins {how}, in {groups} sibling groups"


def with_groups(index: pa.Table, quantities: list[int]) -> pa.Table:
    """The index with the column group, found over all bins, since a chain may pass through any.

    Empty bins join their neighbours only if the experiment has empty bins. Counts that belong to an
    open class, like 6+, become that of its name.
    """
    empty = index.filter(pc.equal(index["quantity"], 0))["id"].to_pylist()
    ids = index["id"].to_pylist()
    groups = sibling_groups(ids, asins_by_bin(index), empty if 0 in quantities else ())
    grouped = index.append_column("group", pa.array(groups, pa.string())).select(COLUMNS)
    if (highest := open_label(quantities)) is None:
        return grouped
    counts = pc.min_element_wise(grouped["quantity"], pa.scalar(highest, pa.int32()))
    return grouped.set_column(COLUMNS.index("quantity"), "quantity", counts)


def sample(index: pa.Table, params: Subset) -> pa.Table:
    """`params.bins` of the bins that have a quantity of `params.quantities`, sorted by id.

    In random order, un-padded twins are left out: they may be siblings of any other bin. In the
    order of the listing, as the published experiment took its bins, they are not.
    """
    fitting = index.filter(pc.is_in(index["quantity"], pa.array(params.quantities, pa.int32())))
    if params.order == "random":
        twins = unpadded_twins(index["id"].to_pylist())
        fitting = fitting.filter(pc.invert(pc.is_in(fitting["id"], pa.array(twins, pa.string()))))
    if len(fitting) < params.bins:
        raise UserError(
            f"subset.bins is {params.bins}, but the bucket has {len(fitting)} bins with a quantity"
            f" of subset.quantities {params.quantities}: lower subset.bins"
        )
    if params.order == "listing":
        return fitting.sort_by("key").slice(0, params.bins).sort_by("id")
    sampled = shuffled(fitting["id"].to_pylist(), "subset", params.seed)[: params.bins]
    return with_ids(fitting, sampled)


def take(index: pa.Table, name: str, quantities: list[int]) -> pa.Table:
    """Exactly the bins of the file lists/`name`, sorted by id.

    Raises UserError if the index lacks one of them, or one has a quantity not in `quantities`.
    """
    ids = read_list(name, "subset.ids", ["id"])["id"]
    refuse_unknown(name, ids, index["id"].to_pylist(), str(paths.INDEX))
    taken = with_ids(index, ids)
    pairs = zip(taken["id"].to_pylist(), taken["quantity"].to_pylist(), strict=True)
    if others := [f"{bin_id} with {count}" for bin_id, count in pairs if count not in quantities]:
        raise UserError(
            f"{paths.LISTS / name} lists bins whose quantity is not in subset.quantities"
            f" {quantities}: {some(others)}: remove them, or add their quantities"
        )
    return taken


def with_ids(index: pa.Table, ids: list[str]) -> pa.Table:
    """The bins with these ids, sorted by id."""
    return index.filter(pc.is_in(index["id"], pa.array(ids, pa.string()))).sort_by("id")


if __name__ == "__main__":
    run_stage("subset", main)
