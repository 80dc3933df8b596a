"""What a run will take, counted before anything is allocated: memory, time, traffic."""
