"""The version, stated once: setup.py and topi_int8.__version__ both read it here."""

__version__ = "0.1.0"
