"""What ``tests/fuzz.py`` makes and how it judges: kinds of files, mutations of them, and one process that tries a batch."""
