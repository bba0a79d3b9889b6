"""Classifiers: building, saving and loading them, and their scores of photographs."""
