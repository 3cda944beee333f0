"""Tests; a package, because a dependency of the demo installs one of the same name."""
