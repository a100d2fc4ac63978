"""The version: what is imported, the package's metadata and the citation all read it here."""

__version__ = "0.1.0"
