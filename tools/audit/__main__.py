"""Find the bins whose inventory record is probably wrong, judging by their photographs.

Writes two files into a folder: audit.csv, a row for each bin with the expected count and the one
that the photograph shows, and index.html, a page of the alarms with their photographs, the surest
first. An alarm is a bin whose photograph makes the expected count improbable; how improbable
follows from --false-alarm.
"""

import argparse
import sys
import traceback
from pathlib import Path
from typing import Never

from stages.runtime.command import explain
from stages.runtime.machine import allow_open_files

EPILOG = """\
expected counts, without --expected:
  photographs in bin-images/   from the records beside them, metadata/<id>.json
  Parquet shards               from their column `quantity`

examples:
  python -m tools.audit photographs --expected counts.csv
  python -m tools.audit s3://aft-vbi-pds --model models/vit
  python -m tools.audit data/resized --false-alarm 0.01 --out nightly

exit codes, for a nightly job:
  0   no alarms
  1   alarms
  2   an error: nothing could be audited
  130 stopped by Ctrl-C

An audit that was stopped or killed continues where it was when it is started again. Ids are texts:
00100 and 100 are two bins. In a spreadsheet, import the column `id` of audit.csv as text.
"""


def main() -> None:
    arguments = vars(make_parser().parse_args())
    allow_open_files()
    try:
        # torch takes seconds to import; --help and a wrong option do not wait for it.
        from tools.audit.run import audit  # noqa: PLC0415

        alarms = audit(**arguments)
    except KeyboardInterrupt:
        print("audit: interrupted; the next run continues from here", file=sys.stderr)
        sys.exit(130)
    except FileNotFoundError as error:
        fail(f"{error}: check this path, and run again")
    except Exception as error:  # noqa: BLE001 - Python itself would exit with 1, the code of alarms
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
        help="a folder of <id>.jpg or bin-images/<id>.jpg; s3://bucket/prefix with the same;"
        " or a Parquet file, or a folder of them, with the columns id and image",
    )
    parser.add_argument(
        "--expected",
        type=Path,
        metavar="PATH",
        help="a CSV with the columns id and expected (or quantity), or a folder of <id>.json",
    )
    parser.add_argument(
        "--model",
        type=Path,
        action="append",
        default=[],
        metavar="FOLDER",
        help="for example models/vit; repeat it to average several; default: all of models/",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("audit"), metavar="FOLDER", help="default: audit"
    )
    parser.add_argument(
        "--false-alarm",
        type=share,
        default=0.05,
        metavar="SHARE",
        help="the share of the right records that may become alarms; default: 0.05",
    )
    parser.add_argument(
        "--top",
        type=whole,
        default=200,
        metavar="BINS",
        help="the most alarms that the page shows; default: 200",
    )
    s3 = parser.add_argument_group("S3")
    s3.add_argument("--endpoint", metavar="URL", help="the address of an S3-compatible server")
    s3.add_argument("--region", default="us-east-1", help="default: us-east-1")
    s3.add_argument(
        "--signed",
        action="store_true",
        help="sign requests with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY of the environment",
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
