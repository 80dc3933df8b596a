"""A study's figures, tables and findings, on one page."""
