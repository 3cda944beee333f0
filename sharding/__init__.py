"""Feature cache: sharding."""
