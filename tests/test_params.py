"""params.yaml: what it may hold, and the one line that names every key at fault."""

import copy
import datetime
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import load_yaml
from ruamel.yaml import YAML

from stages.runtime import params
from stages.runtime.errors import UserError
from stages.runtime.params import Params, load_params
from tests.conftest import REPOSITORY, changed_params

RESNET, VIT = "train.resnet34", "train.vit"
TEXT = (REPOSITORY / "params.yaml").read_text("utf-8")
FILE = changed_params({})
ABSENT = object()


@pytest.fixture(scope="module")
def published() -> Params:
    return load_params(REPOSITORY / "params.yaml")


def load_text(folder: Path, text: str) -> Params:
    path = folder / "params.yaml"
    path.write_text(text, "utf-8")
    return load_params(path)


def load_changed(changes: Mapping[str, Any]) -> Params:
    """The repository's params with changes by dotted key; ABSENT removes a key.

    No file is written, since YAML takes a tenth of a second to read one.
    """
    values = copy.deepcopy(FILE)
    for key, value in changes.items():
        *blocks, last = key.split(".")
        block = values
        for name in blocks:
            block = block[name]
        block[last] = value
        if value is ABSENT:
            del block[last]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(params, "_read_yaml", lambda _: values)
        return load_params()


def problem_of(changes: Mapping[str, Any]) -> str:
    with pytest.raises(UserError) as caught:
        load_changed(changes)
    return str(caught.value).removeprefix("params.yaml: ")


def test_dvc_reads_the_same_values(published: Params) -> None:
    """And those of training are the published experiment's."""
    assert published.model_dump() == load_yaml(str(REPOSITORY / "params.yaml"))
    sizes = published.split
    assert sizes.train + sizes.validation + sizes.test == published.subset.bins == 230_000
    resnet, vit = published.model("resnet34"), published.model("vit")
    assert (resnet.learning_rate, resnet.batch_size, resnet.epochs) == (1e-3, 512, 10)
    assert (vit.learning_rate, vit.batch_size, vit.epochs) == (2e-5, 64, 5)


@pytest.mark.parametrize("number", ["1e-3", "5e-05", "1", "1.5E+1"])
def test_every_notation_of_a_number_is_a_float(tmp_path: Path, number: str) -> None:
    text = TEXT.replace("learning_rate: 1e-3", f"learning_rate: {number}")
    learning_rate = load_text(tmp_path, text).model("resnet34").learning_rate
    assert (type(learning_rate), learning_rate) == (float, float(number))


INT, FLOAT, BOOL = "be a whole number, not", "be a number, not", "be true or false, not"
REFUSED = [
    # The wrong type: nothing is converted.
    *[(key, "5", INT) for key in ("subset.bins", "split.seed", f"{VIT}.epochs")],
    *[(key, True, INT) for key in ("subset.bins", f"{VIT}.warmup_steps")],
    *[(key, 5.5, INT) for key in ("fetch.shard_bins", "evaluate.batch_size")],
    *[(key, "0.5", FLOAT) for key in ("index.max_rejects", f"{RESNET}.learning_rate")],
    *[(key, "no", BOOL) for key in ("bucket.anonymous", f"{RESNET}.horizontal_flip")],
    ("subset.quantities", 3, "should be a list, not 3"),
    (f"{VIT}.config", [1], "should be a block of keys, not a list"),
    ("train", [], "should be a block of keys, not a list"),
    ("bucket", None, "should be a block of keys, not null"),
    (f"{VIT}.pretrained", None, "should be true, false, or a path that begins with /, ./ or ../"),
    *[
        (f"{VIT}.pretrained", path, "should be true, false, or a path that begins with /, ./ or ")
        for path in ("", "yes", "weights", "~/net", "/", "./", 1)
    ],
    ("resize.size", True, "should be a whole number, not true"),
    ("bucket.region", datetime.date(2001, 1, 1), "should be text, not 2001-01-01"),
    # Outside the allowed values.
    *[(key, 0, "should be 1 or more, not 0") for key in ("subset.bins", f"{VIT}.batch_size")],
    *[(key, -1, "should be 0 or more, not -1") for key in ("split.seed", f"{VIT}.warmup_steps")],
    *[
        (key, 1.1, "should be 1 or less, not 1.1")
        for key in ("fetch.max_rejects", f"{VIT}.color_jitter", f"{VIT}.ordinal_share")
    ],
    *[(key, 1.0, "should be less than 1, not 1.0") for key in ("evaluate.false_alarm",)],
    *[
        (key, 0.0, "should be more than 0, not 0.0")
        for key in (f"{VIT}.clip_norm", f"{VIT}.ema_decay")
    ],
    *[(f"{VIT}.learning_rate", value, "finite number") for value in (math.nan, math.inf)],
    (f"{VIT}.rotation", 46.0, "should be 45 or less, not 46.0"),
    (f"{VIT}.shift", -0.1, "should be 0 or more, not -0.1"),
    ("subset.seed", 2**32, "less than 4294967296"),
    ("fetch.shard_bins", 10_001, "10000 or less"),
    ("resize.size", 0, "8 or more"),
    ("resize.quality", 101, "100 or less"),
    ("resize.fit", "crop", "'squeeze' or 'pad', not 'crop'"),
    ("split.by", "bin", "'group', 'image' or 'file'"),
    (f"{VIT}.library", "keras", "'torchvision', 'transformers' or 'timm', not"),
    ("run.processes", "all", "should be 'auto' or a whole number, not 'all'"),
    ("run.processes", 0, "should be 'auto' or 1 or more, not 0"),
    (f"{VIT}.compile", 1, "should be 'auto' or true or false, not 1"),
    ("subset.quantities", [], "should have two or more quantities, not 0"),
    ("subset.quantities", [3], "should have two or more quantities, not 1"),
    ("subset.quantities", [3, 1, 3], "has 3 more than once"),
    (f"{VIT}.mean", [0.5, 0.5], "should have 3 values, for red, green and blue, not 2"),
    (f"{VIT}.std", [0.5] * 4, "should have 3 values, for red, green and blue, not 4"),
    # Names and locations.
    *[("bucket.url", url, "should be like s3://bucket") for url in ("", "bins", "S3://b", "s3://")],
    ("bucket.url", "https://bins.s3.amazonaws.com", "should be like s3://bucket"),
    ("bucket.url", "file://folder", "should be like s3://bucket"),
    *[("bucket.endpoint", url, "should be like http://") for url in ("", "host:9", "ftp://host")],
    ("bucket.endpoint", "http://local host", "should be like http://"),
    ("bucket.region", "", "should be like us-east-1"),
    *[(f"{VIT}.name", name, "should be like resnet34") for name in ("", "../x", "a b", "a/b/c")],
    (f"{VIT}.revision", "..", "should be like IMAGENET1K_V1"),
    *[(f"train.{name}", 1, "should be like vit") for name in ("Big Model", "/up", "-dash")],
    # Values that a network's config.json cannot hold.
    *[
        (f"{RESNET}.config", {"a": value}, problem)
        for value, problem in (
            (math.nan, "finite number"),
            (datetime.date(2001, 1, 1), "should be text, a number"),
            ({1: 2}, "should be text"),
        )
    ],
    # Quantities.
    *[
        ("subset.quantities", [1, value], "should be a whole number up to 9999, or like 6+")
        for value in (-1, 2.0, True, "6", "0+", "+6", None, [2], 2**31)
    ],
    ("subset.quantities", [1, "2+", 3], "has 3, which is among 2+"),
    ("subset.quantities", [1, 2, "2+"], "has 2 more than once"),
    ("index", {"max_rejects": 0.5, 1: 2}, "should be a key that is text, not 1"),
    # Names of files.
    *[
        (key, name, "should be like mine.csv, a file in the folder lists")
        for key in ("subset.ids", "split.file")
        for name in ("", "mine.txt", "lists/mine.csv", "../mine.csv", "/mine.csv", ".csv")
    ],
    ("subset.ids", 3, "should be text, not 3"),
    # Superfluous and missing keys.
    *[(f"{block}colour", 1, "there is no such key") for block in ("", "bucket.", f"{VIT}.")],
    *[(key, ABSENT, "is missing") for key in ("bucket", "subset.seed", f"{RESNET}.optimizer")],
]


@pytest.mark.parametrize(("key", "value", "problem"), REFUSED)
def test_an_impossible_value_is_refused_with_its_key(key: str, value: Any, problem: str) -> None:
    text = problem_of({key: value})
    assert re.search(rf"(^|; ){re.escape(key)}\b.*{re.escape(problem)}", text), text


def test_a_wrong_element_is_named_by_its_position() -> None:
    text = problem_of({f"{RESNET}.std": [0.5, 58.4, 0.0]})
    assert f"{RESNET}.std.1: " in text
    assert f"{RESNET}.std.2: " in text


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        (f"{RESNET}.accumulation", 513, f"{RESNET}: accumulation (513) is more than batch_size"),
        (f"{VIT}.config", {}, f"{VIT}: config.model_type should be the type"),
        (
            VIT,
            FILE["train"]["vit"] | {"freeze": 2, "freeze_backbone": True},
            f"{VIT}: freeze is 2, but freeze_backbone freezes all layers",
        ),
        (f"{VIT}.config", {"model_type": 5}, f"{VIT}: config.model_type should be the type"),
        ("subset.bins", 1000, "split.train, split.validation and split.test are 230000 bins"),
        ("split.by", "file", "split: by is file, but file is null: name a CSV in lists/"),
        ("split.file", "mine.csv", "split: file is mine.csv, but by is group: set by to file too"),
        ("train", {}, "train has no model: give it a block for each"),
        ("train.figures", FILE["train"]["vit"], "train.figures has the name of"),
        ("train.baseline", FILE["train"]["vit"], "train.baseline has the name of"),
    ],
)
def test_values_that_do_not_go_together_are_named(key: str, value: Any, problem: str) -> None:
    assert problem_of({key: value}).startswith(problem)


@pytest.mark.parametrize("name", ["size", "nfiles"])
@pytest.mark.parametrize(
    "nested",
    [
        lambda name: {name: 224},
        lambda name: {"image": {name: 224}},
        lambda name: {"stages": [1, {"deep": [{name: None}]}]},
    ],
    ids=["top", "in a mapping", "in a list"],
)
def test_a_key_that_dvcs_run_cache_drops_is_refused(
    name: str, nested: Callable[[str], dict[str, Any]]
) -> None:
    """Another value would restore the model trained with the old one (treeverse/dvc#10296)."""
    text = problem_of({f"{VIT}.config": {"model_type": "vit", **nested(name)}})
    assert text.startswith(f"{VIT}.config: has the key {name}, which DVC ignores")
    assert text.endswith("remove this key")


def test_no_block_that_dvc_yaml_lists_as_a_whole_has_such_a_key(published: Params) -> None:
    stages = YAML(typ="safe").load(REPOSITORY / "dvc.yaml")["stages"].values()
    listed = {key for stage in stages for key in stage.get("do", stage).get("params", [])}
    values = published.model_dump()
    assert {"size"} <= values["resize"].keys()
    assert "resize" not in listed
    for block in values.keys() & listed:
        assert not {"size", "nfiles"} & values[block].keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"subset.bins": 10, "subset.ids": "mine.csv"},
        {"subset.bins": 10, "split.by": "file", "split.file": "mine.csv"},
    ],
    ids=["ids", "file"],
)
def test_a_list_decides_the_number_of_bins(changes: dict[str, Any]) -> None:
    loaded = load_changed(changes)
    assert "mine.csv" in {loaded.subset.ids, loaded.split.file}


def test_all_faults_are_named_at_once() -> None:
    text = problem_of({"subset.bins": 0, "resize.fit": "crop", "split.colour": 1})
    assert [part.split(":")[0] for part in text.split("; ")] == [
        *("subset.bins", "resize.fit", "split.colour")
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("bucket.url", url) for url in ("s3://b.1/a b/", "file:///a/../b", "file:///a%20@b")],
        *[("bucket.endpoint", url) for url in ("http://[::1]:9000", "https://minio_1/a/")],
        (f"{RESNET}.accumulation", 512),
        *[(f"{VIT}.pretrained", path) for path in ("/a b/c", "./a", "../../a.safetensors", "/ü@")],
        (f"{VIT}.library", "timm"),
        ("run.processes", 3),
        (f"{VIT}.ema_decay", 0.999),
        (f"{VIT}.compile", True),
        (f"{VIT}.config", {"model_type": "vit", "sizes": [{"a": None}]}),
        ("train.my-net_2", FILE["train"]["vit"]),
    ],
)
def test_possible_values_are_accepted(key: str, value: Any) -> None:
    loaded: Any = load_changed({key: value}).model_dump()
    for name in key.split("."):
        loaded = loaded[name]
    assert loaded == value


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("subset:\n  bins: 3\n  seed: @\n", r"is not valid YAML: .* \(line 3\)$"),
        ("a: b: c", "is not valid YAML"),
        ("subset: [1, 2", "is not valid YAML"),
        ("--- 1\n--- 2\n", "is not valid YAML"),
        ("bins: 2001-99-99", "is not valid YAML"),
        ("bins: !!int many", "is not valid YAML"),
        ("[" * 2000, "is not valid YAML"),
        ("bins: \0", "is not valid YAML"),
        (TEXT.replace("  bins:", "  seed: 1\n  bins:"), r'found duplicate key "seed" .*\(line \d+'),
        ("", "the file: .*, not null$"),
        ("[1, 2]", "the file: "),
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path: Path, text: str, problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        load_text(tmp_path, text)


def test_bytes_that_are_not_utf8_are_not_yaml(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes(b"bucket: \xff\xfe\xfa\n")
    with pytest.raises(UserError, match="is not valid YAML"):
        load_params(tmp_path / "params.yaml")


def test_a_missing_file_tells_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing: run from the repository's root"):
        load_params(tmp_path / "params.yaml")


def test_an_unknown_model_is_named_with_the_known_ones(published: Params) -> None:
    with pytest.raises(UserError, match=r"no train\.gpt; it has resnet34, vit"):
        published.model("gpt")


SECRET = "hunter2"  # noqa: S105
SECRETS = [
    f"http://user:{SECRET}@host:9000",
    f"user:{SECRET}@host:9000",
    f"s3://{SECRET}:{SECRET}@bins",
    f"https://bins.s3.amazonaws.com/?X-Amz-Signature={SECRET}",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    ("key", "put"),
    [
        *[(key, str) for key in ("bucket.endpoint", "bucket.url", "bucket.region", "bucket")],
        *[(key, str) for key in ("subset.bins", "resize.fit", f"{VIT}.name", "train.endpoint")],
        ("bucket.endpoint", lambda secret: [secret]),
        ("bucket.url", lambda secret: {secret: secret}),
    ],
)
def test_a_password_is_not_repeated(key: str, put: Callable[[str], Any], secret: str) -> None:
    text = problem_of({key: put(secret)})
    assert text.startswith(f"{key}: ")
    assert SECRET not in text


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("region: us-east-1", "endpoint: '{}'"),
        ("endpoint: null", "endpoint: '{}"),
        ("endpoint: null", "endpoint: {}: 3"),
        ("endpoint: null", "'{}': null"),
        ("bins: 230000", "bins: !!int '{}'"),
    ],
    ids=["twice", "without its end", "two colons", "a key", "no number"],
)
def test_a_password_in_a_broken_file_is_not_repeated(
    tmp_path: Path, old: str, new: str, secret: str
) -> None:
    with pytest.raises(UserError) as caught:
        load_text(tmp_path, TEXT.replace(old, new.format(secret)))
    assert SECRET not in str(caught.value)


def test_the_published_protocol_is_made_of_keys_that_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text("utf-8")
    recipe = makefile[makefile.index("\npublished:") :].partition("\n\n")[0]
    settings = dict(re.findall(r"-S (\S+)=(\S+)", recipe))
    protocol = load_changed({key: YAML().load(value) for key, value in settings.items()})
    sizes = protocol.split
    assert sizes.train + sizes.validation + sizes.test == protocol.subset.bins == 220_000
    assert (protocol.subset.order, sizes.by) == ("listing", "image")
