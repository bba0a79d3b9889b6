"""How good a model is: metrics, intervals, verification, comparison."""
