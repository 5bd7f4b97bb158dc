"""The data sets, teachers and recipes that the studies of the methods read; see prepare.py."""
