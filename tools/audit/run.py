"""An audit from its photographs to its files, in order."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from stages.collecting.bucket import explained_at
from stages.formats.tables import read_csv, write_csv
from stages.runtime.errors import UserError
from stages.runtime.files import digest, digest_files, write_text
from stages.runtime.work import unfinished
from tools.audit.expected import Expected, find_expected, left_out
from tools.audit.models import Ensemble, load_ensemble
from tools.audit.objects import OPTIONS
from tools.audit.page import Facts, make_thumbnails, render_page
from tools.audit.photographs import Photographs, open_photographs
from tools.audit.scores import score_photographs
from tools.audit.table import audit_table

SPLIT = Path("data/split.csv")
TABLE = "audit.csv"
PAGE = "index.html"


def audit(
    photographs: str,
    expected: Path | None,
    model: Sequence[Path],
    out: Path,
    false_alarm: float,
    top: int,
    endpoint: str | None,
    region: str,
    *,
    signed: bool,
) -> int:
    """Write the table and the page into `out`; the number of alarms. Arguments as --help says."""
    out.mkdir(parents=True, exist_ok=True)
    with explained_at(photographs, OPTIONS, anonymous=not signed):
        source = open_photographs(photographs, endpoint, region, signed=signed)
        counts = find_expected(expected, source)
        refuse_strangers(source, counts)
        ensemble = load_ensemble(model)
        announce(source, counts, ensemble)
        key = digest(source.identity, ensemble.identity, code_version())
        with unfinished("audit", key) as folder:
            scored = score_photographs(source, ensemble, folder)
            facts = Facts(
                source.place,
                counts.place,
                [path.name for path in ensemble.folders],
                ensemble.validation_bins,
                false_alarm,
                ensemble.threshold(false_alarm),
                count_trained_on(source.ids),
            )
            table = audit_table(scored, counts, ensemble.labels, facts.threshold)
            page = make_page(facts, table, ensemble, source, counts, top)
            write_csv(out / TABLE, table)
            write_text(out / PAGE, page)
    return summarize(len(source.ids), table, out)


def refuse_strangers(source: Photographs, counts: Expected) -> None:
    """Raise UserError where no photograph is of a bin with a count: ids are written otherwise."""
    if counts.counts and not counts.counts.keys() & set(source.ids):
        raise UserError(
            f"{counts.place} has none of the photographs' bins: its ids are like"
            f" {next(iter(counts.counts))}, theirs like {source.ids[0]}"
        )


def announce(source: Photographs, counts: Expected, ensemble: Ensemble) -> None:
    """Say what was found and is used, and what is not."""
    skipped = list(left_out(source, counts))
    if skipped:
        print(
            f"audit: {len(skipped)} files are left out whose names are no bins' ids, like"
            f" {skipped[0]!a:.80}"
        )
    models = " and ".join(str(folder) for folder in ensemble.folders)
    print(
        f"audit: {len(source.ids)} photographs of {source.place}, {len(counts.counts)} counts of"
        f" {counts.place}, {models} on {ensemble.releases[0].classifier.device}",
        flush=True,
    )


def count_trained_on(ids: Sequence[str]) -> int:
    """How many of these bins data/split.csv has in train, where there is one."""
    if not SPLIT.exists():
        return 0
    sets = read_csv(SPLIT)
    return int(sets.loc[sets["set"] == "train", "id"].isin(ids).sum())


def code_version() -> str:
    """Of this tool; that of the stages' modules is in every key already."""
    return digest_files(sorted(Path(__file__).parent.glob("*.py")))


def make_page(
    facts: Facts,
    table: pd.DataFrame,
    ensemble: Ensemble,
    source: Photographs,
    counts: Expected,
    top: int,
) -> str:
    """With the photographs of the first alarms, which are read again."""
    shown = table.loc[table["alarm"] == "yes", "id"].head(top).tolist()
    thumbnails = make_thumbnails(source.pick(shown))
    items = counts.records.items(shown) if counts.records else {}
    return render_page(facts, table, ensemble.labels, top, thumbnails, items)


def summarize(photographs: int, table: pd.DataFrame, out: Path) -> int:
    """Print the last line; the number of alarms. Raises UserError where no bin could be judged."""
    alarms = int((table["alarm"] == "yes").sum())
    not_judged = int((table["alarm"] == "").sum())
    if not_judged == len(table):
        reason = table["reason"].mode().iloc[0]
        raise UserError(f"no bin could be judged ({reason}, mostly): see {out / TABLE}")
    print(
        f"audit: {photographs} photographs, {alarms} alarms"
        f" ({alarms / (len(table) - not_judged):.1%}), {not_judged} not judged; {out / PAGE}"
    )
    return alarms
