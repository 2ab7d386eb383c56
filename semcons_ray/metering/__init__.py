"""What work costs: time, bytes and tokens in a ledger, energy from the node's own counters, and the machine itself."""
