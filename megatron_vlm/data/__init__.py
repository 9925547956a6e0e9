"""From source files to micro-batches: preparing shards, planning which samples a row holds, loading."""
