"""What checking was worth: estimates from decisions about random alarms and random other bins.

The page computes the same while somebody decides, in page.js.
"""

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln

from tools.audit.decisions import Decision

CONFIDENCE = 0.95


class Part(NamedTuple):
    """`bins` of which `checked` were drawn at random and decided; `wrong` of those were wrong."""

    bins: int
    checked: int
    wrong: int


class Estimate(NamedTuple):
    """A value with its 95% interval."""

    value: float
    low: float
    high: float


class Worth(NamedTuple):
    """What checking a list of bins was worth; what too little was checked for is None.

    Of the `checked` alarms, `wrong` had a wrong record. The estimates are of the share of all the
    list's alarms that do, of the number of wrong records among all bins, and of the share of those
    that the list's alarms find. `best_share` is the false-alarm share to choose next time.
    """

    checked: int
    wrong: int
    right_alarms: Estimate | None = None
    wrong_records: Estimate | None = None
    found: Estimate | None = None
    best_share: float | None = None

    def as_dict(self) -> dict[str, Any]:
        """For JSON, where estimates have the keys value, low and high."""
        return {
            name: value._asdict() if isinstance(value, Estimate) else value
            for name, value in self._asdict().items()
        }


def worth_of(decisions: Collection[Decision]) -> Worth | None:
    """What the audit that was decided on last was worth; None if nothing was decided."""
    if not decisions:
        return None
    audit = max(decisions, key=lambda one: one.decided_at).audit
    clear = [one for one in decisions if one.audit == audit and one.decision != "unclear"]
    alarms = [one for one in clear if one.part == "flagged"]
    flagged, others = (
        count_part([one for one in clear if one.part == part]) for part in ("flagged", "other")
    )
    wrong = [one.is_wrong for one in alarms]
    if flagged is None or others is None:
        return Worth(
            len(alarms), sum(wrong), None if flagged is None else share_of_right_alarms(flagged)
        )
    shares = [(one.flagged_at or 0.0, one.is_wrong) for one in alarms]
    return worth(flagged, others, shares)


def count_part(decisions: Sequence[Decision]) -> Part | None:
    """None if nothing of it was decided, or if it was not drawn at random."""
    if not decisions or decisions[0].part_bins is None:
        return None
    wrong = sum(one.is_wrong for one in decisions)
    return Part(decisions[0].part_bins, len(decisions), wrong)


def worth(flagged: Part, others: Part, alarms: Sequence[tuple[float, bool]]) -> Worth:
    """Estimate from the bins of the list that raised an alarm, and from all others.

    `alarms` has, for each alarm that was checked, the smallest false-alarm share at which it is
    one, and whether its record was wrong. The number of wrong records is the sum of the wrong ones
    that were checked, each divided by its chance of being checked (Horvitz and Thompson, A
    Generalization of Sampling Without Replacement from a Finite Universe, JASA 1952). The parts are
    drawn independently of each other, so their intervals hold together with the product of their
    confidences (Sidak, JASA 1967), and bounds of sums and shares follow from those of the parts.
    """
    found = Worth(flagged.checked, flagged.wrong, share_of_right_alarms(flagged))
    if any(part.bins and not part.checked for part in (flagged, others)):
        return found
    uncertain = sum(part.checked < part.bins for part in (flagged, others))
    confidence = CONFIDENCE ** (1 / max(1, uncertain))
    low, high = interval(flagged, confidence)
    other_low, other_high = interval(others, confidence)
    value = expected_wrong(flagged)
    total = value + expected_wrong(others)
    found = found._replace(wrong_records=Estimate(total, low + other_low, high + other_high))
    if not total:
        return found
    return found._replace(
        found=Estimate(
            value / total, low / max(1, low + other_high), high / max(1, high + other_low)
        ),
        best_share=best_share(alarms, flagged.bins / max(1, flagged.checked), total),
    )


def share_of_right_alarms(flagged: Part) -> Estimate | None:
    if not flagged.checked:
        return None
    bounds = (expected_wrong(flagged), *interval(flagged, CONFIDENCE))
    return Estimate(*(number / flagged.bins for number in bounds))


def best_share(
    alarms: Sequence[tuple[float, bool]], weight: float, wrong_records: float
) -> float | None:
    """The false-alarm share with the best balance of right alarms and wrong records found.

    That is the one with the highest F1 (van Rijsbergen, Information Retrieval, 1979), the harmonic
    mean of the share of alarms that are right and the share of wrong records that they find. Each
    alarm stands for `weight` alarms. None if none was right.
    """
    best, highest = None, 0.0
    for share in sorted({share for share, _ in alarms}):
        raised = [wrong for flagged_at, wrong in alarms if flagged_at <= share]
        balance = 2 * weight * sum(raised) / (weight * len(raised) + wrong_records)
        if balance > highest:
            best, highest = share, balance
    return best


def describe(worth: Worth) -> str:
    """In one line, like "9 of 40 checked alarms were right (22%, 95% interval 12% to 38%)"."""
    if not worth.checked:
        return "no alarm was checked"
    share = worth.right_alarms
    parts = [
        f"{worth.wrong} of {worth.checked} checked alarms were right"
        + (
            f" ({share.value:.0%}, 95% interval {share.low:.0%} to {share.high:.0%})"
            if share
            else ""
        )
    ]
    if total := worth.wrong_records:
        parts.append(
            f"about {total.value:.0f} records are wrong in all"
            f" ({total.low:.0f} to {total.high:.0f})"
        )
    if found := worth.found:
        parts.append(
            f"the list finds {found.value:.0%} of them ({found.low:.0%} to {found.high:.0%})"
        )
    if worth.best_share is not None:
        parts.append(f"the best balance is at --false-alarm {worth.best_share:g}")
    return "; ".join(parts)


def expected_wrong(part: Part) -> float:
    """The Horvitz-Thompson estimate of the wrong records of a part."""
    return part.bins * part.wrong / part.checked if part.checked else 0.0


@lru_cache(maxsize=4096)
def interval(part: Part, confidence: float) -> tuple[int, int]:
    """The fewest and the most wrong records that a part may have.

    The tails of the hypergeometric distribution are inverted, as Clopper and Pearson do with those
    of the binomial one (Konijn, Statistical Theory of Sample Survey Design and Analysis, 1973). The
    interval never holds less often than `confidence` says, however few bins were checked.
    """
    right = part._replace(wrong=part.checked - part.wrong)
    tail = (1 - confidence) / 2
    return part.bins - most_wrong(right, tail), most_wrong(part, tail)


def most_wrong(part: Part, tail: float) -> int:
    """The most wrong records with which so few wrong ones are drawn with a chance above `tail`."""
    low, high = part.wrong, part.bins - (part.checked - part.wrong)
    while low < high:
        middle = (low + high + 1) // 2
        if chance_of_so_few(part, middle) > tail:
            low = middle
        else:
            high = middle - 1
    return low


def chance_of_so_few(part: Part, wrong: int) -> float:
    """The chance to draw at most `part.wrong` wrong bins if the part has `wrong` of them."""
    fewest = max(0, part.checked - (part.bins - wrong))
    drawn = np.arange(fewest, min(part.wrong, wrong) + 1)
    ways = log_choose(wrong, drawn) + log_choose(part.bins - wrong, part.checked - drawn)
    return float(np.exp(ways - log_choose(part.bins, part.checked)).sum())


def log_choose(items: int, chosen: NDArray[np.int64] | int) -> NDArray[np.float64]:
    ways: NDArray[np.float64] = (
        gammaln(items + 1) - gammaln(chosen + 1) - gammaln(items - chosen + 1)
    )
    return ways
