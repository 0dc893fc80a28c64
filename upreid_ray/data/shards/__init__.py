"""Records -> a set of Parquet shards with a manifest."""
