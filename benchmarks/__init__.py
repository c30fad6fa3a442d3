"""What the tables of the documentation are measured with: `python -m benchmarks.NAME` from the
repository's root."""
