"""Making a shard folder: sources, a listing, a layout, and tars written from it."""
