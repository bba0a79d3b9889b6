"""Photographs as bytes and as pixels: decoding, resizing, and loading batches."""
