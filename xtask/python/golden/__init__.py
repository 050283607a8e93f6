"""Makers of the interop goldens; `goldens.py` is the command."""
