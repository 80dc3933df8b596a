"""Reading a shard folder: which sample comes when, and the batches made of them."""
