"""params.yaml as typed, checked values. The only reader of params.yaml."""

import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.core.errors import UserError

PARAMS_FILE = Path("params.yaml")
# What pydantic puts into the place of a problem beside the keys of the file.
NOT_KEYS = {"[key]", "literal['auto']", "constrained-int", "bool"}

Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]
# A seed goes into numpy's and torch's generators, which take 32 and 64 bits.
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0)]


def _unique(values: list[int]) -> list[int]:
    if len(set(values)) < len(values):
        raise ValueError("names a value twice")
    return values


class Block(BaseModel):
    """Unknown keys are refused, and nothing is converted: "5" and true are no integers."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class Bucket(Block):
    """Where the photographs and records are."""

    url: Annotated[str, Field(pattern=r"^(s3://[a-z0-9][a-z0-9.-]+(/[^?#]*)?|file:///[^?#]*)$")]
    region: Annotated[str, Field(pattern=r"^[a-z0-9-]+$")]
    endpoint: Annotated[str, Field(pattern=r"^https?://[^/\s@]+(/\S*)?$")] | None
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
        str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*(/[A-Za-z0-9][A-Za-z0-9._-]*)?$")
    ]
    revision: Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+$")]
    pretrained: bool
    config: dict[str, Any]
    freeze_backbone: bool
    loss: Literal["cross_entropy", "ordinal"]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    optimizer: Literal["adam", "adamw"]
    learning_rate: Positive
    weight_decay: Annotated[float, Field(ge=0)]
    schedule: Literal["constant", "linear", "cosine"]
    warmup_steps: Annotated[int, Field(ge=0)]
    clip_norm: Positive | None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None
    batch_size: Count
    accumulation: Count
    epochs: Count
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    horizontal_flip: bool
    color_jitter: Share
    compile: Literal["auto"] | bool
    seed: Seed

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        if self.accumulation > self.batch_size:
            raise ValueError(f"accumulation is more than batch_size ({self.batch_size})")
        if self.library == "transformers" and "model_type" not in self.config:
            raise ValueError("config.model_type is missing, like vit")
        return self


class Train(Block):
    """How training runs, and a block for each model, whose key is the name of its folders."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")], Model]

    processes: Literal["auto"] | Count
    checkpoint_minutes: Positive
    deterministic: bool

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        # models/pretrained and reports/figures are other stages' folders.
        if taken := {"pretrained", "figures"} & self.models().keys():
            raise ValueError(f"a model cannot be called {taken.pop()}")
        return self

    def models(self) -> dict[str, Model]:
        return dict(self.__pydantic_extra__)


class Evaluate(Block):
    batch_size: Count
    false_alarm: Annotated[float, Field(gt=0, lt=1)]


class Params(Block):
    """params.yaml."""

    executor: Literal["local", "ray"]
    bucket: Bucket
    index: Index
    subset: Subset
    fetch: Fetch
    resize: Resize
    split: Split
    train: Train
    evaluate: Evaluate

    def model(self, name: str) -> Model:
        """The train block of one model. Raises UserError where there is none."""
        models = self.train.models()
        if name not in models:
            raise UserError(f"params.yaml has no train.{name}; it has {', '.join(models)}")
        return models[name]

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
    """Read and check the whole file. Raises UserError naming every key at fault."""
    try:
        # YAML 1.2 as DVC reads it: in YAML 1.1 (PyYAML) 1e-3 is a string and `off` a boolean.
        values = YAML(typ="safe", pure=True).load(path)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: run from the repository's root") from None
    # ruamel raises ValueError for an impossible date, RecursionError for a thousand brackets.
    except (YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: " + "; ".join(map(_describe, error.errors()))) from None


def _describe(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"] if part not in NOT_KEYS)
    if problem["type"] == "extra_forbidden":
        return f"{key}: there is no such key"
    if problem["type"] == "missing":
        return f"{key} is missing"
    text = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):
        # Keys that do not fit together, which the text names.
        return f"{key}: {text}".removeprefix(": ")
    return f"{key or 'the file'}: {text}, not {reprlib.repr(problem['input'])}"
