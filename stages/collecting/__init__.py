"""The bucket: listing it, reading and checking its objects, parsing its records."""
