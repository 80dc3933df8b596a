"""Where a build's images come from."""
