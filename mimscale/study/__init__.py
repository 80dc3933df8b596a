"""The paper's grid as a study: planned, run, judged, and reported beside the published numbers."""
