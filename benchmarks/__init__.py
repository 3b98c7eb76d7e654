"""One file a benchmark; each prints JSON with `--json` and compares within one run."""
