"""An audit from start to finish: read, score, compare, list, write."""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from stages.collecting.advice import explained_at
from stages.formats.tables import write_csv, write_json
from stages.networks.calibration import Floats
from stages.runtime.errors import UserError
from stages.runtime.files import digest, digest_files, write_text
from stages.runtime.params import Threshold
from stages.runtime.paths import MODELS, SPLIT
from stages.runtime.work import resumable
from stages.scoring.evaluation import thresholds_of
from stages.scoring.results import WITNESS
from stages.scoring.witness_files import SETTINGS as WITNESS_SETTINGS
from tools.audit.decisions import Decided, read_decisions, still_hold, still_needed
from tools.audit.expected import Expected, find_expected
from tools.audit.models import Ensemble, load_ensemble, with_witness
from tools.audit.page import Facts, make_pictures, render_page
from tools.audit.photographs import OPTIONS, Photographs, open_photographs
from tools.audit.plausibility import warn
from tools.audit.scores import score_photographs
from tools.audit.summary import (
    PAGE,
    SUMMARY,
    TABLE,
    Numbers,
    count_bins,
    last_line,
    summary,
)
from tools.audit.table import audit_table
from tools.audit.training_set import project_ids, training_ids
from tools.audit.work_list import flagged_at, make_list
from tools.audit.worth import describe, worth_of


def audit(
    photographs: str,
    expected: Path | None,
    decisions: Sequence[Path],
    model: Sequence[Path],
    out: Path,
    false_alarm: float,
    threshold: Threshold,
    top: int,
    sample: int,
    seed: int,
    endpoint: str | None,
    region: str,
    *,
    counts_only: bool,
    signed: bool,
    with_trained: bool,
) -> int:
    """Write the table, the page and the summary into `out`. See --help.

    Returns the number of alarms that nobody has decided on.
    """
    out.mkdir(parents=True, exist_ok=True)
    with explained_at(photographs, OPTIONS, anonymous=not signed):
        source = open_photographs(photographs, endpoint, region, signed=signed)
        measured = not counts_only and (MODELS / WITNESS / WITNESS_SETTINGS).exists()
        counts = find_expected(expected, source, measured=measured)
        refuse_strangers(source, counts)
        decided = read_decisions(decisions, source.ids)
        ensemble = load_ensemble(model)
        if counts.numbers:
            ensemble = with_witness(ensemble)
        left_out = 0 if with_trained else leave_out_trained(source, counts, ensemble)
        announce(source, counts, decided, ensemble, left_out)
        with resumable(
            "audit", digest(source.identity, ensemble.identity, code_version())
        ) as folder:
            scored = score_photographs(source, ensemble, folder)
            thresholds = thresholds_of(ensemble.validation, false_alarm, threshold)
            table = audit_table(scored, counts, ensemble.labels, thresholds, ensemble.judge)
            facts = gather_facts(source, counts, ensemble, table, false_alarm, thresholds, left_out)
            alarms = flagged_at(scored, counts, ensemble, false_alarm, threshold, alarms_of(table))
            settled = still_hold(decided.by_id, counts.counts, source)
            if decided.by_id:
                print(f"audit: decisions that still hold: {len(settled)} of {len(decided.by_id)}")
            work = make_list(table, alarms, settled, top, sample, seed)
            # Only these photographs are read again, for the page.
            pictures = make_pictures(source.pick(work.ids))
            carried = still_needed(decided.by_id, settled, counts.counts)
            items = counts.items(work.ids)
            page = render_page(facts, table, ensemble.labels, work, pictures, items, carried)
            write_csv(out / TABLE, table)
            write_text(out / PAGE, page)
    numbers = count_bins(facts, len(source.ids), table, work)
    write_json(out / SUMMARY, summary(facts, ensemble, numbers, decided.by_id))
    refuse_unjudged(numbers, table, out)
    print(
        f"audit: {last_line(facts, numbers)}; {out / PAGE}"
        + (f". {facts.warning}" if facts.warning else "")
    )
    return numbers.open_alarms


def alarms_of(table: pd.DataFrame) -> list[str]:
    """The flagged bins of audit_table, the most suspicious first."""
    alarms: list[str] = table.loc[table["alarm"] == "yes", "id"].tolist()
    return alarms


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


def announce(
    source: Photographs, counts: Expected, decided: Decided, ensemble: Ensemble, trained: int
) -> None:
    """Print what will be compared, and what is left out: files, and `trained` bins."""
    if left_out := [*source.left_out, *counts.left_out]:
        print(
            f"audit: files left out, since their names are not ids: {len(left_out)}, like"
            f" {left_out[0]!a:.80}"
        )
    if counts.notes:
        print(f"audit: {counts.place}: {'; '.join(counts.notes)}")
    for note in decided.notes:
        print(f"audit: {note}")
    if worth := worth_of(decided.by_id.values()):
        print(f"audit: of the last list, {describe(worth)}")
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
    by_count = ensemble.flagged_by_count(thresholds).to_dict("records")
    return Facts(
        photographs=source.place,
        expected=counts.place,
        models=[path.name for path in ensemble.folders],
        validation_bins=len(ensemble.validation.ids),
        false_alarm=false_alarm,
        left_out=left_out,
        trained_on=len(training_ids(ensemble).intersection(source.ids)),
        warning=warn(table, false_alarm, ensemble.validation.table()),
        items=ensemble.witness is not None,
        by_count=[
            row | {"quantity": str(label)}
            for row, label in zip(by_count, ensemble.labels, strict=True)
        ],
    )


def code_version() -> str:
    """The version of this tool's code; resumable() adds that of the stages."""
    return digest_files(sorted(Path(__file__).parent.glob("*.py")))


def refuse_unjudged(numbers: Numbers, table: pd.DataFrame, out: Path) -> None:
    """Raise UserError if no bin could be judged."""
    if not numbers.judged:
        reason = table["reason"].mode().iloc[0]
        raise UserError(f"no bin could be judged (mostly: {reason}): see {out / TABLE}")
