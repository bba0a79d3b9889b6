"""Making shards, one function call each, here or on a Ray cluster; finished shards are kept."""
