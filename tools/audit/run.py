"""An audit from its photographs to its files, in order."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from stages.collecting.bucket import explained_at
from stages.formats.tables import read_csv, write_csv
from stages.runtime.errors import UserError
from stages.runtime.files import digest, digest_files, write_text
from stages.runtime.paths import SPLIT
from stages.runtime.work import unfinished
from tools.audit.expected import Expected, find_expected
from tools.audit.models import Ensemble, load_ensemble
from tools.audit.page import Facts, make_thumbnails, render_page
from tools.audit.photographs import OPTIONS, Photographs, open_photographs
from tools.audit.scores import score_photographs
from tools.audit.table import audit_table

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
        with unfinished(
            "audit", digest(source.identity, ensemble.identity, code_version())
        ) as folder:
            scored = score_photographs(source, ensemble, folder)
            threshold = ensemble.threshold(false_alarm)
            table = audit_table(scored, counts, ensemble.labels, threshold)
            facts = Facts(
                source.place,
                counts.place,
                [path.name for path in ensemble.folders],
                ensemble.validation_bins,
                false_alarm,
                threshold,
                count_trained_on(source.ids),
            )
            shown = table.loc[table["alarm"] == "yes", "id"].head(top).tolist()
            # The photographs on the page are read again.
            thumbnails = make_thumbnails(source.pick(shown))
            page = render_page(facts, table, ensemble.labels, top, thumbnails, counts.items(shown))
            write_csv(out / TABLE, table)
            write_text(out / PAGE, page)
    return summarize(len(source.ids), table, out)


def refuse_strangers(source: Photographs, counts: Expected) -> None:
    """Raise UserError where no photograph's bin has a count: one side may write ids otherwise."""
    if counts.counts and not counts.counts.keys() & set(source.ids):
        raise UserError(
            f"{counts.place} has none of the photographs' bins: its ids are like"
            f" {next(iter(counts.counts))}, theirs like {source.ids[0]}"
        )


def announce(source: Photographs, counts: Expected, ensemble: Ensemble) -> None:
    """Say what was found and is used, and what is left out."""
    if left_out := [*source.left_out, *counts.left_out]:
        print(
            f"audit: left out {len(left_out)} with names that aren't ids, like {left_out[0]!a:.80}"
        )
    if counts.notes:
        print(f"audit: {counts.place}: {'; '.join(counts.notes)}")
    models = " and ".join(map(str, ensemble.folders))
    print(
        f"audit: {len(source.ids)} photographs of {source.place}, {len(counts.counts)} counts of"
        f" {counts.place}, {models} on {ensemble.device}",
        flush=True,
    )


def count_trained_on(ids: Sequence[str]) -> int:
    """How many of these bins data/split.csv has in train, where there is one."""
    if not SPLIT.exists():
        return 0
    sets = read_csv(SPLIT)
    return int(sets.loc[sets["set"] == "train", "id"].isin(ids).sum())


def code_version() -> str:
    """The version of this tool; unfinished() adds that of the stages' modules."""
    return digest_files(sorted(Path(__file__).parent.glob("*.py")))


def summarize(photographs: int, table: pd.DataFrame, out: Path) -> int:
    """Print the last line; the number of alarms. Raises UserError where no bin could be judged."""
    alarms = int((table["alarm"] == "yes").sum())
    not_judged = int((table["alarm"] == "").sum())
    if not_judged == len(table):
        reason = table["reason"].mode().iloc[0]
        raise UserError(f"no bin could be judged (mostly: {reason}): see {out / TABLE}")
    print(
        f"audit: {photographs} photographs, {alarms} alarms"
        f" ({alarms / (len(table) - not_judged):.1%}), {not_judged} not judged; {out / PAGE}"
    )
    return alarms
