"""One model in several processes: tensor parallelism with KV sharded by head."""
