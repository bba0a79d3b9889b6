"""The files that stages pass to each other: Parquet shards, CSV and JSON."""
