"""What surrounds the pipeline: a local S3 server, drawn bins, the demo."""
