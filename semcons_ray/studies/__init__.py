"""Studies of many runs: comparisons of algorithms, and sweeps over settings."""
