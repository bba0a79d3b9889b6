"""Building shards, one function call each, here or on a Ray cluster; finished ones are kept."""
