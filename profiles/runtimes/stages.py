"""What the fresh process of `profiles.runtimes.probe` says that it does, for those who read it."""

LOADING, QUERYING = "loading", "querying"
HUNG = "Timeout ("
"""How faulthandler begins its report of a process that it ends."""
