"""What students can do, measured: judges, measures and reports."""
