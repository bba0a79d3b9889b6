"""An audit in numbers: for audit.json and for the last line."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from tools.audit.decisions import Decision
from tools.audit.models import Ensemble
from tools.audit.page import Facts
from tools.audit.table import NO_PHOTOGRAPH
from tools.audit.work_list import WorkList
from tools.audit.worth import worth_of

#: The files of an audit.
TABLE = "audit.csv"
PAGE = "index.html"
SUMMARY = "audit.json"


class Numbers(NamedTuple):
    """Numbers of bins. `open_alarms` were not decided before, and `drawn` ones are listed too.

    Those `without_photograph` are among the ones that were not judged.
    """

    photographs: int
    judged: int
    not_judged: int
    without_photograph: int
    left_out: int
    alarms: int
    open_alarms: int
    decided_before: int
    listed: int
    drawn: int


def count_bins(facts: Facts, photographs: int, table: pd.DataFrame, work: WorkList) -> Numbers:
    """`table` is that of audit_table."""
    judged, alarms = (table["alarm"] != "").sum(), table["alarm"] == "yes"
    return Numbers(
        photographs=photographs,
        judged=int(judged),
        not_judged=int(len(table) - judged),
        without_photograph=int((table["reason"] == NO_PHOTOGRAPH).sum()),
        left_out=facts.left_out,
        alarms=int(alarms.sum()),
        open_alarms=int((alarms & ~table["id"].isin(work.settled.keys())).sum()),
        decided_before=len(work.settled),
        listed=len(work.ids),
        drawn=len(work.ids) - len(work.flagged),
    )


def summary(
    facts: Facts, ensemble: Ensemble, numbers: Numbers, decided: Mapping[str, Decision]
) -> dict[str, Any]:
    """What audit.json says, which docs/audit.md describes."""
    worth = worth_of(decided.values())
    return {
        "photographs": facts.photographs,
        "expected": facts.expected,
        "models": [
            {"folder": str(folder), "sha256": release.settings.sha256}
            for folder, release in zip(ensemble.folders, ensemble.releases, strict=True)
        ],
        "witness": None if ensemble.witness is None else ensemble.witness.settings.sha256,
        "false_alarm": facts.false_alarm,
        "thresholds": {row["quantity"]: row["threshold"] for row in facts.by_count},
        "bins": numbers._asdict(),
        "warning": facts.warning,
        "decided": None if worth is None else worth.as_dict(),
        "table": TABLE,
        "page": PAGE,
    }


def last_line(facts: Facts, numbers: Numbers) -> str:
    """Like "102 photographs, 15 alarms (14.7%), 0 not judged"."""
    settled, missing = numbers.alarms - numbers.open_alarms, numbers.without_photograph
    parts = [
        f"{numbers.photographs} photographs",
        f"{numbers.alarms} alarms ({numbers.alarms / numbers.judged:.1%})",
        *([f"{settled} of them decided before"] if numbers.decided_before else []),
        f"{numbers.not_judged} not judged"
        + (f" ({missing} have no photograph)" if missing else ""),
        *([f"{facts.left_out} left out (trained on)"] if facts.left_out else []),
    ]
    return ", ".join(parts)
