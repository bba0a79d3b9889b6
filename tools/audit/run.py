"""An audit from start to finish: read, score, compare, write."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from stages.collecting.advice import explained_at
from stages.formats.tables import write_csv
from stages.networks.calibration import Floats
from stages.runtime.errors import UserError
from stages.runtime.files import digest, digest_files, write_text
from stages.runtime.params import Threshold
from stages.runtime.paths import SPLIT
from stages.runtime.work import resumable
from stages.scoring.evaluation import thresholds_of
from tools.audit.expected import Expected, find_expected
from tools.audit.models import Ensemble, load_ensemble
from tools.audit.page import Facts, make_thumbnails, render_page
from tools.audit.photographs import OPTIONS, Photographs, open_photographs
from tools.audit.plausibility import warn
from tools.audit.scores import score_photographs
from tools.audit.table import audit_table
from tools.audit.training_set import project_ids, training_ids

TABLE = "audit.csv"
PAGE = "index.html"


def audit(
    photographs: str,
    expected: Path | None,
    model: Sequence[Path],
    out: Path,
    false_alarm: float,
    threshold: Threshold,
    top: int,
    endpoint: str | None,
    region: str,
    *,
    signed: bool,
    with_trained: bool,
) -> int:
    """Write the table and the page into `out` and return the number of alarms. See --help."""
    out.mkdir(parents=True, exist_ok=True)
    with explained_at(photographs, OPTIONS, anonymous=not signed):
        source = open_photographs(photographs, endpoint, region, signed=signed)
        counts = find_expected(expected, source)
        refuse_strangers(source, counts)
        ensemble = load_ensemble(model)
        left_out = 0 if with_trained else leave_out_trained(source, counts, ensemble)
        announce(source, counts, ensemble, left_out)
        with resumable(
            "audit", digest(source.identity, ensemble.identity, code_version())
        ) as folder:
            scored = score_photographs(source, ensemble, folder)
            thresholds = thresholds_of(ensemble.validation, false_alarm, threshold)
            table = audit_table(scored, counts, ensemble.labels, thresholds)
            facts = gather_facts(source, counts, ensemble, table, false_alarm, thresholds, left_out)
            shown = table.loc[table["alarm"] == "yes", "id"].head(top).tolist()
            # Only these photographs are read again, for the page.
            thumbnails = make_thumbnails(source.pick(shown))
            page = render_page(facts, table, ensemble.labels, top, thumbnails, counts.items(shown))
            write_csv(out / TABLE, table)
            write_text(out / PAGE, page)
    return summarize(facts, len(source.ids), table, out)


def refuse_strangers(source: Photographs, counts: Expected) -> None:
    """Raise UserError if no photograph has a count: the two may write ids differently."""
    if counts.counts and not counts.counts.keys() & set(source.ids):
        raise UserError(
            f"no photograph has a count in {counts.place}: its ids are like"
            f" {next(iter(counts.counts))}, those of the photographs like {source.ids[0]}; write"
            " both in the same way"
        )


def leave_out_trained(source: Photographs, counts: Expected, ensemble: Ensemble) -> int:
    """Leave out the bins that the models were trained on. Raises UserError if none remains."""
    trained = training_ids(ensemble) & project_ids(source)
    if trained.issuperset(source.ids):
        raise UserError(
            f"the models were trained on all {len(trained)} photographs in {source.place}"
            f" ({SPLIT}), and have learned even their wrong records: audit others, or add --all"
        )
    source.drop(trained)
    counts.drop(trained)
    return len(trained)


def announce(source: Photographs, counts: Expected, ensemble: Ensemble, trained: int) -> None:
    """Print what will be compared, and what is left out: files, and `trained` bins."""
    if left_out := [*source.left_out, *counts.left_out]:
        print(
            f"audit: files left out, since their names are not ids: {len(left_out)}, like"
            f" {left_out[0]!a:.80}"
        )
    if counts.notes:
        print(f"audit: {counts.place}: {'; '.join(counts.notes)}")
    if trained:
        print(
            f"audit: bins left out, since the models were trained on them ({SPLIT}): {trained};"
            " --all audits them too"
        )
    models = " and ".join(map(str, ensemble.folders))
    print(
        f"audit: comparing {len(source.ids)} photographs from {source.place} with"
        f" {len(counts.counts)} counts from {counts.place}, using {models} on {ensemble.device}",
        flush=True,
    )


def gather_facts(
    source: Photographs,
    counts: Expected,
    ensemble: Ensemble,
    table: pd.DataFrame,
    false_alarm: float,
    thresholds: Floats,
    left_out: int,
) -> Facts:
    return Facts(
        photographs=source.place,
        expected=counts.place,
        models=[path.name for path in ensemble.folders],
        validation_bins=len(ensemble.validation.ids),
        false_alarm=false_alarm,
        left_out=left_out,
        trained_on=len(training_ids(ensemble).intersection(source.ids)),
        warning=warn(table, false_alarm, ensemble.validation.table()),
        by_count=ensemble.flagged_by_count(thresholds).to_dict("records"),
    )


def code_version() -> str:
    """The version of this tool's code; resumable() adds that of the stages."""
    return digest_files(sorted(Path(__file__).parent.glob("*.py")))


def summarize(facts: Facts, photographs: int, table: pd.DataFrame, out: Path) -> int:
    """Print the last line and return the alarms. Raises UserError if no bin could be judged."""
    alarms = int((table["alarm"] == "yes").sum())
    not_judged = int((table["alarm"] == "").sum())
    if not_judged == len(table):
        reason = table["reason"].mode().iloc[0]
        raise UserError(f"no bin could be judged (mostly: {reason}): see {out / TABLE}")
    left_out = f", {facts.left_out} left out (trained on)" if facts.left_out else ""
    print(
        f"audit: {photographs} photographs, {alarms} alarms"
        f" ({alarms / (len(table) - not_judged):.1%}), {not_judged} not judged{left_out};"
        f" {out / PAGE}" + (f". {facts.warning}" if facts.warning else "")
    )
    return alarms
