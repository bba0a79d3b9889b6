"""params.yaml as typed, checked values. The only reader of params.yaml."""

import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    PlainValidator,
    ValidationError,
    model_validator,
)
from ruamel.yaml import YAML

from stages.runtime.counts import AndMore, parse_label
from stages.runtime.errors import UserError

PARAMS_FILE = Path("params.yaml")


def _like(pattern: str, example: str) -> AfterValidator:
    """Text of this form. The message doesn't repeat the text, which may hold a password."""

    def check(text: str) -> str:
        if re.fullmatch(pattern, text) is None:
            raise ValueError(f"should be like {example}")
        return text

    return AfterValidator(check)


def _compared(value: Any) -> Any:
    """Refuse the keys that DVC's run cache drops, at any depth, before it compares params."""
    if isinstance(value, dict):
        for key in sorted({"size", "nfiles"} & value.keys()):
            raise ValueError(
                f"has the key {key}, which DVC ignores when it looks for an earlier run"
                " (treeverse/dvc#10296): after a change of it you could get the outputs of its"
                " old value; remove this key"
            )
    inner = value.values() if isinstance(value, dict) else value
    for one in inner if isinstance(value, dict | list) else []:
        _compared(one)
    return value


def _quantity(value: Any) -> int:
    """A count, or text like 6+, which stands for all counts from 6 on."""
    if isinstance(value, str) and re.fullmatch(r"[1-9]\d{0,3}\+", value):
        return parse_label(value)
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= 9999:
        raise ValueError(f"should be a whole number up to 9999, or like 6+, not {_shown(value)}")
    return value


def _pretrained(value: Any) -> bool | str:
    """Whether weights are downloaded, or the path of a file or folder that has them."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and re.match(r"(/|\./|\.\./).", value):
        return value
    raise ValueError(
        "should be true, false, or a path that begins with /, ./ or ../, like"
        f" ./weights/net.safetensors, not {_shown(value)}"
    )


def _classes(quantities: list[int]) -> list[int]:
    if len(quantities) < 2:
        raise ValueError(f"should have two or more quantities, not {len(quantities)}")
    if twice := sorted({one for one in quantities if quantities.count(one) > 1}):
        raise ValueError(f"has {int(twice[0])} more than once")
    for one in quantities:
        if isinstance(one, AndMore) and one != max(quantities):
            raise ValueError(f"has {max(quantities)}, which is among {one}")
    return sorted(quantities)


def _per_channel(values: list[float]) -> list[float]:
    if len(values) != 3:
        raise ValueError(f"should have 3 values, for red, green and blue, not {len(values)}")
    return values


Share = Annotated[float, Field(ge=0, le=1)]
ProperShare = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Natural = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
Quantity = Annotated[int, PlainValidator(_quantity)]
# numpy's and torch's generators take 32 and 64 bits.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
BucketUrl = Annotated[
    str,
    _like("s3://[^@?#/][^@?#]*|file:///[^?#]*", "s3://bucket, s3://bucket/prefix, file:///folder"),
]
Endpoint = Annotated[
    str,
    _like(r"https?://[^@?#\s]+", "http://127.0.0.1:9000 or https://host, without a password"),
]
#: The key of a model in the train block, which is also the name of its folders.
ModelName = Annotated[str, _like("[a-z0-9][a-z0-9_-]*", "vit or my-net2")]
#: A file in the folder lists/, on which the stages that read it depend.
ListName = Annotated[
    str, _like(r"[A-Za-z0-9][A-Za-z0-9._-]*\.csv", "mine.csv, a file in the folder lists")
]
Errors = Literal["picks", "uniform"]
Threshold = Literal["global", "per_count"]
Precision = Literal["auto", "float32", "bfloat16"]
# Folders of other stages in models/ and reports/.
_TAKEN = {"pretrained", "figures", "ensemble", "baseline", "witness"}
_PART = "[A-Za-z0-9][A-Za-z0-9._-]*"


class Block(BaseModel):
    """Unknown keys are refused, and nothing is converted: "5" and true aren't integers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Bucket(Block):
    """Where the photographs and records are."""

    url: BucketUrl
    region: Annotated[str, _like("[a-z0-9-]+", "us-east-1")]
    endpoint: Endpoint | None
    anonymous: bool


class Index(Block):
    max_rejects: Share


class Subset(Block):
    quantities: Annotated[list[Quantity], AfterValidator(_classes)]
    bins: Count
    order: Literal["random", "listing"]
    seed: Seed
    ids: ListName | None


class Fetch(Block):
    # A shard is held in memory, so it also ends at 300 MB, which are 5,000 photographs of 57 kB.
    shard_bins: Annotated[int, Field(ge=1, le=10_000)]
    max_rejects: Share


class Resize(Block):
    size: Annotated[int, Field(ge=8, le=4096)]
    fit: Literal["squeeze", "pad"]
    quality: Annotated[int, Field(ge=1, le=100)]
    max_rejects: Share


class Split(Block):
    train: Count
    validation: Count
    test: Count
    by: Literal["group", "image", "file"]
    file: ListName | None
    seed: Seed
    corrections: ListName | None

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.by == "file" and self.file is None:
            raise ValueError("by is file, but file is null: name a CSV in lists/, like mine.csv")
        if self.by != "file" and self.file is not None:
            raise ValueError(f"file is {self.file}, but by is {self.by}: set by to file too")
        return self


class ModelParams(Block):
    """One entry of the train block: a network, where its weights start, and how it is trained."""

    library: Literal["torchvision", "transformers", "timm"]
    name: Annotated[str, _like(f"{_PART}(/{_PART})?", "resnet34 or google/vit-base-patch16-224")]
    revision: Annotated[str, _like(_PART, "IMAGENET1K_V1, a commit of the hub or a SHA-256")]
    pretrained: Annotated[bool | str, PlainValidator(_pretrained)]
    config: Annotated[dict[str, JsonValue], AfterValidator(_compared)]
    # Not `size`, which DVC's run cache would ignore.
    image_size: Annotated[int, Field(ge=8)] | None
    freeze_backbone: bool
    freeze: Natural
    ordinal_share: Share
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    optimizer: Literal["adam", "adamw"]
    learning_rate: Positive
    head_learning_rate: Positive | None
    layer_decay: Annotated[float, Field(gt=0, le=1)]
    weight_decay: Annotated[float, Field(ge=0)]
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: Natural
    clip_norm: Positive | None
    ema_decay: ProperShare | None
    batch_size: Count
    accumulation: Count
    epochs: Count
    keep: Literal["best", "last"]
    # Of pixel values from 0 to 1.
    mean: Annotated[list[Share], AfterValidator(_per_channel)]
    std: Annotated[list[Annotated[Share, Field(gt=0)]], AfterValidator(_per_channel)]
    horizontal_flip: bool
    average_mirrored: bool
    color_jitter: Share
    # Larger ones would hide items.
    rotation: Annotated[float, Field(ge=0, le=45)]
    shift: Annotated[float, Field(ge=0, le=0.5)]
    blur: Annotated[float, Field(ge=0, le=5)]
    side_by_side: Share
    precision: Precision
    checkpoint_gradients: bool
    compile: Literal["auto"] | bool
    seed: Seed

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.accumulation > self.batch_size:
            raise ValueError(
                f"accumulation ({self.accumulation}) is more than batch_size ({self.batch_size})"
            )
        if self.freeze_backbone and self.freeze:
            raise ValueError(
                f"freeze is {self.freeze}, but freeze_backbone freezes all layers: set only one"
            )
        if self.library == "transformers" and not isinstance(self.config.get("model_type"), str):
            raise ValueError("config.model_type should be the type of the network, like vit")
        return self


class Run(Block):
    """How stages run."""

    executor: Literal["local", "ray"]
    processes: Literal["auto"] | Count
    checkpoint_minutes: Positive
    deterministic: bool


class Evaluate(Block):
    batch_size: Count
    false_alarm: ProperShare
    errors: Errors
    threshold: Threshold


class Params(Block):
    """params.yaml."""

    bucket: Bucket
    index: Index
    subset: Subset
    fetch: Fetch
    resize: Resize
    split: Split
    train: dict[ModelName, ModelParams]
    run: Run
    evaluate: Evaluate

    def model(self, name: str) -> ModelParams:
        """The train block of one model. Raises UserError if there is none."""
        if name not in self.train:
            raise UserError(f"params.yaml has no train.{name}; it has {', '.join(self.train)}")
        return self.train[name]

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if not self.train:
            raise ValueError("train has no model: give it a block for each")
        for name in _TAKEN & self.train.keys():
            raise ValueError(f"train.{name} has the name of another stage's folder: rename it")
        for name, model in self.train.items():
            if (model.image_size or 0) > self.resize.size:
                raise ValueError(
                    f"train.{name}.image_size ({model.image_size}) is more than resize.size"
                    f" ({self.resize.size})"
                )
        wanted = self.split.train + self.split.validation + self.split.test
        sized = self.subset.ids is None and self.split.by != "file"
        if sized and wanted > self.subset.bins:
            raise ValueError(
                f"split.train, split.validation and split.test are {wanted} bins together,"
                f" subset.bins only {self.subset.bins}"
            )
        return self


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check the whole file. Raises one UserError that names every key at fault."""
    values = _read_yaml(path)
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(_describe(error, values))) from None


def _read_yaml(path: Path) -> Any:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run from the repository's root") from None
    try:
        # YAML 1.2, as DVC reads it: in YAML 1.1 (PyYAML) 1e-3 is a string and `off` a boolean.
        return YAML(typ="safe", pure=True).load(data)
    # For broken bytes ruamel raises nearly anything: YAMLError, ValueError, KeyError, ...
    except Exception as error:  # noqa: BLE001
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        # Some messages quote the value, which may hold a password.
        words = ("..." if _may_be_secret(word) else word for word in problem.split())
        raise UserError(f"{path} is not valid YAML: {' '.join(words)}{line}") from None


def _describe(error: ValidationError, values: Any) -> list[str]:
    """A text for each problem, and one for all types of a key that the value is none of."""
    texts: dict[tuple[str, str], str] = {}
    wanted: dict[str, list[str]] = {}
    for problem in error.errors():
        keys, kind = _keys(problem, values), problem["type"]
        key = ".".join("..." if _may_be_secret(part) else str(part) for part in keys)
        match kind:
            case "missing":
                texts[key, kind] = f"{key} is missing"
            case "extra_forbidden":
                texts[key, kind] = f"{key}: there is no such key"
            case "value_error":
                # A check of this module, which says it all; without a key if it is about several.
                texts[key, kind] = f"{key}: {problem['ctx']['error']}".removeprefix(": ")
            case _:
                wanted.setdefault(key, []).append(_wanted(problem))
                types, found = " or ".join(wanted[key]), _shown(problem["input"])
                texts[key, "type"] = f"{key or 'the file'}: should be {types}, not {found}"
    return list(texts.values())


# What a value should be, by pydantic's names of its problems.
_WORDS = {
    "bool_type": "true or false",
    "dict_type": "a block of keys",
    "finite_number": "a finite number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "{ge} or more",
    "int_type": "a whole number",
    "invalid_key": "a key that is text",
    "invalid-json-value": "text, a number, true, false, null, or a list or block of these",
    "less_than": "less than {lt}",
    "less_than_equal": "{le} or less",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_type": "a block of keys",
    "string_type": "text",
}


def _wanted(problem: Any) -> str:
    limits = {
        name: f"{limit:g}" if isinstance(limit, float) else limit
        for name, limit in problem.get("ctx", {}).items()
    }
    return _WORDS.get(problem["type"], "another kind of value").format(**limits)


def _shown(value: Any) -> str:
    """The value as in YAML, unless it is long or may be a password."""
    if isinstance(value, dict):
        return "a block of keys"
    if isinstance(value, list):
        return "a list"
    if _may_be_secret(value):
        return "this"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return reprlib.repr(value) if isinstance(value, str | int | float) else str(value)


def _keys(problem: Any, values: Any) -> list[Any]:
    """The keys of the file in pydantic's location, which also names the types of a union."""
    keys = []
    for part in problem["loc"]:
        try:
            values = values[part]
        except (LookupError, TypeError):
            if problem["type"] != "missing":
                break
        keys.append(part)
    return keys


def _may_be_secret(value: Any) -> bool:
    return re.search("@|://", str(value)) is not None
