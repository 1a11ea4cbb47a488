"""Public students as data."""
