"""Speed against peers, measured side by side: benchmarks/README.md says how to run each."""
