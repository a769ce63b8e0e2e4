"""fastgen trains image classifiers in generations; the README has the map of the modules."""

__version__ = "0.1.0"
