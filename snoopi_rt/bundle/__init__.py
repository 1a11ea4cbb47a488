"""An exported folder: what its bundle.json promises, and the check that its files keep it."""
