"""Measurements of relprop; every number in the documentation comes from rows written here."""
