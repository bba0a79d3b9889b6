"""params.yaml as typed, checked values. The only reader of params.yaml."""

import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.core.command import UserError

PARAMS_FILE = Path("params.yaml")

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
    optimizer: Literal["adam", "adamw"]
    learning_rate: Positive
    weight_decay: Annotated[float, Field(ge=0)]
    schedule: Literal["constant", "linear"]
    warmup_steps: Annotated[int, Field(ge=0)]
    batch_size: Count
    epochs: Count
    mean: Annotated[list[float], Field(min_length=3, max_length=3)]
    std: Annotated[list[Positive], Field(min_length=3, max_length=3)]
    horizontal_flip: bool
    seed: Seed


class Evaluate(Block):
    batch_size: Count


class Params(Block):
    """params.yaml. A model's key in `train` is the name of its folders in models/ and reports/."""

    bucket: Bucket
    index: Index
    subset: Subset
    fetch: Fetch
    resize: Resize
    split: Split
    train: dict[Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9_-]*$")], Model]
    evaluate: Evaluate

    def model(self, name: str) -> Model:
        """The train block of one model. Raises UserError where there is none."""
        if name not in self.train:
            raise UserError(f"params.yaml has no train.{name}; it has {', '.join(self.train)}")
        return self.train[name]


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
    key = ".".join(str(part) for part in problem["loc"] if part != "[key]")
    if problem["type"] == "extra_forbidden":
        return f"{key}: there is no such key"
    if problem["type"] == "missing":
        return f"{key} is missing"
    text = problem["msg"].removeprefix("Value error, ")
    return f"{key or 'the file'}: {text}, not {reprlib.repr(problem['input'])}"
