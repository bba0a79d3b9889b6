"""What a model's scores are worth: metrics, intervals, verification, comparison."""
