"""params.yaml as typed, checked values. The only reader of params.yaml."""

import json
import re
import reprlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import unquote

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from ruamel.yaml import YAML
from ruamel.yaml.constructor import DuplicateKeyError
from ruamel.yaml.nodes import MappingNode, Node

from stages.runtime.errors import UserError

PARAMS_FILE = Path("params.yaml")
# As many problems are named at once.
MOST_PROBLEMS = 20
_MAY_BE_SECRET = re.compile("@|://")

Share = Annotated[float, Field(ge=0, le=1)]
# Counts are int32 in the data.
Count = Annotated[int, Field(ge=1, lt=2**31)]
# A seed goes into numpy's and torch's generators, which take 32 and 64 bits.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
# Beyond these a number is 0 or infinite in the float32 of a network's weights.
SMALLEST, LARGEST = 1.2e-38, 3.4e38
Positive = Annotated[float, Field(ge=SMALLEST, le=LARGEST)]

# A part of a bucket's name between dots, and what no part of a path may be.
_LABEL = "[a-z0-9]([a-z0-9-]*[a-z0-9])?"
_NO_DOTS = r"(?!\.\.?(/|$))"
_BUCKET_URL = re.compile(
    rf"s3://(?=[^/]{{3,63}}(/|$)){_LABEL}(\.{_LABEL})*(/{_NO_DOTS}[^/?#]+)*/?|file:///[^?#]*"
)
_ENDPOINT = re.compile(
    r"https?://([A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*|\[[0-9A-Fa-f:.]+\])(:(?P<port>[0-9]{1,5}))?"
    rf"(/{_NO_DOTS}[A-Za-z0-9._~-]+)*/?"
)


def _bucket_url(url: str) -> str:
    controls = re.search(r"[\x00-\x1f\x7f]", unquote(url))
    if _BUCKET_URL.fullmatch(url) is None or controls is not None:
        raise ValueError("should be like s3://bucket, s3://bucket/prefix or file:///folder")
    return url


def _endpoint(url: str) -> str:
    form = _ENDPOINT.fullmatch(url)
    if form is None or not 1 <= int(form["port"] or 443) <= 65535:
        raise ValueError(
            "should be like http://127.0.0.1:9000 or https://host, without name and password"
        )
    return url


def _unique(values: list[int]) -> list[int]:
    if len(set(values)) < len(values):
        raise ValueError("names a value twice")
    return values


def _json(config: dict[str, Any]) -> dict[str, Any]:
    # It goes into the network's config.json. YAML has dates, sets and other keys too.
    try:
        text = json.dumps(config, allow_nan=False, ensure_ascii=False).encode()
        same = json.loads(text) == config
    except (TypeError, ValueError, RecursionError):
        same = False
    if not same:
        raise ValueError("holds what JSON cannot")
    return config


def _model_name(name: str) -> str:
    # models/pretrained and reports/figures are other stages' folders.
    if name in {"pretrained", "figures"}:
        raise ValueError("a model cannot be called so")
    return name


class Block(BaseModel):
    """Unknown keys are refused, and nothing is converted: "5" and true are no integers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Bucket(Block):
    """Where the photographs and records are."""

    # A path has up to 4096 bytes, each of which may be three characters of a URL.
    url: Annotated[str, Field(max_length=3 * 4096), AfterValidator(_bucket_url)]
    region: Annotated[str, Field(max_length=63, pattern=r"^[a-z0-9]+(-[a-z0-9]+)*$")]
    endpoint: Annotated[str, Field(max_length=1024), AfterValidator(_endpoint)] | None
    anonymous: bool


class Index(Block):
    max_rejects: Share


class Subset(Block):
    quantities: Annotated[
        list[Annotated[int, Field(ge=0, lt=2**31)]], Field(min_length=2), AfterValidator(_unique)
    ]
    bins: Count
    seed: Seed


class Fetch(Block):
    # A shard is held in memory: 10,000 photographs of 57 kB are 570 MB.
    shard_bins: Annotated[int, Field(ge=1, le=10_000)]
    max_rejects: Share


class Resize(Block):
    size: Annotated[int, Field(ge=8, le=4096)]
    fit: Literal["squeeze", "pad"]
    quality: Annotated[int, Field(ge=1, le=100)]
    max_rejects: Share


class Split(Block):
    train: Count
    test: Count
    validation: Annotated[float, Field(gt=0, lt=1)]
    by: Literal["group", "image"]
    seed: Seed


class Model(Block):
    """One entry of the train block: a network, where its weights start, and how it is trained."""

    library: Literal["torchvision", "transformers"]
    name: Annotated[
        str,
        Field(max_length=96, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$"),
    ]
    revision: Annotated[str, Field(max_length=96, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    pretrained: bool
    config: Annotated[dict[str, Any], AfterValidator(_json)]
    freeze_backbone: bool
    loss: Literal["cross_entropy", "ordinal"]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    optimizer: Literal["adam", "adamw"]
    learning_rate: Positive
    weight_decay: Annotated[float, Field(ge=0, le=LARGEST)]
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: Annotated[int, Field(ge=0, lt=2**31)]
    clip_norm: Positive | None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None
    batch_size: Count
    accumulation: Count
    # Each has a row in the checkpoint from the start.
    epochs: Annotated[int, Field(ge=1, le=100_000)]
    mean: Annotated[list[Share], Field(min_length=3, max_length=3)]
    # Of values from 0 to 1: above 0.001, so that no image becomes huge numbers.
    std: Annotated[list[Annotated[float, Field(ge=0.001, le=1)]], Field(min_length=3, max_length=3)]
    horizontal_flip: bool
    color_jitter: Share
    compile: Literal["auto"] | bool
    seed: Seed

    @field_validator("accumulation")
    @classmethod
    def _check_accumulation(cls, accumulation: int, info: ValidationInfo) -> int:
        batch_size = info.data.get("batch_size", accumulation)
        if accumulation > batch_size:
            raise ValueError(f"is more than batch_size ({batch_size})")
        return accumulation

    @field_validator("config")
    @classmethod
    def _check_model_type(cls, config: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        if info.data.get("library") == "transformers":
            if "model_type" not in config:
                raise ValueError("model_type is missing, like vit")
            if not isinstance(config["model_type"], str):
                raise ValueError("model_type should be text, like vit")
        return config


#: The key of a model in the train block, which is the name of its folders.
ModelName = Annotated[
    str, Field(max_length=64, pattern=r"^[a-z0-9][a-z0-9_-]*$"), AfterValidator(_model_name)
]


class Run(Block):
    """How stages run."""

    executor: Literal["local", "ray"]
    processes: Literal["auto"] | Annotated[int, Field(ge=1, le=1024)]
    checkpoint_minutes: Positive
    deterministic: bool


class Evaluate(Block):
    batch_size: Count
    false_alarm: Annotated[float, Field(gt=0, lt=1)]


class Params(Block):
    """params.yaml."""

    bucket: Bucket
    index: Index
    subset: Subset
    fetch: Fetch
    resize: Resize
    split: Split
    train: dict[ModelName, Model]
    run: Run
    evaluate: Evaluate

    def model(self, name: str) -> Model:
        """The train block of one model. Raises UserError where there is none."""
        if name not in self.train:
            raise UserError(f"params.yaml has no train.{name}; it has {', '.join(self.train)}")
        return self.train[name]

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        wanted = self.split.train + self.split.test
        if wanted > self.subset.bins:
            raise ValueError(
                f"split.train and split.test are {wanted} bins together, subset.bins only"
                f" {self.subset.bins}"
            )
        return self


def load_params(path: Path = PARAMS_FILE) -> Params:
    """Read and check the whole file. Raises UserError naming every key at fault, or the first 20.

    The message repeats no URL that is refused: it may hold a password.
    """
    values = _read_yaml(path)
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        problems = [_describe(problem, values) for problem in error.errors()[:MOST_PROBLEMS]]
        raise UserError(f"{path}: " + "; ".join(problems)) from None


def _read_yaml(path: Path) -> Any:
    # YAML 1.2 as DVC reads it: in YAML 1.1 (PyYAML) 1e-3 is a string and `off` a boolean.
    yaml = YAML(typ="safe", pure=True)
    try:
        return yaml.load(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run from the repository's root") from None
    except (OSError, MemoryError):
        raise
    except DuplicateKeyError:
        keys = _repeated_keys(YAML(typ="safe", pure=True).compose(path), "", set())
        raise UserError(
            f"{path} is not YAML: {', '.join(keys) or 'a key'} is there twice"
        ) from None
    # For broken bytes ruamel raises nearly anything: YAMLError, ValueError, KeyError, ...
    except Exception as error:  # noqa: BLE001
        raise UserError(f"{path} is not YAML: {_yaml_problem(error)}") from None


def _repeated_keys(node: Node, place: str, seen: set[int]) -> Iterator[str]:
    """The dotted names of keys that their mapping has twice. An alias is a node seen before."""
    if not isinstance(node, MappingNode) or id(node) in seen:
        return
    seen.add(id(node))
    names = set()
    for key, value in node.value:
        name = place + _name(key.value)
        if name in names:
            yield name
        names.add(name)
        yield from _repeated_keys(value, f"{name}.", seen)


def _yaml_problem(error: Exception) -> str:
    text = getattr(error, "problem", None) or str(error) or type(error).__name__
    # Some repeat the value that they stumble over.
    words = ("..." if _MAY_BE_SECRET.search(word) else word for word in text.split())
    text = " ".join(words)[:300]
    mark = getattr(error, "problem_mark", None)
    return text if mark is None else f"{text} (line {mark.line + 1}, column {mark.column + 1})"


def _describe(problem: Any, values: Any) -> str:
    key = ".".join(map(_name, _keys(problem, values)))
    if problem["type"] == "extra_forbidden":
        return f"{key}: there is no such key"
    if problem["type"] == "missing":
        return f"{key} is missing"
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        # A check of ours, which says it all. Without a key it is of several, and names them.
        return f"{key}: {text}".removeprefix(": ")
    return f"{key or 'the file'}: {text}, not {_shown(problem['input'])}"


def _keys(problem: Any, values: Any) -> Iterator[Any]:
    """The keys of the file in pydantic's place of a problem, which names some of its types too."""
    for part in problem["loc"]:
        try:
            values = values[part]
        except (LookupError, TypeError):
            if problem["type"] != "missing":
                return
        yield part


def _name(key: Any) -> str:
    text = str(key)
    plain = text.isprintable() and len(text) <= 80 and not _MAY_BE_SECRET.search(text)
    return text if plain else _shown(text)


def _shown(value: Any) -> str:
    """Short, and nothing that may hold a password."""
    if isinstance(value, dict | list | tuple | set):
        return "a mapping" if isinstance(value, dict) else "a list"
    if _MAY_BE_SECRET.search(str(value)):
        return "this (not repeated, as it may hold a password)"
    return reprlib.repr(value)
