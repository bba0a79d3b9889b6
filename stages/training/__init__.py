"""Training a classifier on one device or many; an interrupted training resumes."""
