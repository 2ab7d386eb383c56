"""Trackers: where a run's metrics are sent as it goes on, so that it can be watched there."""
