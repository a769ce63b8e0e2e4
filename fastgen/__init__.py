"""fastgen trains image classifiers in generations; docs/architecture.md has the map of the modules."""

__version__ = "0.1.0"
