"""What runs on this machine, and what installs the rest: the parts of `python -m fastgen.doctor`."""
