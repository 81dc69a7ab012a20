"""Where images lie: class folders, lists, tar shards, parquet; one source each."""
