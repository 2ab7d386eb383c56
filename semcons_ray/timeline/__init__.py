"""The virtual clock: how long a federation's rounds take on its devices and links, and what they cost."""
