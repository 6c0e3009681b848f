"""One file or folder an architecture."""
