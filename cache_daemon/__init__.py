"""Feature cache: cache_daemon."""
