"""Clients and server as Ray actors: placement, restarts, quorum. The only importer of ray below sweeps and the CLI."""
