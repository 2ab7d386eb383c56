"""Many runs held against each other: comparisons of algorithms, and sweeps over settings."""
