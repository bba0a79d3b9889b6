"""Training a classifier on one or several devices. An interrupted training can be resumed."""
