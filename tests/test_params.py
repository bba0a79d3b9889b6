import datetime
import math
import re
import reprlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from dvc.utils.serialize import load_yaml
from ruamel.yaml import YAML

from stages.runtime.errors import UserError
from stages.runtime.params import Params, load_params
from tests.conftest import REPOSITORY, changed_params, write_params

RESNET = "train.resnet34"
VIT = "train.vit"
#: What the published experiment does without.
NOTHING_MORE = [
    ("freeze_backbone", False),
    ("loss", "cross_entropy"),
    ("label_smoothing", 0.0),
    ("clip_norm", None),
    ("ema_decay", None),
    ("accumulation", 1),
    ("color_jitter", 0.0),
]


@pytest.fixture(scope="module")
def published() -> Params:
    return load_params(REPOSITORY / "params.yaml")


def value_of(params: Params, key: str) -> Any:
    value: Any = params
    for name in key.split("."):
        value = value[name] if isinstance(value, dict) else getattr(value, name)
    return value


def load_changed(tmp_path: Path, key: str, value: Any) -> Params:
    path = tmp_path / "params.yaml"
    YAML(typ="safe", pure=True).dump(changed_params({key: value}), path)
    return load_params(path)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bucket.url", "s3://aft-vbi-pds"),
        ("bucket.endpoint", None),
        ("bucket.anonymous", True),
        ("subset.quantities", [1, 2, 3, 4, 5]),
        ("subset.bins", 220_000),
        ("fetch.shard_bins", 1000),
        ("resize.size", 224),
        ("resize.fit", "squeeze"),
        ("split.train", 198_000),
        ("split.test", 22_000),
        ("split.by", "group"),
        ("split.validation", 0.05),
        ("evaluate.false_alarm", 0.05),
        (f"{RESNET}.optimizer", "adam"),
        (f"{RESNET}.learning_rate", 0.001),
        (f"{RESNET}.schedule", "constant"),
        (f"{RESNET}.batch_size", 128),
        (f"{RESNET}.epochs", 10),
        (f"{RESNET}.mean", [0.53, 0.4495, 0.3624]),
        (f"{RESNET}.std", [0.1691, 0.1476, 0.1114]),
        (f"{RESNET}.pretrained", True),
        (f"{VIT}.name", "google/vit-base-patch16-224-in21k"),
        (f"{VIT}.optimizer", "adamw"),
        (f"{VIT}.learning_rate", 0.00002),
        (f"{VIT}.weight_decay", 0.01),
        (f"{VIT}.schedule", "linear"),
        (f"{VIT}.warmup_steps", 500),
        (f"{VIT}.batch_size", 64),
        (f"{VIT}.epochs", 5),
        *((f"{model}.{key}", value) for model in (RESNET, VIT) for key, value in NOTHING_MORE),
        ("run.processes", "auto"),
        ("run.deterministic", False),
        (f"{VIT}.mean", [0.5, 0.5, 0.5]),
        (f"{VIT}.std", [0.5, 0.5, 0.5]),
    ],
)
def test_the_repository_holds_the_published_experiment(
    published: Params, key: str, value: Any
) -> None:
    assert value_of(published, key) == value


def test_train_and_test_are_the_whole_subset(published: Params) -> None:
    assert published.split.train + published.split.test == published.subset.bins


def test_dvc_reads_the_same_values(published: Params) -> None:
    # Counts written as 0 and fractions as 1e-3 are equal in both, also in type.
    assert published.model_dump() == load_yaml(str(REPOSITORY / "params.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-3", 0.001), ("5e-05", 0.00005), ("5e-5", 0.00005), ("1", 1.0), ("1.5E+1", 15.0)],
)
def test_every_notation_of_a_number_is_a_float(tmp_path: Path, text: str, value: float) -> None:
    path = tmp_path / "params.yaml"
    written = (REPOSITORY / "params.yaml").read_text("utf-8")
    path.write_text(written.replace("learning_rate: 1e-3", f"learning_rate: {text}"), "utf-8")
    learning_rate = load_params(path).model("resnet34").learning_rate
    assert isinstance(learning_rate, float)
    assert learning_rate == value


def test_values_cannot_be_changed_after_loading(published: Params) -> None:
    with pytest.raises(ValueError, match="frozen"):
        published.subset.bins = 3


@pytest.mark.parametrize(
    "key",
    ["colour", "bucket.colour", "split.colour", f"{RESNET}.colour", f"{VIT}.dropout"],
)
def test_an_unknown_key_is_named(tmp_path: Path, key: str) -> None:
    with pytest.raises(UserError, match=f"{key}: there is no such key"):
        load_changed(tmp_path, key, 1)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bucket.anonymous", "yes"),
        ("bucket.anonymous", 1),
        ("bucket.url", None),
        ("index.max_rejects", True),
        ("index.max_rejects", "0.5"),
        ("subset.bins", "5"),
        ("subset.bins", True),
        ("subset.bins", 5.0),
        ("subset.quantities", 3),
        ("fetch.shard_bins", None),
        ("resize.size", [224]),
        ("split.seed", "0"),
        ("split.validation", "0.05"),
        ("split.validation", True),
        ("split.validation", None),
        ("evaluate.false_alarm", "5%"),
        ("train", []),
        (f"{RESNET}.learning_rate", True),
        (f"{RESNET}.learning_rate", "1e-3"),
        (f"{RESNET}.horizontal_flip", "no"),
        (f"{RESNET}.freeze_backbone", 0),
        (f"{RESNET}.clip_norm", "1.0"),
        (f"{RESNET}.compile", 1),
        (f"{RESNET}.accumulation", 2.0),
        ("run.processes", 2.0),
        ("run.processes", True),
        ("run.processes", None),
        ("run.checkpoint_minutes", "10"),
        ("run.deterministic", "false"),
        ("train.processors", 2),
        (f"{VIT}.config", [1]),
    ],
)
def test_a_value_of_another_type_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{key}: .*, not "):
        load_changed(tmp_path, key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("bucket.region", ""),
        ("bucket.region", "us-east-1\n"),
        ("bucket.region", "us--east"),
        ("bucket.region", "a" * 64),
        ("index.max_rejects", -0.1),
        ("index.max_rejects", 1.1),
        ("subset.bins", 0),
        ("subset.bins", 10**400),
        ("subset.seed", -1),
        ("subset.seed", 2**32),
        ("fetch.shard_bins", 0),
        ("fetch.shard_bins", 10_001),
        ("resize.size", 0),
        ("resize.fit", "crop"),
        ("resize.quality", 101),
        ("split.train", 0),
        ("split.test", -1),
        ("split.by", "bin"),
        ("split.validation", 0),
        ("split.validation", 1.0),
        ("split.validation", math.nan),
        (f"{RESNET}.library", "keras"),
        (f"{RESNET}.name", "../weights"),
        (f"{RESNET}.name", "a/.."),
        (f"{RESNET}.name", "x" * 97),
        (f"{RESNET}.revision", ".."),
        (f"{RESNET}.learning_rate", 0),
        (f"{RESNET}.learning_rate", math.nan),
        (f"{RESNET}.learning_rate", math.inf),
        (f"{RESNET}.learning_rate", 1e39),
        (f"{RESNET}.learning_rate", 1e-39),
        (f"{RESNET}.weight_decay", 1e39),
        (f"{RESNET}.weight_decay", -0.1),
        (f"{RESNET}.epochs", 0),
        (f"{RESNET}.epochs", 100_001),
        (f"{RESNET}.batch_size", 2**31),
        (f"{VIT}.schedule", "step"),
        (f"{VIT}.warmup_steps", -1),
        (f"{VIT}.loss", "mse"),
        (f"{VIT}.label_smoothing", 1.0),
        (f"{VIT}.label_smoothing", -0.1),
        (f"{VIT}.clip_norm", 0.0),
        (f"{VIT}.ema_decay", 0.0),
        (f"{VIT}.ema_decay", 1.0),
        (f"{VIT}.color_jitter", 1.1),
        (f"{VIT}.accumulation", 0),
        (f"{VIT}.compile", "yes"),
        ("run.processes", "all"),
        ("run.processes", 0),
        ("run.processes", 1025),
        ("run.checkpoint_minutes", 0),
        ("run.checkpoint_minutes", math.inf),
        ("evaluate.batch_size", 0),
        ("evaluate.false_alarm", 0.0),
        ("evaluate.false_alarm", 1.0),
    ],
)
def test_an_impossible_value_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UserError, match=rf"{key}: .*, not {re.escape(reprlib.repr(value))}"):
        load_changed(tmp_path, key, value)


@pytest.mark.parametrize(
    ("key", "value", "place"),
    [
        ("subset.quantities", [1, -2], "subset.quantities.1"),
        ("subset.quantities", [1, 2**31], "subset.quantities.1"),
        ("subset.quantities", [True, 2], "subset.quantities.0"),
        (f"{RESNET}.mean", [0.5, math.nan, 0.5], f"{RESNET}.mean.1"),
        (f"{RESNET}.mean", [0.5, 0.5, 127.5], f"{RESNET}.mean.2"),
        (f"{RESNET}.std", [0.5, 0.5, 0.0], f"{RESNET}.std.2"),
        (f"{RESNET}.std", [0.5, 1e-4, 0.5], f"{RESNET}.std.1"),
        (f"{RESNET}.std", [58.4, 0.5, 0.5], f"{RESNET}.std.0"),
    ],
)
def test_a_wrong_element_is_named_by_its_place(
    tmp_path: Path, key: str, value: Any, place: str
) -> None:
    with pytest.raises(UserError, match=f"{place}: "):
        load_changed(tmp_path, key, value)


def load_with_model(tmp_path: Path, name: str, **changes: Any) -> Params:
    """With one more model, like the ViT but for those changes."""
    train = changed_params({})["train"]
    return load_changed(tmp_path, "train", train | {name: train["vit"] | changes})


@pytest.mark.parametrize("name", ["Big Model", "../up", "-dash", ""])
def test_a_model_name_that_is_no_folder_name_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=f"train.{name}: "):
        load_with_model(tmp_path, name)


@pytest.mark.parametrize("name", ["pretrained", "figures"])
def test_a_model_with_the_name_of_another_stages_folder_is_refused(
    tmp_path: Path, name: str
) -> None:
    with pytest.raises(UserError, match=f": train.{name}: a model cannot be called so$"):
        load_with_model(tmp_path, name)


@pytest.mark.parametrize("name", ["swin", "vit-2", "0", "my_net", "bool"])
def test_another_model_is_one_more_block(tmp_path: Path, name: str) -> None:
    params = load_with_model(tmp_path, name, seed=7)

    assert params.train.keys() == {"resnet34", "vit", name}
    assert params.model(name).seed == 7


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        (f"{RESNET}.accumulation", 129, f"{RESNET}.accumulation: is more than batch_size (128)"),
        (f"{VIT}.config", {}, f"{VIT}.config: model_type is missing, like vit"),
        (f"{VIT}.config", {"hidden_size": 8}, f"{VIT}.config: model_type is missing, like vit"),
        (
            "split.train",
            198_001,
            "split.train and split.test are 220001 bins together, subset.bins",
        ),
        ("subset.bins", 1000, "split.train and split.test are 220000 bins together, subset.bins"),
    ],
)
def test_values_that_do_not_go_together_are_named(
    tmp_path: Path, key: str, value: Any, problem: str
) -> None:
    with pytest.raises(UserError) as error:
        load_changed(tmp_path, key, value)

    assert str(error.value).startswith(f"{tmp_path / 'params.yaml'}: {problem}")
    # Not with all of the block.
    assert len(str(error.value)) < 200


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (f"{RESNET}.accumulation", 128),
        (f"{RESNET}.config", {}),
        ("run.processes", 3),
        ("run.checkpoint_minutes", 0.5),
        (f"{VIT}.clip_norm", 1.0),
        (f"{VIT}.ema_decay", 0.999),
        (f"{VIT}.compile", True),
        (f"{VIT}.schedule", "cosine"),
        (f"{VIT}.loss", "ordinal"),
        ("split.train", 100),
        ("split.validation", 0.999),
        ("evaluate.false_alarm", 0.001),
    ],
)
def test_what_is_possible_is_taken(tmp_path: Path, key: str, value: Any) -> None:
    params = load_changed(tmp_path, key, value)

    assert value_of(params, key) == value


@pytest.mark.parametrize("key", ["bucket", "subset.seed", f"{RESNET}.optimizer", "evaluate"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    values = changed_params({})
    *blocks, last = key.split(".")
    block = values
    for name in blocks:
        block = block[name]
    del block[last]
    path = tmp_path / "params.yaml"
    YAML(typ="safe", pure=True).dump(values, path)
    with pytest.raises(UserError, match=f"{key} is missing"):
        load_params(path)


@pytest.mark.usefixtures("workspace")
def test_all_faults_are_named_at_once() -> None:
    write_params({"subset.bins": 0, "resize.fit": "crop", "split.colour": 1})
    with pytest.raises(UserError) as caught:
        load_params()
    for key in ("subset.bins", "resize.fit", "split.colour"):
        assert key in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "a: b: c",
        "subset: [1, 2",
        "\tbins: 3",
        "--- 1\n--- 2\n",
        "bins: 2001-99-99",
        "bins: !!bool maybe",
        "bins: !!int many",
        "bins: 1" + "0" * 5000,
        "[" * 2000,
        "bins: *nothing",
        "bins: \0",
    ],
    ids=lambda text: ascii(text[:20]),
)
def test_what_is_not_yaml_is_said_to_be_so(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(UserError, match="is not YAML"):
        load_params(path)


def test_a_wrong_line_of_yaml_is_named(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("subset:\n  bins: 3\n  seed: @\n", "utf-8")
    with pytest.raises(UserError, match=r"is not YAML: .* \(line 3, column 9\)$"):
        load_params(path)


def test_bytes_that_are_not_utf8_are_not_yaml(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(b"bucket: \xff\xfe\xfa\n")
    with pytest.raises(UserError, match="is not YAML"):
        load_params(path)


URL = "bucket.url: should be like s3://bucket, s3://bucket/prefix or file:///folder$"
ENDPOINT = (
    "bucket.endpoint: should be like http://127.0.0.1:9000 or https://host, without name and"
    " password$"
)


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "aft-vbi-pds",
            "https://aft-vbi-pds.s3.amazonaws.com",
            "s3://",
            "s3:///a",
            "S3://bins",
        ),
        *("s3://ab", "s3://a..b", "s3://a.-b", "s3://-ab", "s3://ab-", "s3://a_b", "s3://Bins"),
        *("s3://" + "a" * 64, "s3://bins/..", "s3://bins/../other", "s3://bins/a/./b"),
        *("s3://bins//a", "s3://bins/a\nb", "s3://bins/a\0", "s3://bins\n", "s3://bins?a=b"),
        *("s3://bins/#a", "file://relative/folder", "file:///a?b", "file:///a\x7f"),
        *("file:///a%00b", "file:///a%0ab"),
    ],
    ids=ascii,
)
def test_a_place_of_no_bucket_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match=URL):
        load_changed(tmp_path, "bucket.url", url)


@pytest.mark.parametrize(
    "url",
    [
        *("s3://aft-vbi-pds", "s3://bins/", "s3://bins/deep/er", "s3://my.bins.1/a b/.hidden/c..d"),
        *("s3://abc", "s3://" + "a" * 63, "file:///", "file:///data/../bins", "file:///a%20b"),
        "file:///" + "%E7%AE%B1/" * 400,
    ],
    ids=lambda url: url[:40],
)
def test_a_place_of_a_bucket_is_taken(tmp_path: Path, url: str) -> None:
    assert load_changed(tmp_path, "bucket.url", url).bucket.url == url


@pytest.mark.parametrize(
    "url",
    [
        *(
            "",
            "localhost:9000",
            "http://",
            "http://local host:9000",
            "http://host\n",
            "http://ho\0st",
        ),
        *(
            "http://host:0",
            "http://host:65536",
            "http://host:",
            "http://host:99999999",
            "ftp://host",
        ),
        *("http://a..b", "http://host/../a", "http://host//a", "http://host/?a=b", "http://host#a"),
    ],
    ids=ascii,
)
def test_an_address_of_no_server_is_refused(tmp_path: Path, url: str) -> None:
    with pytest.raises(UserError, match=ENDPOINT):
        load_changed(tmp_path, "bucket.endpoint", url)


@pytest.mark.parametrize(
    "url",
    [
        *("http://127.0.0.1:9000", "https://s3.example.com", "http://minio_1:9000/a/b/"),
        *("http://[::1]:9000", "http://host:65535/"),
    ],
)
def test_an_address_of_a_server_is_taken(tmp_path: Path, url: str) -> None:
    assert load_changed(tmp_path, "bucket.endpoint", url).bucket.endpoint == url


SECRET = "hunter2"  # noqa: S105
SECRETS = [
    f"http://user:{SECRET}@host:9000",
    f"http://{SECRET}@host",
    f"user:{SECRET}@host:9000",
    f"s3://{SECRET}:{SECRET}@bins",
    f"https://bins.s3.amazonaws.com/?X-Amz-Signature={SECRET}",
    f"http://user:{SECRET} with spaces@host",
]


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    ("key", "put"),
    [
        ("bucket.endpoint", str),
        ("bucket.url", str),
        ("bucket.region", str),
        ("bucket.anonymous", str),
        ("bucket.endpoint", lambda secret: [secret]),
        ("bucket.url", lambda secret: {secret: secret}),
        ("bucket", str),
        ("subset.bins", str),
        ("resize.fit", str),
        (f"{VIT}.name", str),
        ("train.endpoint", str),
    ],
)
def test_a_secret_is_not_repeated(
    tmp_path: Path, key: str, put: Callable[[str], Any], secret: str
) -> None:
    with pytest.raises(UserError, match=f"{key}: ") as caught:
        load_changed(tmp_path, key, put(secret))
    assert SECRET not in str(caught.value)
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("secret", SECRETS)
@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("region: us-east-1", "endpoint: '{}'"),
        ("endpoint: null", "endpoint: '{}"),
        ("endpoint: null", "endpoint: {}: 3"),
        ("endpoint: null", "'{}': null"),
        ("bins: 220000", "bins: !!int '{}'"),
    ],
    ids=["twice", "without its end", "two colons", "a key", "no number"],
)
def test_a_secret_in_broken_yaml_is_not_repeated(
    tmp_path: Path, old: str, new: str, secret: str
) -> None:
    path = tmp_path / "params.yaml"
    text = (REPOSITORY / "params.yaml").read_text("utf-8")
    path.write_text(text.replace(old, new.format(secret)), "utf-8")
    with pytest.raises(UserError) as caught:
        load_params(path)
    assert SECRET not in str(caught.value)


def test_a_key_that_is_there_twice_is_named(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    text = (REPOSITORY / "params.yaml").read_text("utf-8")
    path.write_text(text.replace("    seed: 0\n\n", "    seed: 0\n    seed: 1\n\n"), "utf-8")
    with pytest.raises(UserError, match=r"is not YAML: train\.vit\.seed is there twice$"):
        load_params(path)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("x: &a {y: *a}\nz: 1\nz: 2\n", "z"),
        ("x: &a {y: *a, y: 1}\n", r"x\.y"),
        ("1: 1\n0x1: 2\n", "a key"),
        ("? [1]\n: 1\n? [1]\n: 2\n", ".*"),
    ],
)
def test_a_key_that_is_there_twice_in_an_odd_file_is_no_crash(
    tmp_path: Path, text: str, key: str
) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(UserError, match=f"is not YAML: {key} is there twice$"):
        load_params(path)


def test_what_yaml_says_is_short(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text("x: *" + "y" * 1000 + "\n", "utf-8")
    with pytest.raises(UserError) as caught:
        load_params(path)
    assert len(str(caught.value)) < 400 + len(str(path))


def test_an_unreadable_file_is_no_fault_of_its_text(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        load_params(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "problem"),
    [
        ("subset.quantities", [3], "should have at least 2 items .*, not a list$"),
        ("subset.quantities", [1, 2, 2], "names a value twice$"),
        (f"{RESNET}.mean", [0.5, 0.5], "should have at least 3 items .*, not a list$"),
        (f"{RESNET}.config", {"a": math.nan}, "holds what JSON cannot$"),
        (f"{RESNET}.config", {"a": math.inf}, "holds what JSON cannot$"),
        (f"{RESNET}.config", {"a": {1: 2}}, "holds what JSON cannot$"),
        (f"{RESNET}.config", {"a": datetime.date(2001, 1, 1)}, "holds what JSON cannot$"),
        (f"{VIT}.config", {"model_type": 5}, "model_type should be text, like vit$"),
        (f"{VIT}.config", {"model_type": None}, "model_type should be text, like vit$"),
    ],
)
def test_a_list_or_a_mapping_is_not_repeated(
    tmp_path: Path, key: str, value: Any, problem: str
) -> None:
    with pytest.raises(UserError, match=f": {key}: .*{problem}"):
        load_changed(tmp_path, key, value)


def test_no_more_than_twenty_problems_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load_changed(tmp_path, "subset.quantities", ["one"] * 1000)
    assert str(caught.value).count("subset.quantities.") == 20


@pytest.mark.parametrize("text", ["", "# nothing\n", "[1, 2]", "5", "text"])
def test_a_file_without_blocks_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_text(text, "utf-8")
    with pytest.raises(UserError, match="the file: "):
        load_params(path)


def test_a_missing_file_tells_where_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is missing: run from the repository's root"):
        load_params(tmp_path / "params.yaml")


def test_a_model_is_found_by_its_key(published: Params) -> None:
    assert published.model("vit").library == "transformers"


def test_an_unknown_model_is_named_with_those_there_are(published: Params) -> None:
    with pytest.raises(UserError, match=r"no train\.gpt; it has resnet34, vit"):
        published.model("gpt")
