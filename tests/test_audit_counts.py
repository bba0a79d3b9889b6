"""CSV files of counts: files from spreadsheets and exports are read, and nothing is guessed."""

import codecs
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.runtime.errors import UserError
from tools.audit.counts import CountsError, match_ids, parse_counts
from tools.audit.expected import UNCLEAR, read_counts

PLAIN = "id,expected\n00100,3\n100,12\n-7,\n"
ROWS = {"00100": 3, "100": 12, "-7": None}
TABS = PLAIN.replace(",", "\t")
SEMICOLONS = PLAIN.replace(",", ";")


@pytest.mark.parametrize(
    ("data", "form"),
    [
        (PLAIN, ""),
        (codecs.BOM_UTF8 + PLAIN.encode(), ""),
        (PLAIN.replace("\n", "\r\n"), ""),
        (PLAIN.replace("\n", "\r"), ""),
        (PLAIN.removesuffix("\n"), ""),
        (f"\n ,\n{PLAIN},\n\n,,,\n   \n", ""),
        (PLAIN.replace("id,expected", "ID, Expected "), ""),
        (PLAIN.replace("id,expected", '"Id","EXPECTED"'), ""),
        (PLAIN.replace("expected", "Quantity"), ""),
        (PLAIN.replace(",12", ',"12"').replace("00100", '"00100"'), ""),
        (PLAIN.replace(",12", ", 12 ").replace("-7", "\u00a0-7"), ""),
        (PLAIN.replace(",12", ",12.0").replace(",3", ",3.00"), ""),
        (PLAIN.replace(",12", ",12.0000"), ""),
        (PLAIN.replace("-7,", "-7,NULL"), ""),
        (PLAIN.replace("-7,", "-7,#N/A"), ""),
        (PLAIN.replace("00100", "00100.jpg").replace("-7", "-7.JPEG"), ""),
        (PLAIN.replace("00100", '="00100"'), ""),
        (PLAIN.replace("00100", '"=""00100"""'), ""),
        ('quantity,note,id\n3,"a, ""b""\nc",00100\n12,,100\n,,-7\n', ""),
        ("id,expected\n00100,3,\n100,12,,\n-7\n", ""),
        ("id,note,expected\n00100,Stra\u00dfe; 5,3\n100,\u2713,12\n-7\n", ""),
        (SEMICOLONS, "semicolon-separated"),
        (SEMICOLONS.replace(";12", ";12,0").replace(";3", ";3,00"), "semicolon-separated"),
        (SEMICOLONS.replace(";12", ";12.0"), "semicolon-separated"),
        (f"sep=;\r\n{SEMICOLONS}", "semicolon-separated"),
        ("id;a,b;expected\n00100;;3\n100;c,d;12\n-7\n", "semicolon-separated"),
        (TABS, "tab-separated"),
        (PLAIN.replace(",", "|"), "pipe-separated"),
        (TABS.encode("utf-16"), "UTF-16, tab-separated"),
        (codecs.BOM_UTF16_BE + TABS.encode("utf-16-be"), "UTF-16, tab-separated"),
        (TABS.encode("utf-16-le"), "UTF-16, tab-separated"),
        (TABS.encode("utf-16-be"), "UTF-16, tab-separated"),
        (
            "id;expected;Gr\u00f6\u00dfe\n00100;3;\u20ac\n100;12\n-7\n".encode("cp1252"),
            "Windows-1252, semicolon-separated",
        ),
        # A byte that Windows-1252 does not define.
        (b"id,expected,x\n00100,3,\x81\n100,12\n-7\n", "Windows-1252"),
    ],
)
def test_files_from_spreadsheets_and_exports_are_read(data: str | bytes, form: str) -> None:
    listed = parse_counts(data if isinstance(data, bytes) else data.encode())

    assert listed.rows == ROWS
    assert listed.form == form


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,expected\n00100,3\n100,4\n00100,5\n", "line 4 lists the bin 00100 again"),
        # Several rows of a bin may list its items.
        ("id,expected\n7,1\n7,1\n", "line 3 lists the bin 7 again: keep one row for each bin"),
        ("id,expected\n7,\n7,1\n", "line 3 lists the bin 7 again"),
        ("id,expected\n7,1\n7.jpg,1\n", "line 3 lists the bin 7 again"),
        ("id,expected\n7,1\n\n8,three\n", "line 4: the count of 8 is 'three', which is not clea"),
        ("sep=,\nid,expected\n7,x\n", "line 3: the count of 7 is 'x'"),
        ("id,expected\n7,1.234\n", "line 2: the count of 7 is '1.234'"),
        ("id,expected\n7,1.000\n", "the count of 7 is '1.000'"),
        ("id;expected\n7;1,000\n", "the count of 7 is '1,000'"),
        ("id;expected\n7;1.000,0\n", "the count of 7 is '1.000,0'"),
        ('id,expected\n7,"1,234"\n', "the count of 7 is '1,234'"),
        ('id,expected\n7,"1,0"\n', "the count of 7 is '1,0'"),
        ("id,expected\n7,1,234\n", "line 2 has more cells than the first line: put quotes"),
        ("id,expected\n7,1,5\n", "line 2 has more cells than the first line"),
        ("id;expected\n7;1,5\n", "the count of 7 is '1,5'"),
        ("id,expected\n7,1.5\n", "the count of 7 is '1.5'"),
        ("id,expected\n7,3.\n", r"the count of 7 is '3\.'"),
        ("id,expected\n7,1e3\n", "the count of 7 is '1e3'"),
        ("id,expected\n7,-1\n", "the count of 7 is '-1'"),
        ("id,expected\n7,\u0663\n", r"the count of 7 is '\\u0663'"),
        ("id,expected\n7,9999999999\n", "the count of 7 is '9999999999'"),
        ("id,expected\n7,=2+1\n", r"the count of 7 is '=2\+1'"),
        ("id,expected\n../../etc/passwd,3\n", "line 2: '../../etc/passwd' is not a bin's id"),
        ("id,expected\nphotographs/7.jpg,3\n", "'photographs/7.jpg' is not a bin's id"),
        ("id,expected\n7.png,3\n", "'7.png' is not a bin's id"),
        ("id,expected\n.jpg,3\n", "'.jpg' is not a bin's id"),
        ("id,expected\n7.0,3\n", "'7.0' is not a bin's id"),
        # Cells that a spreadsheet would execute.
        ("id,expected\n=1+1,3\n", "line 2: '=1\\+1' is not a bin's id"),
        ("id,expected\n\"-1+cmd|' /C calc'!A0\",3\n", "is not a bin's id"),
        ("id,expected\n-HYPERLINK(1),3\n", "is not a bin's id"),
        ("id,expected\n\t=1,3\n", "is not a bin's id"),
        ("id,expected\n<script>,3\n", "'<script>' is not a bin's id"),
        ('id,expected\n"7\n8",3\n', r"line 3: '7\\n8' is not a bin's id"),
        ("id,expected\n,3\n", "line 2: '' is not a bin's id"),
        (f"id,expected\n{'x' * 10_000},3\n", "line 2: 'xxx"),
        ("bin,expected\n7,3\n", "the first line is 'bin,expected', but should name the columns id"),
        ("7,3\n8,4\n", "the first line is '7,3', but should name the columns id and expected"),
        ("", "the first line is ''"),
        ("\n\n", "the first line is ''"),
        ("id expected\n7 3\n", "the first line is 'id expected'"),
        ("id,expected,a;id;expected\n7,3,a;8;4\n", "the first line is 'id,expected,a;id;expected'"),
        (
            "id,expected,quantity\n7,3,4\n",
            "two columns could be expected: expected and quantity; keep one",
        ),
        (
            "id,Expected,expected\n7,3,3\n",
            "two columns could be expected: expected and expected; keep",
        ),
        ("id,ID,expected\n7,8,3\n", "two columns could be id: id and id; keep one"),
        (b"id,expected\n\xff,3\n", r"line 2: '\\xff' is not a bin's id"),
        (b"PK\x03\x04\x00\x00id,expected\n7,3\n", "this is not a text file: save or export"),
        (codecs.BOM_UTF32_LE + "id,expected\n".encode("utf-32-le"), "this is not a text file"),
        ('id,expected\n7,"3\n', "this is not a CSV: "),
        (f'id,expected\n7,"{"3" * 200_000}"\n', "this is not a CSV: field larger than"),
    ],
)
def test_files_that_would_need_guessing_are_refused(
    tmp_path: Path, text: str | bytes, message: str
) -> None:
    path = tmp_path / "counts.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())

    with pytest.raises(UserError, match=message) as caught:
        read_counts(path, [])
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


@given(st.one_of(st.binary(), st.binary().map(lambda data: b"id,expected\n" + data)))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        listed = parse_counts(data)
    except CountsError:
        return
    assert all(count is None or count >= 0 for count in listed.rows.values())


@pytest.mark.parametrize(
    ("rows", "photographs", "matched", "padded", "unclear"),
    [
        ("00001 00002", "00001 00002", "00001=00001 00002=00002", 0, ""),
        ("1 20 12345", "00001 00020 12345", "1=00001 20=00020 12345=12345", 2, ""),
        ("0", "00000", "0=00000", 1, ""),
        # Only zeros are added: 00001 is not the bin 1.
        ("00001", "1", "00001=00001", 0, ""),
        ("1 a1 -1", "0a1 -01", "1=1 a1=a1 -1=-1", 0, ""),
        # Two bins, both in the file.
        ("1 00001", "1 00001", "1=1 00001=00001", 0, ""),
        # Another id still has its zeros, so 1 is the bin 1.
        ("1 00002", "1 00001 00002", "1=1 00002=00002", 0, ""),
        ("1 01", "01 001", "1=001 01=01", 1, ""),
        # No id still has its zeros, so 1 could be either.
        ("1 12345", "1 00001 12345", "12345=12345", 0, "1 00001"),
        ("1 2", "01 001 00002", "2=00002", 1, "01 001"),
        ("1 01", "00001", "", 0, "00001"),
        ("1 01", "00001 000001", "", 0, "00001 000001"),
    ],
)
def test_ids_that_lost_their_zeros_match_the_only_photograph_that_they_can_mean(
    rows: str, photographs: str, matched: str, padded: int, unclear: str
) -> None:
    numbers = {row: number for number, row in enumerate(rows.split())}

    found = match_ids(numbers, photographs.split())

    pairs = (pair.split("=") for pair in matched.split())
    assert found.rows == {bin_id: numbers[row] for row, bin_id in pairs}
    assert found.padded == padded
    assert set(found.unclear) == set(unclear.split())


def test_the_notes_say_how_a_file_was_read_and_what_was_left_out(tmp_path: Path) -> None:
    path = tmp_path / "counts.csv"
    path.write_bytes("ID;Expected\n1;3\n2;12,0\n3;\n20000;5\n".encode("utf-16"))

    found = read_counts(path, ["1", "00001", "00002", "00003", "20000"])

    assert found.counts == {"00002": 12, "20000": 5}
    assert found.problems == {"1": UNCLEAR, "00001": UNCLEAR, "00003": "no expected count"}
    assert found.notes == [
        "read as UTF-16, semicolon-separated",
        "ids whose lost leading zeros were restored: 2",
        "bins left out, since ids lost their leading zeros: 2 (1 could mean 1 or 00001); export the"
        " column id as text",
    ]
