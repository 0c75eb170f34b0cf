"""One process or several: transfers, sums, shards."""
