"""What a shard folder is: its format, its index, its tars, near or remote."""
