"""Encoders' weights, in and out."""
