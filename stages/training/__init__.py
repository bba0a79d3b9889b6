"""Training a classifier, on one device or many, in a way that survives being killed."""
