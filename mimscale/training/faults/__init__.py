"""What ends or threatens a run: hangs, preemption, losses that spike."""
