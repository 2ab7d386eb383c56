"""Clients, the server, and the algorithms that they run, as plain classes: nothing here knows Ray."""
