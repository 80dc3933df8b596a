"""Running a study: on this machine or on Slurm."""
