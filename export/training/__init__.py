"""Training a one-step student: PG-SB for every backbone, and the loop that every stage shares."""
