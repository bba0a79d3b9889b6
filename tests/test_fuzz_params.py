"""Every key of params.yaml with values that it cannot have: taken with its meaning, or refused.

For more cases, and others each time:

    FUZZ_CASES=100000 python -m pytest tests/test_fuzz_params.py
"""

import datetime
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML
from ruamel.yaml.nodes import MappingNode

from stages.runtime import params
from stages.runtime.errors import UserError
from stages.runtime.params import Params, load_params
from tests.conftest import REPOSITORY, changed_params
from tests.test_fuzz import cases

Meaning = Callable[[Any], bool]
LARGEST = 2**31 - 1


def one_of(*values: Any) -> Meaning:
    return lambda value: any(type(value) is type(one) and value == one for one in values)


def integer(least: int, most: int = LARGEST) -> Meaning:
    return lambda value: type(value) is int and least <= value <= most


def number(least: float, most: float) -> Meaning:
    return lambda value: type(value) in (int, float) and least <= value <= most


def between(least: float, most: float) -> Meaning:
    """Without the ends."""
    return lambda value: type(value) in (int, float) and least < value < most


def text(pattern: str) -> Meaning:
    return lambda value: isinstance(value, str) and bool(re.fullmatch(pattern, value, re.ASCII))


def list_of(meaning: Meaning, least: int, most: int) -> Meaning:
    return lambda value: (
        isinstance(value, list) and least <= len(value) <= most and all(map(meaning, value))
    )


def either(one: Meaning, other: Meaning) -> Meaning:
    return lambda value: one(value) or other(value)


def quantities(value: Any) -> bool:
    return list_of(integer(0), 2, 10**6)(value) and len(set(value)) == len(value)


def as_json(value: Any) -> bool:
    if isinstance(value, dict):
        return all(as_text(key) and as_json(inner) for key, inner in value.items())
    if isinstance(value, list):
        return all(map(as_json, value))
    if isinstance(value, float):
        return math.isfinite(value)
    return value is None or isinstance(value, bool | int) or as_text(value)


def as_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def configuration(value: Any) -> bool:
    return isinstance(value, dict) and as_json(value)


TRUTH = one_of(True, False)
FLOAT32 = number(1.2e-38, 3.4e38)
NAME = "[A-Za-z0-9][A-Za-z0-9._-]*"
MODEL: dict[str, Meaning] = {
    "library": one_of("torchvision", "transformers"),
    "name": text(f"(?=.{{1,96}}$){NAME}(/{NAME})?"),
    "revision": text(f"(?=.{{1,96}}$){NAME}"),
    "pretrained": TRUTH,
    "config": configuration,
    "freeze_backbone": TRUTH,
    "loss": one_of("cross_entropy", "ordinal"),
    "label_smoothing": lambda value: number(0, 1)(value) and value != 1,
    "optimizer": one_of("adam", "adamw"),
    "learning_rate": FLOAT32,
    "weight_decay": number(0, 3.4e38),
    "schedule": one_of("constant", "linear", "cosine"),
    "warmup_steps": integer(0),
    "clip_norm": either(one_of(None), FLOAT32),
    "ema_decay": either(one_of(None), between(0, 1)),
    "batch_size": integer(1),
    "accumulation": integer(1, 128),
    "epochs": integer(1, 100_000),
    "mean": list_of(number(0, 1), 3, 3),
    "std": list_of(number(0.001, 1), 3, 3),
    "horizontal_flip": TRUTH,
    "color_jitter": number(0, 1),
    "compile": one_of("auto", True, False),
    "seed": integer(0, 2**32 - 1),
}
#: What each key may be while the others are as in the repository's file.
MEANINGS: dict[str, Meaning] = {
    "executor": one_of("local", "ray"),
    "bucket.url": text(r"s3://[a-z0-9]([a-z0-9-]{1,61}[a-z0-9])(/\w+)*/?|file:///[\w/.]*"),
    "bucket.region": text(r"(?=.{1,63}$)[a-z0-9]+(-[a-z0-9]+)*"),
    "bucket.endpoint": either(one_of(None), text(r"https?://[\w-]+(\.[\w-]+)*(:9000)?(/\w+)*/?")),
    "bucket.anonymous": TRUTH,
    "index.max_rejects": number(0, 1),
    "subset.quantities": quantities,
    "subset.bins": integer(220_000),
    "subset.seed": integer(0, 2**32 - 1),
    "fetch.shard_bins": integer(1, 10_000),
    "fetch.max_rejects": number(0, 1),
    "resize.size": integer(8, 4096),
    "resize.fit": one_of("squeeze", "pad"),
    "resize.quality": integer(1, 100),
    "resize.max_rejects": number(0, 1),
    "split.train": integer(1, 198_000),
    "split.test": integer(1, 22_000),
    "split.validation": between(0, 1),
    "split.by": one_of("group", "image"),
    "split.seed": integer(0, 2**32 - 1),
    "run.processes": either(one_of("auto"), integer(1, 1024)),
    "run.checkpoint_minutes": FLOAT32,
    "run.deterministic": TRUTH,
    **{f"train.resnet34.{key}": meaning for key, meaning in MODEL.items()},
    **{f"train.vit.{key}": meaning for key, meaning in MODEL.items()},
    "train.vit.accumulation": integer(1, 64),
    "train.vit.config": lambda value: (
        configuration(value) and isinstance(value.get("model_type"), str)
    ),
    "evaluate.batch_size": integer(1),
    "evaluate.false_alarm": between(0, 1),
}
# With a configuration for both libraries, resnet34 would be of either.
MEANINGS["train.resnet34.library"] = one_of("torchvision")

SECRET = "hunter2"  # noqa: S105
TEXTS = [
    *("", " ", "auto", "vit", "adam", "group", "pad", "5", "-1", "1e-3", "nan", "true", "null"),
    *(
        "~",
        "../x",
        "a/../b",
        "..",
        "a/b",
        "a" * 97,
        "x" * 10_000,
        "a\0b",
        "a\nb",
        "\x1b[31m",
        "\x7f",
    ),
    *("é", "\u0663", "\uff11", "\u202e", "\ud800", "us-east-1\n", "us--east", "-", "US"),
    *("s3://bins", "s3://a..b", "s3://bins/../y", "s3://bins//y", "s3://bins/.", "s3://ab"),
    *("s3://" + "a" * 64, "s3://bins/a\0b", "s3://bins/a?b", "s3://BINS", "s3://192", "s3://b_b"),
    *("file:///folder", "file://folder", "file:///a%00b", "file:///a%0ab", "s3://bins/a\n"),
    *("http://h", "http://h:0", "http://h:65536", "http://h/..", "http://h?a=b", "http://h#a"),
    *("http://h:9000/a/b/", "http://h\0", "http://a..b", "http://h:9000a", "HTTP://h", "ftp://h"),
    f"http://user:{SECRET}@host",
    f"s3://{SECRET}:{SECRET}@bins",
    f"https://host/?X-Amz-Signature={SECRET}",
]
NUMBERS = [
    *(0, 1, -1, 2, 3, 8, 100, 129, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, 10**400, -(10**400)),
    *(0.0, -0.0, 0.5, 1.0, -0.5, 2.0, 500.0, 1e6, 1e-320, 1e300, math.inf, -math.inf, math.nan),
]
OTHERS = [
    *(None, True, False, [], {}, [1], [1, 2], [1, 2, 2], [1, -2], [True, 2], [1.0, 2], ["1", "2"]),
    *([0.5] * 3, [500.0] * 3, [0.0] * 3, [1e-4] * 3, [0.5, math.nan, 0.5], [0.5, 0.5, "0.5"]),
    *([[1]], {"a": 1}, {"": None}, {1: 2}, {"a": {1: 2}}, {None: 1}, {"model_type": "vit"}),
    *({"model_type": "vit", "a": math.inf}, {"model_type": "vit", "a": "\ud800"}),
    *({"model_type": 5}, {"model_type": None}, {"model_type": "vit", "a": math.nan}),
    *({"model_type": "vit", "a": [{"b": 1.5}]}, {"model_type": "vit", "a": {1, 2}}),
    *(datetime.date(2001, 1, 1), datetime.datetime(2001, 1, 1), b"bytes", {1, 2}, (1, 2)),
    [f"http://user:{SECRET}@host"],
    {f"http://user:{SECRET}@host": 1},
    [1] * 10_000,
]
VALUES = [*TEXTS, *NUMBERS, *OTHERS]


def leaves(values: Mapping[str, Any], place: str = "") -> Iterator[str]:
    for key, value in values.items():
        if isinstance(value, dict) and key != "config":
            yield from leaves(value, f"{place}{key}.")
        else:
            yield f"{place}{key}"


VALUES_OF_FILE = changed_params({})
LEAVES = list(leaves(VALUES_OF_FILE))
MODELS = ["train.resnet34", "train.vit"]
BLOCKS = ["bucket", "index", "subset", "fetch", "resize", "split", "train", *MODELS, "evaluate"]
ABSENT = object()


@contextmanager
def changed(key: str, value: Any) -> Iterator[dict[str, Any]]:
    """The values of the repository's file with another value for a key, or without it."""
    *blocks, last = key.split(".")
    block = VALUES_OF_FILE
    for name in blocks:
        block = block[name]
    before = block.get(last, ABSENT)
    block[last] = value
    if value is ABSENT:
        del block[last]
    yield VALUES_OF_FILE
    block[last] = before
    if before is ABSENT:
        del block[last]


def load(values: Any) -> Params | UserError:
    """What load_params makes of a file with these values, which YAML takes 10 ms to read."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(params, "_read_yaml", lambda _: values)
        try:
            return load_params()
        except UserError as error:
            return error


def assert_refused(result: Params | UserError, key: str) -> None:
    """By the name of the key, or of something in it, on one line, without a secret."""
    assert isinstance(result, UserError)
    message = str(result)
    assert re.search(rf"(?<![\w.]){re.escape(key)}(?!\w)", message), message
    assert message.isprintable()
    assert len(message) < 5000
    assert SECRET not in message


def check(key: str, value: Any) -> None:
    with changed(key, value) as values:
        result = load(values)
    if not MEANINGS[key](value):
        assert_refused(result, key)
        return
    assert isinstance(result, Params), f"{result} refuses {value!r}"
    loaded: Any = result.model_dump()
    for name in key.split("."):
        loaded = loaded[name]
    assert loaded == value
    assert type(loaded) in {type(value), float if type(value) is int else type(value)}


def test_the_meaning_of_every_key_is_known() -> None:
    assert MEANINGS.keys() == set(LEAVES)


@pytest.mark.parametrize("key", LEAVES)
def test_a_value_is_taken_with_its_meaning_or_refused_by_its_name(key: str) -> None:
    for value in VALUES:
        check(key, value)


SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-3, 300)
    | st.integers()
    | st.floats()
    | st.floats(0, 1)
    | st.text(max_size=20)
    | st.sampled_from(VALUES)
    | st.from_regex(r"\A(s3|file|https?)://?[a-z0-9.:@/_ -]{0,12}\Z")
)


@cases(2000)
@given(st.sampled_from(LEAVES), SCALARS | st.lists(SCALARS, max_size=4))
def test_any_value_is_taken_with_its_meaning_or_refused_by_its_name(key: str, value: Any) -> None:
    check(key, value)


@pytest.mark.parametrize("key", [*BLOCKS, *LEAVES])
def test_a_missing_key_is_refused_by_its_name(key: str) -> None:
    with changed(key, ABSENT) as values:
        # Any model may be missing.
        if key in MODELS:
            assert isinstance(load(values), Params)
        else:
            assert_refused(load(values), key)


@pytest.mark.parametrize("block", BLOCKS)
def test_a_block_that_is_none_is_refused_by_its_name(block: str) -> None:
    for value in VALUES:
        with changed(block, value) as values:
            assert_refused(load(values), block)


NAMES = [
    *(
        "colour",
        "bool",
        "int",
        "str",
        "[key]",
        "literal['auto']",
        "constrained-int",
        "self",
        "Seed",
    ),
    *("model_config", "__class__", "", " ", "1", "é", "a/b", "x" * 80),
]


@pytest.mark.parametrize("block", ["", *(f"{block}." for block in BLOCKS)])
def test_a_key_too_many_is_refused_by_its_name(block: str) -> None:
    for name in NAMES:
        with changed(f"{block}{name}", 1) as values:
            result = load(values)
        assert isinstance(result, UserError)
        assert f"{block}{name}: " in str(result)


@pytest.mark.parametrize(
    "name", ["a\0b", "a\nb", "\x1b[31m", "x" * 10_000, f"u:{SECRET}@h", 5, None]
)
def test_a_key_that_cannot_be_shown_is_refused_all_the_same(name: Any) -> None:
    result = load({**VALUES_OF_FILE, name: 1})
    assert isinstance(result, UserError)
    assert str(result).isprintable()
    assert len(str(result)) < 200
    assert SECRET not in str(result)


def test_a_configuration_that_is_too_deep_is_refused() -> None:
    deep: list[Any] = []
    for _ in range(5000):
        deep = [deep]
    with changed("train.resnet34.config", {"a": deep}) as values:
        assert_refused(load(values), "train.resnet34.config")


def lines_of(node: MappingNode, place: str = "") -> Iterator[tuple[str, int]]:
    """Each key of the file with the number of its line, from 0."""
    for key, value in node.value:
        yield f"{place}{key.value}", key.start_mark.line
        if isinstance(value, MappingNode) and key.value != "config":
            yield from lines_of(value, f"{place}{key.value}.")


TEXT = (REPOSITORY / "params.yaml").read_text("utf-8")
LINES = dict(lines_of(YAML(typ="safe", pure=True).compose(TEXT)))


@pytest.mark.parametrize("key", LINES)
def test_a_key_that_is_there_twice_is_refused_by_its_name(tmp_path: Path, key: str) -> None:
    lines = TEXT.splitlines(keepends=True)
    line = lines[LINES[key]]
    indent = line[: len(line) - len(line.lstrip())]
    name = key.rpartition(".")[2]
    lines.insert(LINES[key], f"{indent}{name}: http://user:{SECRET}@host\n")
    path = tmp_path / "params.yaml"
    path.write_text("".join(lines), "utf-8")
    with pytest.raises(UserError) as caught:
        load_params(path)
    assert str(caught.value) == f"{path} is not YAML: {key} is there twice"
