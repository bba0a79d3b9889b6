"""Find bins whose inventory record is probably wrong, judging by their photographs.

Writes three files into a folder: audit.csv, with the expected count of every bin and the count that
its photograph shows; index.html, a page of the flagged bins with their photographs, where somebody
who checks them notes what they found; and audit.json, a summary for other programs. A bin is
flagged (an alarm) when its recorded count is less likely than those of 95% of correct records;
--false-alarm changes that share.
"""

import argparse
import sys
import traceback
from pathlib import Path
from typing import Never, get_args

from stages.runtime.command import explain
from stages.runtime.machine import allow_open_files
from stages.runtime.params import Threshold

EPILOG = """\
where expected counts come from without --expected:
  photographs in bin-images/   the records metadata/<id>.json beside that folder
  Parquet files                their column `quantity`

CSV files may be comma-, semicolon- or tab-separated, as Excel and databases save them. Ids that
lost their leading zeros in a spreadsheet are matched if only one photograph fits.

examples:
  python -m tools.audit photographs --expected counts.csv
  python -m tools.audit s3://aft-vbi-pds --model models/vit
  python -m tools.audit photographs --expected counts.csv --decisions decisions.csv --sample 50
  python -m tools.audit data/resized --false-alarm 0.01 --out nightly

exit codes, for a nightly job:
  0    no bin is flagged that was not decided before
  1    at least one such bin is flagged
  2    an error: there is no result
  130  stopped by Ctrl-C

If an audit is stopped, run the same command again: it continues from there. Ids are text, not
numbers: 00100 and 100 are two bins. Import the column `id` of audit.csv into a spreadsheet as text.
"""


def main() -> None:
    arguments = vars(make_parser().parse_args())
    allow_open_files()
    try:
        # Importing torch takes seconds, which --help and a wrong option need not wait for.
        from tools.audit.run import audit  # noqa: PLC0415

        alarms = audit(**arguments)
    except KeyboardInterrupt:
        print("audit: interrupted; the next run continues from here", file=sys.stderr)
        sys.exit(130)
    except FileNotFoundError as error:
        fail(f"{error}: check this path and run again")
    except Exception as error:  # noqa: BLE001 - Python would exit with 1, which means alarms
        fail(explain(error) or "".join(traceback.format_exception(error)))
    sys.exit(1 if alarms else 0)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.audit",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "photographs",
        help="a folder with <id>.jpg or bin-images/<id>.jpg, an s3://bucket/prefix with the same,"
        " a Parquet file with the columns id and image, or a folder of such files",
    )
    parser.add_argument(
        "--expected",
        type=Path,
        metavar="PATH",
        help="a CSV file with the columns id and expected (or quantity), or a folder of records"
        " <id>.json",
    )
    parser.add_argument(
        "--decisions",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="a file decisions.csv that the page of an earlier audit has saved: bins that were"
        " decided are not asked again while photograph and record are the same; repeat the option"
        " for several files, of which the later decision about a bin holds",
    )
    parser.add_argument(
        "--model",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="for example models/vit; repeat the option to average several models; default: every"
        " model in models/",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("audit"),
        metavar="FOLDER",
        help="where to write the three files; default: audit",
    )
    parser.add_argument(
        "--false-alarm",
        type=share,
        default=0.05,
        metavar="SHARE",
        help="the share of correct records that may be flagged; default: 0.05",
    )
    parser.add_argument(
        "--threshold",
        choices=get_args(Threshold),
        default="global",
        help="per_count flags the same share of correct records for each count, while one global"
        " threshold flags few records of the middle counts; default: global",
    )
    parser.add_argument(
        "--counts-only",
        action="store_true",
        help="do not judge the items of records, which finds more wrong counts, and no record with"
        " the right count and other items; without it, items are judged if records list them and"
        " there is a folder models/witness",
    )
    parser.add_argument(
        "--top",
        type=whole,
        default=200,
        metavar="BINS",
        help="show at most this many flagged bins on the page; default: 200",
    )
    parser.add_argument(
        "--sample",
        type=whole,
        default=0,
        metavar="BINS",
        help="list also so many of the other bins, drawn at random and not told apart, to learn how"
        " many records are wrong in all; default: 0",
    )
    parser.add_argument(
        "--seed",
        type=whole,
        default=0,
        metavar="NUMBER",
        help="another number draws other bins; default: 0",
    )
    parser.add_argument(
        "--all",
        action="store_true",
        dest="with_trained",
        help="audit also the bins that the models were trained on, according to data/split.csv;"
        " fewer of their wrong records are found, since the models have learned them",
    )
    s3 = parser.add_argument_group("S3")
    s3.add_argument("--endpoint", metavar="URL", help="the address of an S3-compatible server")
    s3.add_argument("--region", default="us-east-1", help="the bucket's region; default: us-east-1")
    s3.add_argument(
        "--signed",
        action="store_true",
        help="for a private bucket: sign requests with the credentials of the AWS command line"
        " (AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_PROFILE, SSO or a role)",
    )
    return parser


def share(text: str) -> float:
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return number


def whole(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def fail(text: str) -> Never:
    print(f"audit: error: {text}", file=sys.stderr)
    sys.exit(2)


if __name__ == "__main__":
    main()
