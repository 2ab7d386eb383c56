"""What work costs (time, bytes and tokens in a ledger, energy from a node's counters), and what machine it ran on."""
