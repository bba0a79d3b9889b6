"""The train stage on machines of a cloud."""
