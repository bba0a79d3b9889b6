"""Classifiers: building, saving and loading them, and applying them to photographs."""
