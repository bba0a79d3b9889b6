"""The bucket: listing it, reading its objects checked, and parsing its records."""
