from contextlib import suppress
from pathlib import Path

import pandas as pd

from stages.formats.tables import write_csv, write_json
from stages.runtime.files import atomic_write, digest, digest_files, sha256_file


class StopError(Exception):
    """What breaks the work in these tests."""


def fail_while_writing(path: Path) -> None:
    with suppress(StopError), atomic_write(path) as temporary:
        temporary.write_text("half")
        raise StopError


def test_a_written_file_is_whole_and_alone(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "out.txt"
    with atomic_write(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
    assert path.read_text() == "whole"
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "out.txt"
    path.write_text("old")
    fail_while_writing(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_first_write_leaves_nothing(tmp_path: Path) -> None:
    fail_while_writing(tmp_path / "out.txt")
    assert list(tmp_path.iterdir()) == []


def test_a_hard_link_into_the_cache_keeps_its_bytes(tmp_path: Path) -> None:
    cached, out = tmp_path / "cached", tmp_path / "out"
    cached.write_text("old")
    out.hardlink_to(cached)
    with atomic_write(out) as temporary:
        temporary.write_text("new")
    assert (cached.read_text(), out.read_text()) == ("old", "new")


def test_json_is_readable_utf8(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    write_json(path, {"name": "Thé", "bins": 3})
    assert path.read_bytes() == '{\n  "name": "Thé",\n  "bins": 3\n}\n'.encode()


def test_csv_has_six_digits_and_unix_lines(tmp_path: Path) -> None:
    path = tmp_path / "out.csv"
    table = pd.DataFrame({"id": ["00100", "100"], "share": [1 / 3, 1234567.0], "bins": [7, 10**9]})
    write_csv(path, table)
    assert path.read_bytes() == (b"id,share,bins\n00100,0.333333,7\n100,1.23457e+06,1000000000\n")


def test_digests_tell_apart_what_differs() -> None:
    parts: list[tuple[object, ...]] = [(), ("a",), ("a", "b"), ("ab",), (1,), ("1",), (("a",),)]
    assert len({digest(*some) for some in parts}) == len(parts)
    assert digest("a", 1) == digest("a", 1)


def test_a_file_has_the_sha256_that_sha256sum_prints(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert sha256_file(path).startswith("ba7816bf8f01cfea414140de5dae2223")


def write_texts(folder: Path, texts: dict[str, str]) -> list[Path]:
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]


def test_files_have_the_digest_of_their_names_and_contents(tmp_path: Path) -> None:
    some = {"a": "1", "b": "2"}
    digests = [
        digest_files(write_texts(tmp_path / str(number), texts))
        for number, texts in enumerate(
            [
                some,
                some,
                {"a": "1", "b": "3"},
                {"a": "1", "c": "2"},
                {"b": "1", "a": "2"},
                {"a": "1"},
            ]
        )
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 5
    assert digest_files(iter([])) == digest_files([])
