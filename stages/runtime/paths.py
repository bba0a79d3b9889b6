"""Where outputs lie, as dvc.yaml names them."""

from pathlib import Path

#: Lists of bins that people bring, tracked by git.
LISTS = Path("lists")
INDEX = Path("data/index.parquet")
INDEX_COUNTS = Path("data/index.json")
SUBSET = Path("data/subset.parquet")
RAW = Path("data/raw")
UNFETCHED = Path("data/unfetched.csv")
RESIZED = Path("data/resized")
QUARANTINE = Path("data/quarantine.csv")
SPLIT = Path("data/split.csv")
LEAKS = Path("data/split.json")
MODELS = Path("models")
PRETRAINED = MODELS / "pretrained"
REPORTS = Path("reports")
