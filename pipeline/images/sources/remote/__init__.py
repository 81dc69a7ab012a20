"""Read containers of buckets and web servers: fetched into the cache, or by parts."""
