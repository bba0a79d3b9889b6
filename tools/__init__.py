"""What surrounds the pipeline: a local S3 server, synthetic bins, the demo."""
