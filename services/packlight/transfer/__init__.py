"""KV transports: how a shipment's bytes get from a prefill to a decode worker."""
