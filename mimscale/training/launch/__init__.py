"""Starting runs: one start and how it ends, where its ranks meet, and jobs for Slurm."""
