"""Classifiers: building, saving and loading them, and scoring photographs with them."""
