"""Features of photographs that are computed without training."""
