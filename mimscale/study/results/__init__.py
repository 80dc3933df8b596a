"""From run folders to the cells of a study, and the published ones."""
