"""The files that stages hand to each other: Parquet shards, CSV and JSON."""
