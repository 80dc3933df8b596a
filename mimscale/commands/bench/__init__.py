"""``mimscale bench``: what this machine reaches, against named rivals."""
